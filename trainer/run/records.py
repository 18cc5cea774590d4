"""records.jsonl: each record of a run's data by name, so that what changed can be named and not only noticed.

The first line holds the fingerprint of them all. Each other line is one record: its key, the sha256 of its picture, and
the first half of that of its captions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from trainer.data.fingerprint import Leaf, changed_records
from trainer.files import open_atomic, retrying
from trainer.run.rundir import RunDir


def write_records(run_dir: RunDir, fingerprint: str, leaves: Callable[[], Iterable[Leaf] | None]) -> None:
    """Make records.jsonl the list of those that `leaves` gives; raises StorageFailed if it cannot be written.

    One of the same fingerprint stays as it is. If they are too many to list (None), one of other data goes away.
    """
    if _fingerprint(run_dir.records) != fingerprint:
        retrying(lambda: _write(run_dir.records, fingerprint, leaves()), what=str(run_dir.records))


def _write(path: Path, fingerprint: str, leaves: Iterable[Leaf] | None) -> None:
    if leaves is None:
        path.unlink(missing_ok=True)
        return
    with open_atomic(path) as file:
        file.write(_line({"fingerprint": fingerprint}))
        for leaf in leaves:
            file.write(_line(leaf._asdict()))


def _line(value: dict[str, Any]) -> bytes:
    """A key that is a name without UTF-8 holds lone surrogates: they become JSON's own escapes."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_records(run_dir: RunDir, fingerprint: str) -> Iterator[Leaf] | None:
    """The records that the run lists, read as they are asked for; None if it has no list of this fingerprint.

    Reading on raises ValueError at a line that is damaged.
    """
    return _leaves(run_dir.records) if _fingerprint(run_dir.records) == fingerprint else None


def changes_since(run_dir: RunDir, fingerprint: str | None, now: Iterable[Leaf] | None) -> dict[str, str] | None:
    """What became of the records that the run had with this fingerprint, by key; None where no list can say it."""
    before = None if fingerprint is None else read_records(run_dir, fingerprint)
    if before is None or now is None:
        return None
    try:
        return changed_records(before, now)
    except (OSError, ValueError):
        return None


def _leaves(path: Path) -> Iterator[Leaf]:
    with open(path, "rb") as file:
        next(file)
        for line in file:
            try:
                yield Leaf(**json.loads(line))
            except TypeError as error:
                raise ValueError(f"no record: {error}") from None


def _fingerprint(path: Path) -> str | None:
    """Of the records that `path` lists; None if there is no such file or it is not one of ours."""
    try:
        with open(path, "rb") as file:
            return json.loads(file.readline())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
