"""Files that are either wholly there or not there at all: written beside their place, made durable, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from trainer.errors import StorageFailed

T = TypeVar("T")

_TEMP_NAME = re.compile(r"\..+\.difftrain-tmp-\d+")


class HashedWriter:
    """A binary file that is only written forwards, with the size and the sha256 of what went through it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0
        self.problem: OSError | None = None  # for a caller whose library hides it

    def write(self, data: Any) -> int:
        """The number of bytes in `data`, any object with a buffer; all of them are written."""
        try:
            self._file.write(data)
        except OSError as error:
            self.problem = error
            raise
        self._sha256.update(data)
        n = memoryview(data).nbytes
        self.size_bytes += n
        return n

    def flush(self) -> None:
        self._file.flush()

    def sha256(self) -> str:
        """The hash of what was written so far, 64 hex digits."""
        return self._sha256.hexdigest()


def temp_path(path: str | Path) -> Path:
    """Where `path` is written before it is renamed: a hidden name in the same folder, with the process's id.

    Fifty characters of the name are at most 200 bytes, so that the longest legal name still has a legal temp file.
    """
    path = Path(path)
    return path.with_name(f".{path.name[:50]}.difftrain-tmp-{os.getpid()}")


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[HashedWriter]:
    """A writer whose bytes become `path` in one step when the block ends; any exception leaves `path` as it was."""
    path = Path(path)
    temp = temp_path(path)
    try:
        with open(temp, "wb") as file:
            yield HashedWriter(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:  # also Ctrl-C, and torch.save's RuntimeError for a full disk
        with contextlib.suppress(OSError):
            temp.unlink()
        raise
    fsync_folder(path.parent)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Makes `data` (text as UTF-8) the content of `path` in one durable step; an OSError leaves `path` as it was."""
    with open_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `to_json(value)` atomically; ValueError or TypeError for what JSON cannot hold come before any write."""
    write_atomic(path, to_json(value))


def to_json(value: Any) -> bytes:
    """JSON for people: keys in their order, two spaces, a last newline. Raises ValueError for NaN and infinity.

    A file name that is not UTF-8 holds lone surrogates; `backslashreplace` writes those as JSON's own escapes.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def sha256_file(path: str | Path) -> str:
    """The sha256 of the file's content, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep_temp_files(folder: str | Path) -> list[str]:
    """The names of the temp files that a killed run left in `folder`, now removed, sorted.

    Call it before the first write, and while no other run writes there: a live writer's temp file looks the same.
    """
    swept = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMP_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):  # a stray that cannot be removed must not stop the run
                    os.unlink(entry.path)
                    swept.append(entry.name)
    return sorted(swept)


def remove_own_temp_files(folder: str | Path) -> None:
    """Before this process ends at once: the temp files that it is writing in `folder` go."""
    for path in Path(folder).glob(f".*.difftrain-tmp-{os.getpid()}"):
        with contextlib.suppress(OSError):
            path.unlink()


def fault_point(name: str) -> None:
    """Where a test lets this process die as by kill -9: at the point that DIFFTRAIN_KILL_AT names."""
    if os.environ.get("DIFFTRAIN_KILL_AT") == name:
        os.kill(os.getpid(), signal.SIGKILL)


def fsync_folder(folder: str | Path) -> None:
    """Makes the names in `folder` durable, where the file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def retrying(
    action: Callable[[], T],
    attempts: int = 6,
    *,
    what: str = "a file of the run",
    pause_seconds: float = 0.2,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What `action` returns, tried `attempts` times with pauses that double (6 s in all by default).

    Raises StorageFailed once the last attempt ends in an OSError; any other exception passes at once.
    """
    for attempt in range(attempts):
        try:
            return action()
        except OSError as error:
            if attempt == attempts - 1:
                raise StorageFailed(f"{what} could not be written in {attempts} attempts: {error}") from error
            sleep(pause_seconds * 2**attempt)
    raise AssertionError(f"{attempts} attempts are none")
