from __future__ import annotations

import difflib
import glob
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator, model_validator

from trainer.data.image_file import SUFFIXES
from trainer.data.index import Index, IndexedRecords, IndexedSource, Row, indexed, usable
from trainer.data.looks import ANNOUNCED_AFTER_SECONDS, SAID_EVERY_SECONDS, cache_folder, look_at, look_at_each
from trainer.data.metadata import shown
from trainer.data.record import Look, caption_fault, silent
from trainer.data.shards import Option, Shard, SourceError, Storage, check_options, check_url, locked, protocol
from trainer.data.tar_members import Member, members
from trainer.errors import UserError

if TYPE_CHECKING:
    from pyarrow import Schema

MOST_SHARDS = 1_000_000
MAX_CAPTION_BYTES = 1 << 20  # of a .txt or .json
MAX_PICTURE_BYTES = 1 << 30
PENDING = 32  # pictures of a shard that are decoded while it is read on
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)  # webdataset's rule: up to the first dot of the name
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zstd")


class WebDataset(IndexedSource):
    """Tar archives in webdataset's layout, here or in an object store: `a.png`, `a.txt` and `a.json` are one sample."""

    kind = "webdataset"

    shards: str | tuple[str, ...] = Field(
        description="Paths or URLs (s3://, gs://, https://) of the archives, one or several, in their order; "
        "`{000000..000123}` counts, and in local paths `*` stands for any name."
    )
    caption_column: str = Field(
        default="text",
        min_length=1,
        description="Where a sample's .json has this: the caption, a string or a list of strings to draw from. "
        "Otherwise the lines of its .txt are the captions.",
    )
    storage_options: dict[str, Option] = Field(
        default={},
        description="Options of fsspec's file system, such as `endpoint_url` or `anon`; secrets are refused, they are "
        "taken from the environment or the provider's own files.",
    )
    shard_cache_dir: str | None = Field(
        default=None, description="Where remote shards are kept; null means the user's cache folder."
    )
    shard_cache_bytes: int = Field(
        default=0,
        ge=0,
        description="How much of remote shards is kept on this machine at most; 0 reads each picture by its range.",
    )

    @field_validator("shards")
    @classmethod
    def _readable(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        patterns = [value] if isinstance(value, str) else value
        if not all(pattern.strip() for pattern in patterns) or not patterns:
            raise ValueError("no shard is named")
        for pattern in patterns:
            check_url(pattern)
            if pattern.lower().partition("?")[0].endswith(COMPRESSED):
                raise ValueError(
                    f"{pattern!r} is compressed: unpack it to .tar once, for a picture inside cannot be reached "
                    "without reading all before it"
                )
        return value

    @field_validator("storage_options")
    @classmethod
    def _without_secrets(cls, value: dict[str, Option]) -> dict[str, Option]:
        check_options(value)
        return value

    @model_validator(mode="after")
    def _a_folder_is_for_a_cache(self) -> Self:
        if self.shard_cache_dir is not None and not self.shard_cache_bytes:
            raise ValueError("shard_cache_dir needs a shard_cache_bytes above 0: no shard is kept")
        return self

    def open(self) -> WebDatasetRecords:
        urls = self._urls()
        if not any(map(protocol, urls)):
            for name in ("storage_options", "shard_cache_bytes"):
                if getattr(self, name):
                    raise UserError("no shard is remote", f"data.{name}", "leave it out")
        storage = Storage(self.storage_options, self.shard_cache_dir, self.shard_cache_bytes)
        with ThreadPoolExecutor(16) as pool:
            shards = list(pool.map(storage.look, urls))
        marks = [shard.mark for shard in shards]
        whole = None if None in marks else {"shards": marks, "read": self._reading()}
        index = indexed(whole, _columns, lambda: self._joined(shards, storage))
        names = indexed(whole and {"names": whole}, _shard_columns, lambda: map(_shard_row, shards))
        if not len(index):
            raise UserError(f"{len(urls):,} shards hold no picture", urls[0], "pictures are told by .jpg, .png, .webp")
        return WebDatasetRecords(index, names, storage, self.max_pixels)

    def _reading(self) -> list[Any]:
        """All that an index depends on, beside its shard."""
        import PIL

        return [self.kind, self.caption_column, self.max_pixels, PIL.__version__]

    def _urls(self) -> list[str]:
        patterns = [self.shards] if isinstance(self.shards, str) else list(self.shards)
        urls: list[str] = []
        for pattern in patterns:
            for url in expanded(pattern):
                if protocol(url) is None and glob.has_magic(url) and not os.path.exists(url):
                    found = sorted(glob.glob(url, recursive=True))
                    if not found:
                        fix = f"relative paths start at the working directory, {os.getcwd()}"
                        raise UserError(f"no file is called {url!r}", "data.shards", fix)
                    urls += found
                elif protocol(url) is not None and "*" in url:
                    fix = "count them with braces, such as {000000..000123}"
                    raise UserError(f"{url!r}: `*` is for local paths", "data.shards", fix)
                else:
                    urls.append(url)
        twice = next((url for url, before in zip(sorted(urls)[1:], sorted(urls), strict=False) if url == before), None)
        if twice is not None:
            raise UserError(f"the shard {twice!r} is named twice", "data.shards", "to repeat a source use kind: mix")
        return urls

    def _index_of(self, shard: Shard, storage: Storage, progress: _Progress) -> Index:
        """The index of one shard; of several processes of this machine, one reads it and the others wait."""
        identity = None if shard.mark is None else {"shard": shard.mark, "read": self._reading()}
        folder = cache_folder()
        with ExitStack() as stack:
            if identity is not None and folder is not None:
                name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:2]
                with suppress(OSError):  # in a home that cannot be written each process reads the shard itself
                    os.makedirs(os.path.join(folder, "indexes"), exist_ok=True)
                    stack.enter_context(locked(os.path.join(folder, "indexes", f"{name}.lock")))
            return indexed(identity, _columns, lambda: self._rows(shard, storage, progress))

    def _rows(self, shard: Shard, storage: Storage, progress: _Progress) -> Iterator[Row]:
        """A row a picture, in the order of the pictures, from one reading of the shard."""
        samples: dict[str, _Sample] = {}
        pending: deque[Future[Look]] = deque()
        with storage.stream(shard) as file, ThreadPoolExecutor(thread_name_prefix="look") as pool:
            for member in members(file, shard.url):
                progress.reached(shard, member.offset)
                match = SAMPLE.fullmatch(member.name)
                if match is None:
                    continue
                if caption_fault([member.name]):
                    raise UserError(f"the name {shown(member.name)} is not UTF-8", shard.url, "rename the file")
                stem, suffix = match[1], f".{match[2]}".lower()
                if suffix in SUFFIXES:
                    sample = samples.setdefault(stem, _Sample())
                    if sample.picture is not None:
                        what = f"{shown(sample.picture.name)} and {shown(member.name)} are pictures of one sample"
                        raise UserError(what, shard.url, "name the samples apart: up to the first dot")
                    sample.picture, sample.look = member, self._look(member, pool)
                    pending.append(sample.look)
                    while len(pending) > PENDING:
                        pending.popleft().result()
                elif suffix in (".txt", ".json"):
                    # Kept though its picture may be still to come: `tar cf` packs a folder in the order of its disk.
                    samples.setdefault(stem, _Sample()).texts[suffix] = _text(member)
            for sample in sorted((each for each in samples.values() if each.picture), key=lambda each: each.offset):
                yield self._row(sample)
        if storage.look(shard.url) != shard and shard.mark is not None:
            raise storage.changed(shard)

    def _look(self, member: Member, pool: ThreadPoolExecutor) -> Future[Look]:
        if member.size <= MAX_PICTURE_BYTES:
            return pool.submit(look_at, member.read(), self.max_pixels)
        digest = hashlib.sha256()
        for piece in member.chunks():
            digest.update(piece)
        fault = f"picture of {member.size:,} bytes is over the limit of {MAX_PICTURE_BYTES:,}"
        return pool.submit(Look, digest.hexdigest(), 0, 0, fault)

    def _row(self, sample: _Sample) -> Row:
        assert sample.picture is not None
        assert sample.look is not None
        captions, fault, absent = self._captions(sample.texts)
        look, key = sample.look.result(), sample.picture.name
        kept, unusable = usable(captions)
        return {
            "key": key,
            "captions": kept,
            "caption_fault": fault or unusable,
            "absent": absent,
            "offset": sample.picture.offset,
            "size": sample.picture.size,
            "content": look.content,
            "width": look.width,
            "height": look.height,
            "fault": look.fault,
        }

    def _captions(self, texts: dict[str, str | None]) -> tuple[list[str], str | None, bool]:
        """A sample's captions, what is wrong with them, and whether it is that its .json has no such column."""
        for suffix, text in texts.items():
            if text is None:
                return [], f"{suffix} is over {MAX_CAPTION_BYTES:,} bytes", False
        absent: str | None = None
        if (text := texts.get(".json")) is not None:
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                return [], f".json is not JSON: {error}", False
            if not isinstance(values, dict):
                return [], f".json holds {shown(values)} where an object is needed", False
            if (value := values.get(self.caption_column)) is not None:
                captions = value if isinstance(value, list) else [value]
                wrong = next((each for each in captions if not isinstance(each, str)), None)
                if wrong is not None:
                    return [], f"{self.caption_column!r} of .json is {shown(wrong)}, not a string", False
                return captions, None, False
            if self.caption_column not in values:
                absent = _absent(values, self.caption_column)
        if (text := texts.get(".txt")) is not None:
            return [line.strip() for line in text.splitlines() if line.strip()], None, False
        return [], absent, absent is not None

    def _joined(self, shards: Sequence[Shard], storage: Storage) -> Iterator[Row]:
        """The rows of all shards; raises UserError for a key that stands in two of them."""
        progress, first, absent = _Progress(shards), dict[str, int](), list[str]()
        for number, shard in enumerate(shards):
            part = self._index_of(shard, storage, progress)  # one at a time: there may be thousands
            for row in (row for batch in part.table.to_batches() for row in batch.to_pylist()):
                key, fault = row["key"], row["caption_fault"]
                if (before := first.setdefault(key, number)) != number:
                    both = f"{shown(key)} is in {shards[before].url!r} and in {shard.url!r}"
                    fix = "rename one of them, or name one shard less"
                    raise UserError(f"{both}: each name stands once", "data.shards", fix)
                if row["absent"]:
                    absent.append(fault)
                told = fault and f"{shard.url}: {shown(key)}: {fault}"
                yield row | {"shard": number, "caption_fault": told}
        if absent and len(absent) == len(first):  # not captions that are missing, but another column
            raise UserError(absent[0], shards[0].url, "name the column of the captions")


class WebDatasetRecords(IndexedRecords):
    """Pictures by the place of their bytes in a shard; each is compared with its hash when it is read."""

    def __init__(self, index: Index, shards: Index, storage: Storage, max_pixels: int):
        super().__init__(index, max_pixels)
        self.shards, self.storage = shards, storage

    def shard(self, index: int) -> Shard:
        """The shard that holds a record's picture."""
        row = self.index.table["shard"][index].as_py()
        table = self.shards.table
        mark = table["mark"][row].as_py()
        return Shard(table["key"][row].as_py(), table["size"][row].as_py(), None if mark is None else tuple(mark))

    def where(self, index: int) -> str:
        return f"{self.shard(index).url}: {self[index].key}"

    def data(self, index: int) -> bytes:
        data = self._stored(index)
        if hashlib.sha256(data).hexdigest() != self.index.table["content"][index].as_py():
            raise self.storage.changed(self.shard(index))
        return data

    def _stored(self, index: int) -> bytes:
        table = self.index.table
        return self.storage.read(self.shard(index), table["offset"][index].as_py(), table["size"][index].as_py())

    def looks(self, fresh: bool = False, say: Callable[[str], None] = silent) -> Iterator[Look]:
        if fresh:
            yield from self._fresh_looks(say)
            return
        for batch in self.index.table.select(["content", "width", "height", "fault"]).to_batches():
            yield from (Look(*row.values()) for row in batch.to_pylist())

    def _fresh_looks(self, say: Callable[[str], None]) -> Iterator[Look]:
        failed: list[SourceError] = []

        def stored(index: int) -> bytes:
            try:
                return self._stored(index)
            except SourceError as error:
                failed.append(error)
                raise

        for look in look_at_each(stored, len(self), self.max_pixels, say):
            if failed:  # which a look would take for a picture that cannot be read
                raise failed[0]
            yield look

    def provenance(self) -> dict[str, Any]:
        return {"shards": len(self.shards)}


@dataclass
class _Sample:
    """What a shard holds of one sample."""

    picture: Member | None = None
    look: Future[Look] | None = None
    texts: dict[str, str | None] = field(default_factory=dict)  # by suffix; None if it is too long to be read

    @property
    def offset(self) -> int:
        return self.picture.offset if self.picture else 0


class _Progress:
    """Lines for people, of shards that take over 2 s to index."""

    def __init__(self, shards: Sequence[Shard]):
        self.total = sum(shard.size for shard in shards)
        sums = itertools.accumulate((shard.size for shard in shards), initial=0)
        self.before = dict(zip((shard.url for shard in shards), sums, strict=False))
        self.said = time.monotonic() - SAID_EVERY_SECONDS + ANNOUNCED_AFTER_SECONDS

    def reached(self, shard: Shard, offset: int) -> None:
        """So far has the shard been read."""
        if time.monotonic() > self.said + SAID_EVERY_SECONDS:
            self.said = time.monotonic()
            read = (self.before[shard.url] + offset) / 1e9
            line = f"data   indexing shards, {read:.1f} of {self.total / 1e9:.1f} GB; the next start does without"
            print(line, file=sys.stderr, flush=True)


def expanded(pattern: str) -> Iterator[str]:
    """Every name that `{first..last}` in a pattern counts through, in order; raises UserError if there are too many."""
    parts = RANGE.split(pattern)
    choices: list[range] = []
    widths: list[int] = []
    count = 1
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        if int(first) > int(last):
            raise UserError(f"{{{first}..{last}}} counts down", "data.shards", f"write {{{last}..{first}}}")
        choices.append(range(int(first), int(last) + 1))
        widths.append(len(first))
        count *= int(last) - int(first) + 1
    if count > MOST_SHARDS:
        raise UserError(f"{pattern!r} names {count:,} shards", "data.shards", f"at most {MOST_SHARDS:,} are read")

    def names(at: int, head: str) -> Iterator[str]:
        if at == len(choices):
            yield head
            return
        for number in choices[at]:
            yield from names(at + 1, f"{head}{number:0{widths[at]}d}{parts[3 * at + 3]}")

    return names(0, parts[0])


def _text(member: Member) -> str | None:
    if member.size > MAX_CAPTION_BYTES:
        return None
    return member.read().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _absent(values: dict[str, Any], column: str) -> str:
    near = difflib.get_close_matches(column, values, 1, 0.5) or (list(values) if len(values) == 1 else [])
    there = ", ".join(map(shown, list(values)[:10])) or "no column"
    hint = f"set data.caption_column={near[0]}?" if near else "set data.caption_column"
    return f"no column {column!r}; .json has {there}: {hint}"


def _columns() -> Schema:
    import pyarrow as pa

    numbers = [("shard", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())]
    looks = [("content", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("fault", pa.string())]
    return pa.schema([*numbers, *looks, ("absent", pa.bool_())])


def _shard_columns() -> Schema:
    import pyarrow as pa

    return pa.schema([("size", pa.int64()), ("mark", pa.list_(pa.string()))])


def _shard_row(shard: Shard) -> Row:
    return {"key": shard.url, "captions": [], "size": shard.size, "mark": shard.mark and list(shard.mark)}
