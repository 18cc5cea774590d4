"""metrics.jsonl: one line per optimizer step, none missing and none twice, also after kills and resumes.

Line N belongs to step N. A line counts once its newline is there; what follows the last newline is a torn write. JSON
has no NaN or infinity, so a value that is not finite is written as null: a reader that expects a number must look.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.errors import StorageFailed, UserError
from trainer.files import fsync_folder, retrying

BLOCK_BYTES = 2**18


class MetricsLog:
    """The only writer of a run's metrics. The file grows at its end, and is only ever cut at the end of a line.

    `rewind` comes first: it says after which step this start goes on. What is not durable yet is also kept in memory:
    after a StorageFailed the caller may go on, and the next call writes the missing lines first.
    """

    def __init__(self, path: str | Path, attempts: int = 6, sleep: Callable[[float], None] = time.sleep):
        self.path = Path(path)
        self.last_step: int | None = None  # the step of the last line given to `append`; None until `rewind`
        self._attempts, self._sleep = attempts, sleep
        self._durable_bytes = 0  # the file up to here is on disk
        self._tail = bytearray()  # the whole lines after that ...
        self._tail_written = 0  # ... of which so many bytes are in the file
        self._descriptor: int | None = None

    def rewind(self, step: int) -> int:
        """The number of lines dropped so that `step` is the last one: all later lines, and a torn last one.

        Raises UserError, with nothing changed, if lines 1 to `step` are not all there, naming the first that is not.
        What stays is a prefix of the file, so one truncate is the whole change: it cannot be half done, and a kill
        before, in or after it finds lines 1 to `step` untouched.
        """
        self.close()
        kept_bytes, dropped = _measure(self.path, step)
        if dropped:
            self._retrying(lambda: _cut(self.path, kept_bytes))
        self.last_step, self._durable_bytes, self._tail, self._tail_written = step, kept_bytes, bytearray(), 0
        return dropped

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes the next steps' records in one piece; raises StorageFailed after the last attempt, keeping them.

        Not durable before `sync`. A failed attempt leaves no torn line behind if the file can still be cut.
        """
        assert self.last_step is not None, "rewind(step) before the first append"
        for record in records:
            assert record["step"] == self.last_step + 1, f"step {record['step']} after step {self.last_step}"
            self._tail += to_line(record)
            self.last_step += 1
        self._retrying(self._write)

    def sync(self) -> None:
        """Makes every appended line durable, those kept from a failed append too; raises StorageFailed otherwise."""
        self._retrying(self._write_and_sync)

    def close(self) -> None:
        """Closes the file; neither writes nor syncs."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _retrying(self, action: Callable[[], None]) -> None:
        retrying(action, self._attempts, what=str(self.path), sleep=self._sleep)

    def _write(self) -> None:
        unwritten = memoryview(bytes(self._tail[self._tail_written :]))
        if not unwritten:
            return
        descriptor = self._open()
        try:
            while unwritten:  # a full disk takes a part of it, and refuses on the next call
                unwritten = unwritten[os.write(descriptor, unwritten) :]
        except OSError:
            self._cut_back(self._tail_written)
            raise
        self._tail_written = len(self._tail)

    def _write_and_sync(self) -> None:
        self._write()
        if not self._tail:
            return
        try:
            os.fsync(self._open())
        except OSError:
            # The kernel forgets pages that it failed to write: a second fsync would succeed and prove nothing.
            self._cut_back(0)
            raise
        self._durable_bytes += len(self._tail)
        self._tail, self._tail_written = bytearray(), 0

    def _open(self) -> int:
        """The descriptor, at the end of a file that holds what was written and nothing else."""
        if self._descriptor is None:
            existed = self.path.exists()
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            if not existed:
                fsync_folder(self.path.parent)
        facts, expected = os.fstat(self._descriptor), self._durable_bytes + self._tail_written
        in_place = self.path.exists() and os.path.samestat(facts, self.path.stat())
        if not in_place or facts.st_size < expected:
            raise StorageFailed(
                f"{self.path} was removed, replaced or cut by someone else while the run was writing it"
            )
        if facts.st_size > expected:  # torn bytes that could not be cut when they were written
            os.ftruncate(self._descriptor, expected)
        return self._descriptor

    def _cut_back(self, tail_written: int) -> None:
        """Back to so much of the tail, and to no descriptor: that of a network file system may have gone stale."""
        self._tail_written = tail_written
        with contextlib.suppress(OSError):  # then `_open`, or the next start's rewind, cuts it
            if self._descriptor is not None:
                os.ftruncate(self._descriptor, self._durable_bytes + tail_written)
        with contextlib.suppress(OSError):
            self.close()


def to_line(record: dict[str, Any]) -> bytes:
    """The record as one line of JSON with its newline; NaN and infinities as null."""
    return json.dumps(finite(record), allow_nan=False).encode() + b"\n"


def read(path: str | Path) -> list[dict[str, Any]]:
    """Every whole line, in order; [] without a file. Raises UserError for a line that is not a JSON object."""
    return [_parse(line, number, path) for number, line in enumerate(_whole_lines(Path(path)), start=1)]


def check(path: Path, step: int) -> None:
    """Raises UserError, naming the first that is not, if lines 1 to `step` are not all there; changes nothing."""
    _measure(path, step)


def first_lines(path: Path, step: int) -> bytes:
    """Lines 1 to `step` as they stand in the file; raises UserError as `check` does."""
    size, _ = _measure(path, step)
    with open(path, "rb") as file:
        return file.read(size)


def _measure(path: Path, step: int) -> tuple[int, int]:
    """The bytes that lines 1 to `step` take, and how many lines follow them, a torn one included.

    Of a long file only the end is read line by line; if it does not hold what it should, all of it is.
    """
    facts = path.stat() if path.exists() else None
    return _measure_now(path, step, facts and (facts.st_size, facts.st_mtime_ns, facts.st_ino))


@lru_cache(maxsize=1)  # a start asks twice: whether it may go on, and where to
def _measure_now(path: Path, step: int, unchanged: tuple[int, int, int] | None) -> tuple[int, int]:
    head_bytes, head_lines = _head(path, step)
    try:
        return _measure_from(path, step, head_bytes, head_lines)
    except UserError:
        if head_lines == 0:
            raise
        return _measure_from(path, step, 0, 0)


def _head(path: Path, step: int) -> tuple[int, int]:
    """The bytes and the lines of the part that is only counted: what comes two blocks or more before line `step`.

    Counting a line takes a small part of parsing it, and a resume must not take longer the later it is.
    """
    bounds, offset, lines = [(0, 0)] * 3, 0, 0
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            lines += block.count(b"\n")
            if lines >= step:
                break
            if b"\n" in block:
                bounds.append((offset + block.rfind(b"\n") + 1, lines))
            offset += len(block)
    return bounds[-3]


def _measure_from(path: Path, step: int, good_bytes: int, lines: int) -> tuple[int, int]:
    """The same, given that so many bytes at the start are so many lines."""
    for line in _whole_lines(path, good_bytes):
        lines += 1
        if lines <= step:
            found = _parse(line, lines, path, step).get("step")
            if found != lines:
                raise _gap(path, step, lines, f"it holds step {found}")
            good_bytes += len(line)
    if lines < step:
        raise _gap(path, step, lines + 1, "it is missing" if path.exists() else "there is no such file")
    size = path.stat().st_size if path.exists() else 0
    torn = 0 if size == 0 or _ends_with_newline(path) else 1
    return good_bytes, lines - step + torn


def _whole_lines(path: Path, first_byte: int = 0) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            file.seek(first_byte)
            for line in file:
                if line.endswith(b"\n"):
                    yield line
    except FileNotFoundError:
        return


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _parse(line: bytes, number: int, path: str | Path, step: int | None = None) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        record = None
    if not isinstance(record, dict):
        if step is not None:
            raise _gap(Path(path), step, number, "it is not a JSON object")
        raise UserError(f"line {number} is not a JSON object", f"{path}:{number}", "the file was changed or damaged")
    return record


def _gap(path: Path, step: int, number: int, seen: str) -> UserError:
    return UserError(
        f"the metrics do not hold every step up to {step}: line {number} should be step {number}, but {seen}",
        f"{path}:{number}",
        "put the file back as the run left it, or start a new run in another folder",
    )


def _cut(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """`value` as a line of the metrics has it: None for each number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
