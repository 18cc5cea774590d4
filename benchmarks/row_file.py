"""Figures as lines of JSON: each is on disk before the next one is measured, whatever ends the process.

Needs the standard library alone: `scripts/gpu_check.py` writes its own rows with it before anything is installed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append(file: Path, row: Row) -> None:
    """Write one whole line and make it durable; after a line that a kill cut short, on a line of its own."""
    line = json.dumps(row, allow_nan=False, default=str) + "\n"
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (("\n" if torn else "") + line).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rows_of(file: Path) -> list[Row]:
    """Every whole row of the file, oldest first; none if there is no file."""
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # cut short by a kill
    return rows


def newest(file: Path) -> dict[str, Row]:
    """The newest row of each name, in the order in which the names first came."""
    return {row["name"]: row for row in rows_of(file)}


def finished(file: Path) -> dict[str, Row]:
    """Those of them that need not be measured again. A later start should where there was no time, or an error."""
    return {name: row for name, row in newest(file).items() if "not_run" not in row and not is_bad(row)}


def is_bad(row: Row) -> bool:
    """Whether a row has an error of its own: out of memory is a finding, not an error."""
    return "error" in row and not row["error"].startswith("out of memory")
