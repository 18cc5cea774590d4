from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trainer.data.folder import BadNameError, Folder, leads_out, relative_name
from trainer.data.image_file import REPLACE
from trainer.data.index import Index, IndexedRecords, IndexedSource, Row, indexed, no_columns, usable
from trainer.data.looks import look_at_each
from trainer.data.metadata import Problems, shown
from trainer.data.record import Look, silent
from trainer.data.stored import Stored, Wanted, find
from trainer.errors import UserError

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch, Schema, Table

ROWS_AT_ONCE = 256  # their pictures' offsets are checked together


class HuggingFace(IndexedSource):
    """A data set of Hugging Face `datasets`: saved by `save_to_disk`, in parquet files, or on the hub as parquet."""

    kind = "hf"

    dataset: str = Field(
        min_length=1,
        description="A folder written by `save_to_disk`, a parquet file, a folder or glob of them, or the name of a "
        "data set on the hub. What exists as a path is read as one.",
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        description="Branch, tag or commit on the hub; null means `main`. The manifest says which commit it was.",
    )
    split: str = Field(default="train", min_length=1, description="Which split of the data set is read.")
    config_name: str | None = Field(
        default=None, min_length=1, description="Which configuration, if the data set on the hub has several."
    )
    image_column: str = Field(
        default="image",
        min_length=1,
        description="Column of the pictures: `datasets.Image`, or the bytes of files.",
    )
    caption_column: str = Field(
        default="text", min_length=1, description="Column of the caption: a string or a list of strings to draw from."
    )
    key_column: str | None = Field(
        default=None,
        min_length=1,
        description="Column that names each record, without two alike; null means the name of the picture's file, "
        "or the row's number if it has none.",
    )

    def open(self) -> HuggingFaceRecords:
        stored = find(Wanted(self.dataset, self.split, self.revision, self.config_name))
        identity = [self.kind, stored.identity, self.image_column, self.caption_column, self.key_column]
        known = stored.identity is not None
        index = indexed({"rows": identity} if known else None, _row_columns, lambda: self._rows(stored))
        named = {"files": [identity, stored.arrow]} if known else None
        files = indexed(named, no_columns, lambda: map(_file, stored.arrow))
        if not len(index):
            raise UserError("the data set has no row", self.dataset, "see data.split")
        return HuggingFaceRecords(self, index, files, stored)

    def _rows(self, stored: Stored) -> Iterator[Row]:
        """One row a row; raises UserError with every problem of the data set, once all of it is read."""
        problems, seen = Problems(self.dataset), dict[str, int]()
        table = _mapped(stored.arrow, self.dataset)
        self._check(table.schema)
        before = 0
        for batch in table.select(list(self._columns())).to_batches(max_chunksize=ROWS_AT_ONCE):
            _validate(batch, self.dataset)
            captions, keys = batch.column(self.caption_column).to_pylist(), self._keys(batch, before)
            for number, (text, key, path) in enumerate(zip(captions, keys, self._paths(batch), strict=True), before):
                if path is not None and (wrong := _not_beside(path, stored.folder)):
                    problems.add(number, f"the row holds no picture but a path, and {shown(path)} is {wrong}")
                first = seen.setdefault(key, number)
                if first != number and self.key_column is not None:
                    problems.add(number, f"key {shown(key)} is in row {first} already")
                elif first != number:
                    key = _unlike(key, seen, number)
                if not key:
                    problems.add(number, f"column {self.key_column!r} is empty")
                texts = [] if text is None else [text] if isinstance(text, str) else [each or "" for each in text]
                kept, fault = usable(texts)
                told = f"{self.dataset}: row {number}, {shown(key)}: {fault}" if fault else None
                yield {"key": key, "captions": kept, "caption_fault": told, "file": path and os.path.normpath(path)}
            before += len(batch)
        problems.raise_any(
            "mend the data set; the numbers are its rows, from 0. `save_to_disk` stores pictures in the rows"
        )

    def _columns(self) -> dict[str, str]:
        """The columns that are read, and the config key that names each."""
        named = {self.image_column: "image_column", self.caption_column: "caption_column"}
        return named | ({self.key_column: "key_column"} if self.key_column is not None else {})

    def _check(self, schema: Schema) -> None:
        """Raise UserError for a column that is missing or holds something else."""
        import pyarrow.types as types

        for column, key in self._columns().items():
            if schema.names.count(column) != 1:
                raise self._no_column(column, key, schema.names)
        kind = schema.field(self.image_column).type
        if not (_is_image(kind) or types.is_binary(kind) or types.is_large_binary(kind)):
            what = f"column {self.image_column!r} holds {kind}, not pictures"
            raise UserError(what, self.dataset, "pictures are `datasets.Image` or the bytes of picture files")
        kind = schema.field(self.caption_column).type
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            what = f"column {self.caption_column!r} holds {kind}, not text"
            raise UserError(what, self.dataset, "captions are strings or lists of strings: set data.caption_column")
        if self.key_column is not None:
            kind = schema.field(self.key_column).type
            if not (types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)):
                what = f"column {self.key_column!r} holds {kind}, not names"
                raise UserError(what, self.dataset, "keys are strings or integers: set data.key_column")

    def _no_column(self, column: str, key: str, there: Sequence[str]) -> UserError:
        others = [name for name in there if name not in self._columns()]
        near = difflib.get_close_matches(column, others, 1, 0.5) or (others if len(others) == 1 else [])
        what = f"no column {column!r}; there are {', '.join(map(shown, there))}"
        return UserError(what, self.dataset, f"set data.{key}={near[0]}?" if near else f"set data.{key}")

    def _keys(self, batch: RecordBatch, number: int) -> list[str]:
        if self.key_column is not None:
            return ["" if value is None else str(value) for value in batch.column(self.key_column).to_pylist()]
        column = batch.column(self.image_column)
        if not _is_image(column.type):
            return [str(number + at) for at in range(len(batch))]
        paths = column.field("path").to_pylist()
        return [_name(path) if path else str(number + at) for at, path in enumerate(paths)]

    def _paths(self, batch: RecordBatch) -> list[str | None]:
        """Of each row, the path of the picture if the row itself does not hold it."""
        column = batch.column(self.image_column)
        if not _is_image(column.type):
            return [None] * len(batch)
        held = column.field("bytes").is_valid().to_pylist()
        paths = column.field("path").to_pylist()
        return [None if there else path for there, path in zip(held, paths, strict=True)]


class HuggingFaceRecords(IndexedRecords):
    """Rows of Arrow files, which each process maps into memory when it reads the first one."""

    def __init__(self, source: HuggingFace, index: Index, files: Index, stored: Stored):
        super().__init__(index, source.max_pixels)
        self.files, self.image_column, self.dataset = files, source.image_column, source.dataset
        self.identity, self.root, self.commit = stored.identity, stored.folder.root, stored.commit
        self._images: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}

    def where(self, index: int) -> str:
        return f"{self.dataset}: row {index}, {shown(self[index].key)}"

    def data(self, index: int) -> bytes:
        if self._images is None:
            paths = [path.as_py() for path in self.files.table["key"]]
            self._images = _mapped(paths, self.dataset).column(self.image_column)
        image = self._images[index]
        held = image["bytes"] if image.is_valid and _is_image(image.type) else image
        if held.is_valid:
            return held.as_py()
        file = self.index.table["file"][index].as_py()
        if file is None:
            raise UserError("the row holds no picture", self.where(index), "remove the row")
        path = os.path.join(self.root, file)
        if leads_out(self.root, path):  # it may have become a link since it was indexed
            what = "picture is a link that leaves the data set's folder"
            raise UserError(what, self.where(index), REPLACE)
        try:
            with open(path, "rb") as opened:
                return opened.read()
        except OSError as error:
            raise UserError(f"picture cannot be read: {error.strerror}", self.where(index), REPLACE) from error

    def looks(self, fresh: bool = False, say: Callable[[str], None] = silent) -> Iterator[Look]:
        import PIL

        def look() -> Iterator[Look]:
            return look_at_each(self.data, len(self), self.max_pixels, say)

        if fresh or self.identity is None or self.index.table["file"].null_count < len(self):
            return look()
        identity = {"looks": [self.identity, self.image_column, self.max_pixels, PIL.__version__]}
        seen = indexed(identity, _look_columns, lambda: ({"key": "", **each._asdict()} for each in look()))
        columns = seen.table.select(Look._fields)
        return (Look(**row) for batch in columns.to_batches() for row in batch.to_pylist())

    def provenance(self) -> dict[str, Any]:
        return {} if self.commit is None else {"revision": self.commit}


def _file(path: str) -> Row:
    return {"key": path, "captions": []}


def _mapped(paths: Sequence[str], where: str) -> Table:
    """The rows of Arrow files, in memory only where they are read."""
    import pyarrow as pa

    try:
        return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(path)).read_all() for path in paths])
    except (OSError, pa.ArrowException) as error:
        seen = " ".join(str(error).split())[:300]
        raise UserError(f"the data set cannot be read: {seen}", where, "save or download it again") from error


def _validate(batch: RecordBatch, where: str) -> None:
    """Raise UserError for damaged columns: lengths in a stranger's file must not lead out of it."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise UserError(f"the data set is damaged: {error}", where, "save or download it again") from error


def _is_image(kind: DataType) -> bool:
    import pyarrow.types as types

    return types.is_struct(kind) and {"bytes", "path"} <= {kind.field(at).name for at in range(kind.num_fields)}


def _name(path: str) -> str:
    """A key of the path that a row has for its picture: all of a relative one, the last part of an absolute one."""
    try:
        return relative_name(path)
    except BadNameError:
        return path.rstrip("/").rpartition("/")[2] or path


def _not_beside(path: str, folder: Folder) -> str | None:
    """Why a picture that a row names by its path is not read; None if it is a file of the data set's own folder."""
    try:
        found = folder.find(relative_name(path))
    except BadNameError:
        found = "outside"
    if found == "outside":
        return "outside of the data set's folder, where nothing is read"
    return {"missing": "not in the data set's folder", "not a file": "not a regular file"}.get(found)


def _unlike(key: str, seen: dict[str, int], number: int) -> str:
    """`key#2`, or the first after it that no row has: `datasets` keeps file names without their folders."""
    copy = 2
    while (named := f"{key}#{copy}") in seen:
        copy += 1
    seen[named] = number
    return named


def _row_columns() -> Schema:
    import pyarrow as pa

    return pa.schema([("file", pa.string())])


def _look_columns() -> Schema:
    import pyarrow as pa

    return pa.schema([("content", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("fault", pa.string())])
