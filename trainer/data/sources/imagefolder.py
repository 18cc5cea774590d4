from __future__ import annotations

import difflib
import json
import os
import shlex
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trainer.data.content_hashes import file_hashes
from trainer.data.folder import Folder, Found, relative_name
from trainer.data.image_file import MAX_PIXELS, SUFFIXES, read_image
from trainer.data.metadata import Problems, rows, shown
from trainer.data.record import Record, Records, Source, silent
from trainer.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Captions = str | tuple[str, ...]
NAMED_MISSING = 5
NOT_READ: dict[Found, str] = {"outside": "is a link that leaves data_root", "not a file": "is not a regular file"}


class ImageFolder(Source):
    """A folder of pictures with a `metadata.jsonl` or `metadata.csv` beside them, one line a picture."""

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
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=2 * MAX_PIXELS,
        description="Pictures with more pixels are refused before decoding.",
    )

    def open(self) -> ImageFolderRecords:
        folder = _folder(self.data_root)
        metadata = self._metadata(folder)
        problems = Problems(metadata)
        keys: list[str] = []
        captions: list[Captions] = []
        first_line: dict[str, int] = {}
        missing: list[tuple[int, str]] = []
        for line, row in rows(metadata, problems):
            try:
                key = relative_name(self._text(row, self.image_column, "image_column"))
                caption = self._captions(row)
            except ValueError as error:
                problems.add(line, str(error))
                continue
            if key in first_line:
                problems.add(line, f"{shown(key)} is listed on line {first_line[key]} already")
                continue
            first_line[key] = line
            found = folder.find(key)
            if found == "missing":
                missing.append((line, key))
            elif found != "file":
                problems.add(line, f"{shown(key)} {NOT_READ[found]}")
            keys.append(key)
            captions.append(caption)
        if missing:
            problems.add(missing[0][0], _missing(missing, len(keys)))
        problems.raise_any("mend the metadata; no picture was read yet")
        if not keys:
            raise UserError("the metadata lists no picture", metadata, self._example())
        return ImageFolderRecords(folder.root, keys, captions, self.max_pixels)

    def _metadata(self, folder: Folder) -> str:
        """The path of the one metadata file."""
        there = [name for name in ("metadata.jsonl", "metadata.csv") if folder.find(name) != "missing"]
        if len(there) == 2:
            raise UserError("there are both metadata.jsonl and metadata.csv", self.data_root, "keep one of them")
        if not there:
            full = os.listdir(folder.root)
            seen = "no metadata.jsonl or metadata.csv in the folder" if full else "the folder is empty"
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

    def _captions(self, row: dict[str, Any]) -> Captions:
        value = row.get(self.caption_column)
        if not isinstance(value, list):
            return self._text(row, self.caption_column, "caption_column")
        if not value:
            raise ValueError(f"column {self.caption_column!r} is an empty list; it needs one caption at least")
        return tuple(_string(item, f"an item of column {self.caption_column!r}") for item in value)

    def _text(self, row: dict[str, Any], column: str, key: str) -> str:
        if column not in row:
            others = [name for name in row if name not in (self.image_column, self.caption_column)]
            near = others if len(others) == 1 else difflib.get_close_matches(column, others, 1, 0.5)
            hint = f"set data.{key}={near[0]}?" if near else f"set data.{key}"
            there = ", ".join(map(shown, list(row)[:10])) or "no column"
            raise ValueError(f"no column {column!r}; the line has {there}: {hint}")
        return _string(row[column], f"column {column!r}")


class ImageFolderRecords(Records):
    """Names and captions, in the order of the metadata; pictures are opened when asked for."""

    def __init__(self, root: str, keys: list[str], captions: list[Captions], max_pixels: int):
        self._root, self._keys, self._captions, self._max_pixels = root, keys, captions, max_pixels
        self.empty_captions = sum(any(not text.strip() for text in _tuple(item)) for item in captions)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Record:
        return Record(self._keys[index], _tuple(self._captions[index]))

    def image(self, index: int) -> Image:
        return read_image(os.path.join(self._root, self._keys[index]), self._max_pixels)

    def contents(self, fresh: bool = False, say: Callable[[str], None] = silent) -> Iterator[str]:
        return file_hashes((os.path.join(self._root, key) for key in self._keys), len(self), fresh, say)


def _tuple(captions: Captions) -> tuple[str, ...]:
    return (captions,) if isinstance(captions, str) else captions


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {shown(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair: {shown(value)}") from None
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
