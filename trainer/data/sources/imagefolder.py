from __future__ import annotations

import difflib
import functools
import itertools
import json
import os
import shlex
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import Field

from trainer.data.folder import Folder, Found, leads_out, relative_name
from trainer.data.image_file import REPLACE, SUFFIXES
from trainer.data.index import Index, IndexedRecords, IndexedSource, Row, file_identity, indexed, no_columns, usable
from trainer.data.looks import NOTHING, look_at_files
from trainer.data.metadata import Problems, rows, shown
from trainer.data.record import Look, caption_fault, silent
from trainer.errors import UserError

NAMED_MISSING = 5
LOOKED_BESIDE = 8  # records, for text files that are not read
NOT_READ: dict[Found, str] = {"outside": "is a link that leaves data_root", "not a file": "is not a regular file"}
OUTSIDE = f"picture {NOT_READ['outside']}"
METADATA = ("metadata.jsonl", "metadata.csv")
TEXT_SUFFIXES = tuple(map("".join, itertools.product(".", "tT", "xX", "tT")))  # .txt before all others


class ImageFolder(IndexedSource):
    """A folder of pictures: with a `metadata.jsonl` or `metadata.csv`, one line a picture, or a `.txt` beside each."""

    kind = "imagefolder"

    data_root: str = Field(min_length=1, description="The folder; a relative path starts at the working directory.")
    caption_column: str = Field(
        default="text",
        min_length=1,
        description="Column of the caption: a string or, in JSON, a list of strings to draw from.",
    )
    image_column: str = Field(
        default="file_name", min_length=1, description="Column of the picture's file name, relative to data_root."
    )

    def open(self) -> ImageFolderRecords:
        folder = _folder(self.data_root)
        metadata = self._metadata(folder)
        if metadata is None:
            index = indexed(None, no_columns, lambda: self._rows_of_sidecars(folder))
        else:
            there = file_identity(metadata)
            columns = [self.caption_column, self.image_column, self.on_bad]
            identity = {"imagefolder": folder.root, "metadata": there, "columns": columns} if there else None
            index = indexed(identity, no_columns, lambda: self._rows_of(metadata, folder))
        if not len(index):
            raise UserError("the metadata lists no picture", metadata, self._example())
        return ImageFolderRecords(folder.root, index, self.max_pixels, metadata)

    def _rows_of(self, metadata: str, folder: Folder) -> Iterator[Row]:
        """One row a line; raises UserError with every problem of the file, once all of it is read."""
        problems = Problems(metadata)
        first_line: dict[str, int] = {}
        missing: list[tuple[int, str]] = []
        captionless: list[tuple[int, str]] = []
        for line, row in rows(metadata, problems):
            try:
                key = relative_name(_string(self._value(row, self.image_column, "image_column"), self.image_column))
                captions, absent = self._captions(row)
            except ValueError as error:
                problems.add(line, str(error))
                continue
            if key in first_line:
                problems.add(line, f"{shown(key)} is listed on line {first_line[key]} already")
                continue
            first_line[key] = line
            if not key.isascii() and caption_fault([key]):
                problems.add(line, f"file name {shown(key)} is not UTF-8")
                continue
            found = folder.find(key)
            if found == "missing" and self.on_bad == "error":
                missing.append((line, key))
            elif found not in ("file", "missing"):  # a missing one may be left out, and the look at it says so
                problems.add(line, f"{shown(key)} {NOT_READ[found]}")
            if absent:
                captionless.append((line, absent))
            kept, fault = usable(captions)
            told = f"{metadata}:{line}: {shown(key)}: {absent or fault}" if fault else None
            yield {"key": key, "captions": kept, "caption_fault": told}
        if captionless and len(captionless) == len(first_line):  # not captions that are missing, but another column
            for line, absent in captionless:
                problems.add(line, absent)
        if missing:
            problems.add(missing[0][0], _missing(missing, len(first_line)))
        problems.raise_any("mend the metadata; no picture was read yet")

    def _rows_of_sidecars(self, folder: Folder) -> Iterator[Row]:
        """One row a picture below the folder, by name; its captions are the lines of the `.txt` beside it."""
        for key in _pictures(folder):
            beside, found = _beside(folder, key)
            name = os.path.basename(beside)
            if found == "file":
                kept, fault = usable(_lines(os.path.join(folder.root, beside)))
                told = f"{shown(key)}: {fault} in {name}" if fault else None
            else:
                kept, told = [], f"{shown(key)}: there is no {name}"
                if found != "missing":
                    told = f"{shown(key)}: there is no caption: {name} {NOT_READ[found]}"
            yield {"key": key, "captions": kept, "caption_fault": told}

    def _metadata(self, folder: Folder) -> str | None:
        """The path of the one metadata file; None if captions stand beside their pictures instead."""
        there = [name for name in METADATA if folder.find(name) != "missing"]
        if len(there) == 2:
            raise UserError("there are both metadata.jsonl and metadata.csv", self.data_root, "keep one of them")
        if not there and any(_beside(folder, key)[1] == "file" for key in _pictures(folder)):
            return None
        if not there:
            full = os.listdir(folder.root)
            seen = "no metadata.jsonl, no metadata.csv and no .txt beside a picture" if full else "the folder is empty"
            raise UserError(seen, self.data_root, self._example())
        (name,) = there
        if (found := folder.find(name)) != "file":
            raise UserError(f"{name} {NOT_READ[found]}", self.data_root, "put a regular file in its place")
        return os.path.join(self.data_root, name)

    def _example(self) -> str:
        """What the metadata should look like, with a picture that is there."""
        picture = "cat.png"
        for directory, _, names in os.walk(self.data_root):
            if directory != self.data_root and "metadata.jsonl" in names:
                return f"there is one below it: set data.data_root={shlex.quote(directory)}"
            pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
            if pictures:
                picture = os.path.relpath(os.path.join(directory, min(pictures)), self.data_root)
                break
        line = json.dumps({self.image_column: picture, self.caption_column: "a photo of a cat"}, ensure_ascii=False)
        return f"metadata.jsonl needs one line a picture, such as: {line}"

    def _captions(self, row: dict[str, Any]) -> tuple[tuple[str, ...], str | None]:
        """The captions, and why there is no such column if there is none."""
        if row.get(self.caption_column) is None:
            absent = _absent(row, self.caption_column, "caption_column", [self.image_column])
            return (), absent if self.caption_column not in row else None
        value = row[self.caption_column]
        if not isinstance(value, list):
            return (_string(value, self.caption_column),), None
        return tuple(_string(item, self.caption_column, "an item of ") for item in value), None

    def _value(self, row: dict[str, Any], column: str, key: str) -> Any:
        if column not in row:
            raise ValueError(_absent(row, column, key, [self.caption_column]))
        return row[column]


def _absent(row: dict[str, Any], column: str, key: str, taken: list[str]) -> str:
    others = [name for name in row if name not in (column, *taken)]
    near = others if len(others) == 1 else difflib.get_close_matches(column, others, 1, 0.5)
    hint = f"set data.{key}={near[0]}?" if near else f"set data.{key}"
    there = ", ".join(map(shown, list(row)[:10])) or "no column"
    return f"no column {column!r}; the line has {there}: {hint}"


class ImageFolderRecords(IndexedRecords):
    """Names and captions, in the order of the metadata; pictures are opened when asked for."""

    def __init__(self, root: str, index: Index, max_pixels: int, metadata: str | None):
        super().__init__(index, max_pixels)
        self._root, self._metadata = root, metadata

    def where(self, index: int) -> str:
        return os.path.join(self._root, self[index].key)

    def data(self, index: int) -> bytes:
        path = self.where(index)
        if leads_out(self._root, path):  # it may have become a link since it was indexed
            raise UserError(OUTSIDE, path, REPLACE)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise UserError(f"picture cannot be read: {error.strerror}", path, REPLACE) from error

    def notes(self) -> list[str]:
        if self._metadata is None:
            return []
        keys = (key.as_py() for key in self.index.table["key"][:LOOKED_BESIDE])
        for beside in (os.path.splitext(key)[0] + TEXT_SUFFIXES[0] for key in keys):
            if os.path.isfile(os.path.join(self._root, beside)):
                read = os.path.basename(self._metadata)
                return [f"note   captions come from {read}; {beside} and others like it are not read"]
        return []

    def looks(self, fresh: bool = False, say: Callable[[str], None] = silent) -> Iterator[Look]:
        @functools.cache
        def real(directory: str) -> str:  # there are few directories
            return os.path.realpath(directory)

        outside = deque[bool]()  # of each record whose look is still to come

        def inside() -> Iterator[str]:
            for key in self.index.table["key"]:
                path = os.path.join(self._root, key.as_py())
                outside.append(leads_out(self._root, path, real))
                if not outside[-1]:
                    yield path

        for look in look_at_files(inside(), len(self), self.max_pixels, fresh, say):
            while outside.popleft():
                yield Look(NOTHING, 0, 0, OUTSIDE)
            yield look
        yield from (Look(NOTHING, 0, 0, OUTSIDE) for _ in outside)


def _beside(folder: Folder, key: str) -> tuple[str, Found]:
    """The name of the text file beside a picture, and what it stands for."""
    names = [os.path.splitext(key)[0] + suffix for suffix in TEXT_SUFFIXES]
    for name in names:
        if (found := folder.find(name)) != "missing":
            return name, found
    return names[0], "missing"


def _lines(path: str) -> list[str]:
    """The lines of a text file that have words."""
    try:
        with open(path, "rb") as file:
            text = file.read().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"the captions cannot be read: {error.strerror}", path, "see its permissions") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _pictures(folder: Folder) -> Iterator[str]:
    """The files below the folder that are called as pictures are, by name; links that leave it are not followed."""
    found = []
    for directory, below, names in os.walk(folder.root):
        below[:] = [name for name in below if not name.startswith(".")]
        relative = os.path.relpath(directory, folder.root)
        keys = (name if relative == "." else f"{relative}/{name}" for name in names)
        found += [key for key in keys if key.lower().endswith(SUFFIXES) and folder.find(key) == "file"]
    for key in found:
        if caption_fault([key]):
            raise UserError(f"file name {shown(key)} is not UTF-8", folder.root, "rename the file")
    return iter(sorted(found))


def _string(value: Any, column: str, part: str = "") -> str:
    if not isinstance(value, str):
        raise ValueError(f"{part}column {column!r} is {shown(value)}, not a string")
    return value


def _missing(missing: list[tuple[int, str]], records: int) -> str:
    named = ", ".join(f"{shown(key)} (line {line})" for line, key in missing[:NAMED_MISSING])
    more = f" and {len(missing) - NAMED_MISSING:,} more" if len(missing) > NAMED_MISSING else ""
    slashes = "; names are written with /, not \\" if any("\\" in key for _, key in missing) else ""
    return f"{len(missing):,} of {records:,} listed files do not exist: {named}{more}{slashes}"


def _folder(data_root: str) -> Folder:
    where = "data.data_root"
    if not os.path.exists(data_root):
        fix = f"relative paths start at the working directory, {os.getcwd()}"
        raise UserError(f"the folder {data_root!r} does not exist", where, fix)
    if not os.path.isdir(data_root):
        raise UserError(f"{data_root!r} is a file", where, "name the folder that holds the pictures and metadata.jsonl")
    if not os.access(data_root, os.R_OK | os.X_OK):
        raise UserError(f"the folder {data_root!r} may not be read", where, "change its permissions")
    return Folder(data_root)
