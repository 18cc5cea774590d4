"""The index of a source: one row a record, in an Arrow file that all processes of a machine map into memory.

Opening it costs the same for ten records as for ten million, a process holds none of it, and loader workers share its
pages. It lies in the user's cache folder under a name made from all that it depends on, so that a stale one is never
found. A record's row is its key, its captions, and what its source needs to find the picture again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import tempfile
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trainer.data.image_file import MAX_PIXELS, decode
from trainer.data.looks import RACY_NS, cache_folder
from trainer.data.record import Record, Records, Source, caption_fault

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

INDEX_FORMAT = 2
ROWS_AT_ONCE = 16_384
UNUSED_SECONDS = 90 * 24 * 3600  # an index that nobody opened for so long is removed

Row = Mapping[str, Any]


class Index:
    """An Arrow table in a memory-mapped file: the path pickles, the mapping does not."""

    def __init__(self, path: str):
        self.path = path
        self.table = _mapped(path)

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        self.__init__(path)

    def __len__(self) -> int:
        return self.table.num_rows


def indexed(identity: Mapping[str, Any] | None, columns: Callable[[], pa.Schema], rows: Callable[[], Iterable[Row]]):
    """The index that `rows` gives, or the one that an earlier start built for an equal `identity`.

    `identity` is all that the rows depend on, as JSON; None if that cannot be known, and the index lasts as long as
    the process. `rows` gives each row with `key`, `captions` and the further `columns`. Raises what `rows` raises.
    """
    folder = cache_folder() if identity is not None else None
    if folder is None:
        return _temporary(columns(), rows())
    name = hashlib.sha256(json.dumps([INDEX_FORMAT, identity], sort_keys=True).encode()).hexdigest()[:32]
    path = os.path.join(folder, "indexes", f"{name}.arrow")
    with contextlib.suppress(OSError, ValueError):  # none yet, or one that cannot be read: it is built anew
        index = Index(path)
        os.utime(path)
        return index
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _remove_unused(os.path.dirname(path))
        temp = f"{path}.{os.getpid()}.tmp"
        try:
            _write(temp, columns(), _apart(rows()))
            os.replace(temp, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temp)
    except _RowsFailed as failed:
        raise failed.error from None
    except OSError:  # a home that is full or cannot be written costs the memory, not the run
        return _temporary(columns(), rows())
    return Index(path)


class _RowsFailed(Exception):
    def __init__(self, error: OSError):
        self.error = error


def _apart(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows, whose own errors are told from those of writing them."""
    try:
        yield from rows
    except OSError as error:
        raise _RowsFailed(error) from error


def usable(captions: Sequence[str]) -> tuple[list[str], str | None]:
    """Those of a record's captions that can be trained on, and what is wrong with it, None if all can."""
    faults = [caption_fault([caption]) for caption in captions]
    kept = [caption for caption, fault in zip(captions, faults, strict=True) if fault is None]
    first = next((fault for fault in faults if fault), None)
    if first is None or len(captions) == 1:
        return kept, caption_fault(captions)
    return kept, f"{len(captions) - len(kept)} of its {len(captions)} captions cannot be used: {first}"


def no_columns() -> pa.Schema:
    """What a row has beside its key and captions, if that is nothing."""
    import pyarrow as pa

    return pa.schema([])


def file_identity(path: str) -> list[Any] | None:
    """What tells that a file is as it was, None for one so young that it could change and look the same."""
    there = os.stat(path)
    if there.st_mtime_ns > time.time_ns() - RACY_NS:
        return None
    return [os.path.realpath(path), there.st_size, there.st_mtime_ns, there.st_ino]


def _temporary(columns: pa.Schema, rows: Iterable[Row]) -> Index:
    handle, path = tempfile.mkstemp(prefix="difftrain-index-", suffix=".arrow")
    os.close(handle)
    try:
        _write(path, columns, rows)
        index = Index(path)
    except BaseException:
        os.unlink(path)
        raise
    weakref.finalize(index, _forget, path, os.getpid())
    return index


def _forget(path: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked worker leaves the file to its parent
        with contextlib.suppress(OSError):
            os.unlink(path)


def _write(path: str, columns: pa.Schema, rows: Iterable[Row]) -> None:
    import pyarrow as pa

    own = [("key", pa.string()), ("captions", pa.list_(pa.string())), ("caption_fault", pa.string())]
    schema = pa.schema([*own, *columns])
    rows = iter(rows)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while block := list(itertools.islice(rows, ROWS_AT_ONCE)):
            arrays = [pa.array([row.get(field.name) for row in block], field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _mapped(path: str) -> pa.Table:
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(path)).read_all()


def _remove_unused(folder: str) -> None:
    now = time.time()
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            if now - os.stat(path).st_mtime > UNUSED_SECONDS:
                os.unlink(path)


class IndexedSource(Source):
    """A source of pictures that are stored somewhere as files are."""

    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=2 * MAX_PIXELS,
        description="Pictures with more pixels are refused before decoding.",
    )


class IndexedRecords(Records):
    """Records whose rows are in an index and whose pictures are stored somewhere as files are."""

    def __init__(self, index: Index, max_pixels: int):
        self.index, self.max_pixels = index, max_pixels

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Record:
        table = self.index.table
        captions = table["captions"][index].as_py()
        return Record(table["key"][index].as_py(), tuple(captions) or ("",))

    def caption_faults(self) -> Iterator[tuple[int, str]]:
        import pyarrow.compute as pc

        faults = self.index.table["caption_fault"]
        for index in pc.indices_nonzero(pc.is_valid(faults)):  # pyright: ignore[reportAttributeAccessIssue]
            yield index.as_py(), faults[index.as_py()].as_py()

    @abstractmethod
    def data(self, index: int) -> bytes: ...

    def image(self, index: int) -> Image:
        return decode(io.BytesIO(self.data(index)), self.where(index), self.max_pixels)
