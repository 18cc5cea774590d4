"""Reading `metadata.jsonl` and `metadata.csv`: rows with their line numbers, and every problem told at once."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from trainer.errors import UserError


class Problems:
    """What is wrong with one file, line by line; the first few are kept in words and the rest counted."""

    SHOWN = 20

    def __init__(self, path: str):
        self.path = path
        self.count = 0
        self._first: list[tuple[int, str]] = []

    def add(self, line: int, what: str) -> None:
        """Note a problem of line `line`, 1-based."""
        self.count += 1
        if len(self._first) < self.SHOWN:
            self._first.append((line, what))

    def raise_any(self, fix: str) -> None:
        """Raise one UserError with all problems, if there is any."""
        if not self.count:
            return
        if self.count == 1:
            line, what = self._first[0]
            raise UserError(what, f"{self.path}:{line}", fix)
        told = [f"{self.path}:{line}: {what}" for line, what in sorted(self._first)]
        if self.count > len(told):
            told.append(f"and {self.count - len(told):,} more")
        raise UserError("\n  ".join([f"{self.count:,} problems in the metadata", *told]), None, fix)


def rows(path: str, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with the line on which it starts; lines that cannot be parsed go to `problems` instead.

    Raises UserError for a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            yield from (_csv_rows if path.endswith(".csv") else _json_rows)(file, problems)
    except OSError as error:
        raise UserError(f"the metadata cannot be read: {error.strerror}", path, "see its permissions") from error


def _json_rows(file: BinaryIO, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in _lines(file):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            seen = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            problems.add(line, f"not JSON: {seen}; each line is one object")
            continue
        if isinstance(row, dict):
            yield line, row
        else:
            problems.add(line, f"{shown(row)} where an object is needed; each line is one object")


def _csv_rows(file: BinaryIO, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    # Strict, because a quote that is never closed would otherwise swallow the rest of the file without a word.
    reader = csv.reader((text for _, text in _lines(file)), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(line, f"not CSV: {error}")
            continue
        if not cells:
            continue
        if not header:
            header = [name.strip() for name in cells]
            if len(set(header)) < len(header):
                problems.add(line, f"the header names a column twice: {', '.join(header)}")
        elif len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        else:
            hint = "; a caption that holds commas needs quotes" if len(cells) > len(header) else ""
            problems.add(line, f"{len(cells)} cells, but the header names {len(header)} columns{hint}")


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Each line, 1-based; a byte that is not UTF-8 stays, as half of a surrogate pair, for `caption_fault` to find."""
    for line, raw in enumerate(file, 1):
        yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8", "surrogateescape")


def shown(value: Any) -> str:
    """A value of a stranger's file on one short line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
