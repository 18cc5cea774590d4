from __future__ import annotations

import array
import bisect
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from trainer.data.index import IndexedRecords
from trainer.data.metadata import shown
from trainer.data.record import Look, Record, Records, Source, silent
from trainer.errors import UserError
from trainer.registry import Section

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_REPEATS = 1000  # of a record in one epoch
COPY = re.compile(r".*#([2-9]|[1-9]\d{1,3})", re.DOTALL)  # how a record is called that is read again


class MixedSource(Section):
    """One source of a mix."""

    source: dict[str, Any] = Field(
        description="What section `data` would be for this source alone, without the keys that all kinds have."
    )
    name: str | None = Field(
        default=None, min_length=1, description="Stands before the source's keys, as `name/key`; null changes no key."
    )
    repeats: int | None = Field(
        default=None,
        ge=1,
        le=MOST_REPEATS,
        description="How often an epoch reads each of its records; null is 1.",
    )
    weight: float | None = Field(
        default=None, gt=0, description="This source's part of the samples, relative to the other sources' weights."
    )

    @field_validator("source")
    @classmethod
    def _of_a_kind(cls, value: dict[str, Any]) -> dict[str, Any]:
        """The section in full; raises ValidationError with the path of each fault."""
        if outside := [key for key in value if key in Source.model_fields]:
            raise ValueError(f"{', '.join(outside)}: set once, for all sources, in section `data` itself")
        parsed = Source.parse(value | {"image_size": 64})  # stands for the mix's own, which is not known here
        return {key: item for key, item in parsed.model_dump(mode="json").items() if key not in Source.model_fields}


class Mix(Source):
    """Several sources as one: each read so many times an epoch, or each for its part of the samples."""

    kind = "mix"

    sources: tuple[MixedSource, ...] = Field(
        min_length=1,
        description="The sources, each a `source` (its own section, with a kind) and, if need be, `name`, and either "
        "`repeats` (reads of a record per epoch) or, on all of them, `weight` (part of the samples).",
    )

    @model_validator(mode="after")
    def _by_repeats_or_by_weight(self) -> Self:
        weighted = [each.weight is not None for each in self.sources]
        if any(weighted) and (not all(weighted) or any(each.repeats is not None for each in self.sources)):
            raise ValueError("give every source a weight and none a repeats, or none a weight")
        named = [each.name for each in self.sources if each.name is not None]
        if len(set(named)) < len(named):
            raise ValueError("two sources have the same name")
        return self

    @classmethod
    def model_json_schema(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        """The schema with that of a source in place, because it is itself put inside another one."""
        schema = super().model_json_schema(*arguments, **options)
        schema["properties"]["sources"]["items"] = schema.pop("$defs")["MixedSource"]
        return schema

    def open(self) -> MixRecords:
        shared = {"image_size": self.image_size, "on_bad": self.on_bad}
        opened = [Source.parse(each.source | shared).open() for each in self.sources]
        reads = self._reads([len(records) for records in opened])
        parts = [
            Mixed(records, each.name, f"sources[{number}] ({each.source['kind']})", count)
            for number, (records, each, count) in enumerate(zip(opened, self.sources, reads, strict=True))
        ]
        _refuse_keys_that_meet(parts)
        return MixRecords(parts)

    def _reads(self, lengths: Sequence[int]) -> list[int]:
        """How many samples of each source an epoch has; every record of every source is among them."""
        weights = [Fraction(str(each.weight)) for each in self.sources if each.weight is not None]
        if not weights:
            return [length * (each.repeats or 1) for length, each in zip(lengths, self.sources, strict=True)]
        scale = max(length / weight for length, weight in zip(lengths, weights, strict=True))
        reads = [max(length, round(weight * scale)) for length, weight in zip(lengths, weights, strict=True)]
        for number, (length, count) in enumerate(zip(lengths, reads, strict=True)):
            if count > MOST_REPEATS * length:
                what = f"its {length:,} records would be read {count / length:,.0f} times in an epoch of {sum(reads):,}"
                raise UserError(what, f"data.sources[{number}].weight", f"lower it, to at most {MOST_REPEATS:,} times")
        return reads


class Mixed(NamedTuple):
    """An opened source of a mix, and how many samples of an epoch are its."""

    records: Records
    name: str | None
    label: str  # what a message calls it
    reads: int

    def place(self, at: int) -> tuple[int, int]:
        """Which record sample `at` of this source is, and how many samples before it are the same one.

        The record's samples stand side by side: record i has floor((i+1) r / n) - floor(i r / n) of them, of n records
        and r reads, so that no two counts differ by more than one and no table is kept.
        """
        length = len(self.records)
        index = ((at + 1) * length - 1) // self.reads
        return index, at - index * self.reads // length

    def copies(self, index: int) -> range:
        """Which samples of this source are its record `index`."""
        length = len(self.records)
        return range(index * self.reads // length, (index + 1) * self.reads // length)

    def key(self, key: str, copy: int = 0) -> str:
        """What a record of this source is called in the mix; `copy` counts its samples from 0."""
        named = key if self.name is None else f"{self.name}/{key}"
        return f"{named}#{copy + 1}" if copy else named


class MixRecords(Records):
    """The samples of an epoch, source after source; a record that is read again is listed again, as `key#2`."""

    def __init__(self, parts: Sequence[Mixed]):
        self.parts = list(parts)
        self.ends = list(itertools.accumulate(part.reads for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def _place(self, index: int) -> tuple[Mixed, int, int]:
        """The source of a sample, which of its records it is, and how many samples before it are the same one."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self.ends, index)
        part = self.parts[number]
        return part, *part.place(index - (self.ends[number] - part.reads))

    def __getitem__(self, index: int) -> Record:
        part, inner, copy = self._place(index)
        record = part.records[inner]
        return Record(part.key(record.key, copy), record.captions)

    def held_out_by(self, index: int) -> str:
        part, inner, _ = self._place(index)
        return part.key(part.records.held_out_by(inner))

    def image(self, index: int) -> Image:
        part, inner, _ = self._place(index)
        return part.records.image(inner)

    def data(self, index: int) -> bytes | None:
        part, inner, _ = self._place(index)
        return part.records.data(inner)

    def where(self, index: int) -> str:
        part, inner, _ = self._place(index)
        return part.records.where(inner)

    def caption_faults(self) -> Iterator[tuple[int, str]]:
        for part, end in zip(self.parts, self.ends, strict=True):
            for index, fault in part.records.caption_faults():
                yield from ((end - part.reads + at, fault) for at in part.copies(index))

    def looks(self, fresh: bool = False, say: Callable[[str], None] = silent) -> Iterator[Look]:
        for part in self.parts:
            for index, look in enumerate(part.records.looks(fresh, say)):
                yield from itertools.repeat(look, len(part.copies(index)))

    def provenance(self) -> dict[str, Any]:
        facts = [
            {"name": part.name, "records": len(part.records), "reads_per_epoch": part.reads} for part in self.parts
        ]
        return {"sources": [fact | part.records.provenance() for fact, part in zip(facts, self.parts, strict=True)]}

    def notes(self) -> list[str]:
        """Each source's part of an epoch, and what the sources themselves say."""
        lines = []
        for part in self.parts:
            length = len(part.records)
            times = part.reads / length
            few = f"{math.floor(times)} or {math.ceil(times)}" if part.reads % length else f"{times:g}"
            share = f"{part.reads / len(self):.4%} of an epoch of {len(self):,}"
            lines.append(f"data   {part.name or part.label}: {length:,} records x {few} = {part.reads:,}, {share}")
            lines += part.records.notes()
        return lines


def _refuse_keys_that_meet(parts: Sequence[Mixed]) -> None:
    """Raise UserError, naming both sources, if two samples would have one key."""
    repeated = [part for part in parts if part.reads > len(part.records)]
    if len(parts) == 1 and not repeated:
        return
    import numpy as np

    hashes = array.array("Q")  # 8 bytes a key, so that many millions fit
    like_copies: dict[str, str] = {}  # keys such as `a#2`, each with its source
    for part in parts:
        for key in map(part.key, _keys(part.records)):
            hashes.append(_hash(key))
            if COPY.fullmatch(key):
                like_copies[key] = part.label
    found = np.sort(np.frombuffer(hashes, np.uint64))
    met = set(found[1:][found[1:] == found[:-1]].tolist())
    first: dict[str, str] = {}
    for part in parts if met else ():
        for key in map(part.key, _keys(part.records)):
            if _hash(key) in met and (before := first.setdefault(key, part.label)) != part.label:
                what = f"{before} and {part.label} both have a record {shown(key)}"
                raise UserError(what, "data.sources", "give one of them a name, which then stands before its keys")
    taken: dict[str, list[str]] = {}
    for key in like_copies:
        taken.setdefault(key.rpartition("#")[0], []).append(key)
    for part in repeated if taken else ():
        copies = math.ceil(part.reads / len(part.records))
        for key in map(part.key, _keys(part.records)):
            for other in taken.get(key, ()):
                if int(other.rpartition("#")[2]) <= copies:
                    what = (
                        f"{like_copies[other]} has a record {shown(other)}, which is what {part.label} calls a repeat"
                    )
                    raise UserError(f"{what} of {shown(key)}", "data.sources", "rename it, or name one of the sources")


def _keys(records: Records) -> Iterator[str]:
    if isinstance(records, IndexedRecords):
        for batch in records.index.table.select(["key"]).to_batches():
            yield from batch.column(0).to_pylist()
    else:
        yield from (records[index].key for index in range(len(records)))


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
