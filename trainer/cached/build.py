"""Adds what is missing to a store, on all ranks: a cut that no rank, kill or restart can change.

What is missing is cut, in the caller's order and by shape, into shards of a size that depends on all that is wanted,
and each shard into chunks that are encoded together. Whatever a killed build left is whole shards, so the next one cuts
the rest as the first did: it writes the files that were still to come, byte for byte.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from trainer.cached.store import ABSENT, CRC_BYTES, DTYPES, KEY, KEY_BYTES, Store, unwritable
from trainer.cached.tensor_files import header, map_tensors, raw, write_parts
from trainer.errors import RunEnd, UserError
from trainer.files import temp_path

T = TypeVar("T")
Array = np.ndarray[Any, Any]

CHUNK = 32  # entries encoded together: always the same ones, so that no number of ranks can change a bit
SHARD_BYTES = 2**28
SHARDS = 64  # that even few entries are cut into, so that the ranks have about equal shares
MEET_CHUNKS = 8  # after so many the ranks meet: none waits longer than that for another, or learns later of its error
SAID_EVERY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """An entry that a run needs: `key` says all that it depends on beside the recipe; `index` is the caller's own."""

    key: bytes  # 16
    shape: tuple[int, ...]  # of its tensor
    index: int  # of 64 bits: what the caller finds its input by


Encode = Callable[[Iterable[list[Wanted]]], Iterator[torch.Tensor]]


class Ranks(Protocol):
    """What a build needs of the runtime."""

    rank: int
    world_size: int
    local_world_size: int

    @property
    def is_main(self) -> bool: ...
    def say(self, line: str) -> None: ...
    def from_main(self, action: Callable[[], T]) -> T: ...
    def gather(self, item: Any) -> list[Any]: ...


def build(
    store: Store,
    wanted: Iterable[Wanted],
    encode: Encode,
    ranks: Ranks,
    *,
    name: Callable[[Wanted], str] = str,
    setting: str = "cache.dtype",
    shard_bytes: int = SHARD_BYTES,
    shards: int = SHARDS,
) -> int:
    """How many entries were encoded, on all ranks together, until all that is `wanted` is in the store.

    Every rank calls it; `wanted` is read on rank 0 alone, once. `encode` gets this rank's chunks, each of entries of
    one shape, and gives for each, in order, [n, *shape] on the CPU. A shard has at most `shard_bytes`, and even few
    entries make about `shards`.

    Raises, on all ranks, the UserError or StorageFailed of any: of `encode`, of a disk too small, or of a value that
    the store's dtype cannot hold, for which `name` names the entry and `setting` the dtype's place.
    """
    with contextlib.ExitStack() as held:
        planned = ranks.from_main(lambda: _prepare(store, wanted, ranks, (shard_bytes, shards), held))
        if planned is None:
            return 0
        try:
            plan = Plan(planned)
        except OSError as error:
            fix = "with several machines, give a folder that all of them see"
            raise UserError(f"this machine does not see the cache of rank 0: {error.strerror}", planned, fix) from error
        total = plan.entries
        progress = _Progress(total, ranks)
        work = _share(store, plan, encode, ranks, name, setting, progress)
        held.callback(work.close)
        for _ in range(plan.meetings(ranks.world_size)):
            error = None
            try:
                for _ in itertools.islice(work, MEET_CHUNKS):
                    pass
            except RunEnd as end:
                error = end
            everyone = ranks.gather((progress.own, error))
            for failed in (end for _, end in everyone if end is not None):
                failed.of_one_rank = False  # all have it now
                raise failed
            progress.met(sum(done for done, _ in everyone))
        progress.end()
        return total


def _prepare(
    store: Store,
    wanted: Iterable[Wanted],
    ranks: Ranks,
    limits: tuple[int, int],
    held: contextlib.ExitStack,
) -> str | None:
    """Rank 0's part before the first chunk: the lock taken, and the path of the plan; None if nothing is missing."""
    store.create()
    keys, shape_of, indices, shapes = _distinct(wanted)
    missing = store.survey(ranks.say).find(keys) == ABSENT
    if not missing.any():
        store.sweep()  # a build may have been killed after its last shard
        ranks.say(f"cache  {len(keys):,} entries, all of them kept in {store.folder}")
        return None
    held.enter_context(store.locked(ranks.say))
    # Another run may have built some of it meanwhile, and what is damaged may be removed now.
    missing = store.survey(ranks.say, remove_damaged=True).find(keys) == ABSENT
    cut = list(_cut(shape_of, missing, shapes, DTYPES[store.dtype][1].itemsize, *limits))
    _forecast(store, cut, shapes, len(keys), ranks.say)
    if not cut:
        return None
    order = np.concatenate([rows for _, rows in cut])
    stops = np.cumsum([len(rows) for _, rows in cut])
    path = temp_path(store.folder / "plan")  # a name that the next build sweeps away, should this one be killed
    tensors = {
        "stops": stops.astype("<i8"),
        "shapes": np.array([shape for shape, _ in cut], "<i8"),
        "indices": indices[order],
        "keys": keys[order].view("u1").reshape(-1, KEY_BYTES),
    }
    types = {name: ("U8" if name == "keys" else "I64", values.shape) for name, values in tensors.items()}
    try:
        write_parts(path, [header({"shapes": json.dumps(shapes)}, types), *map(raw, tensors.values())])
    except OSError as error:
        raise unwritable(error, store.folder) from error
    held.callback(path.unlink, missing_ok=True)
    return str(path)


def _distinct(wanted: Iterable[Wanted]) -> tuple[Array, Array, Array, list[tuple[int, ...]]]:
    """Of the first entry of each key, in order: keys [n] S16, numbers of shapes [n], indices [n]; and the shapes."""
    keys, shape_of, indices, numbers = bytearray(), array("i"), array("q"), dict[tuple[int, ...], int]()
    for entry in wanted:
        assert len(entry.key) == KEY_BYTES, f"a key of {len(entry.key)} bytes"
        keys += entry.key
        shape_of.append(numbers.setdefault(tuple(entry.shape), len(numbers)))
        indices.append(entry.index)
    every = np.frombuffer(keys, KEY)
    first = np.sort(np.unique(every, return_index=True)[1])
    return every[first], np.array(shape_of, "i4")[first], np.array(indices, "<i8")[first], list(numbers)


def _cut(
    shape_of: Array,
    missing: Array,
    shapes: list[tuple[int, ...]],
    item_bytes: int,
    shard_bytes: int,
    shards: int,
) -> Iterator[tuple[int, Array]]:
    """The shards to write: the number of the shape, and which of the entries."""
    share = math.ceil(len(shape_of) / shards / CHUNK) * CHUNK
    for number, shape in enumerate(shapes):
        most = max(1, shard_bytes // (math.prod(shape) * item_bytes + KEY_BYTES + CRC_BYTES))
        size = min(share, most if most < CHUNK else most // CHUNK * CHUNK)
        rows = np.flatnonzero(missing & (shape_of == number))
        for start in range(0, len(rows), size):
            yield number, rows[start : start + size]


def _forecast(
    store: Store,
    cut: list[tuple[int, Array]],
    shapes: list[tuple[int, ...]],
    total: int,
    say: Callable[[str], None],
) -> None:
    """Say what is to come; raises UserError if it does not fit on the disk."""
    item_bytes = DTYPES[store.dtype][1].itemsize
    count = sum(len(rows) for _, rows in cut)
    size = sum(len(rows) * (math.prod(shapes[shape]) * item_bytes + KEY_BYTES + CRC_BYTES) + 512 for shape, rows in cut)
    free = shutil.disk_usage(store.folder).free
    say(
        f"cache  {total:,} entries = {total - count:,} kept + {count:,} to encode, in {len(cut)} shards of "
        f"{_readable(size)}; {_readable(free)} are free in {store.folder}"
    )
    if size > free:
        raise UserError(
            f"the cache needs {_readable(size)} more; {_readable(free)} are free",
            str(store.folder),
            "make room, or give another folder",
        )


class Plan:
    """What a build has to encode, in a file that all ranks map: none but rank 0 ever holds all keys."""

    def __init__(self, path: str | Path):
        mapped = map_tensors(path)
        self._keys, self._indices, stops, shapes = (
            mapped.tensors[name].array(dtype)
            for name, dtype in (("keys", "u1"), ("indices", "<i8"), ("stops", "<i8"), ("shapes", "<i8"))
        )
        self._stops = [0, *stops.tolist()]
        known = [tuple(shape) for shape in json.loads(mapped.metadata["shapes"])]
        self._shapes = [known[number] for number in shapes.tolist()]

    @property
    def entries(self) -> int:
        return self._stops[-1]

    def share(self, rank: int, world_size: int) -> range:
        """The shards that a rank writes."""
        return range(rank, len(self._shapes), world_size)

    def keys(self, shard: int) -> Array:
        """[n, 16] uint8."""
        return self._keys[self._stops[shard] : self._stops[shard + 1]]

    def shape(self, shard: int) -> tuple[int, ...]:
        return self._shapes[shard]

    def chunks(self, shard: int) -> Iterator[list[Wanted]]:
        """What is encoded together."""
        start, stop = self._stops[shard : shard + 2]
        for first in range(start, stop, CHUNK):
            yield [
                Wanted(self._keys[row].tobytes(), self._shapes[shard], int(self._indices[row]))
                for row in range(first, min(first + CHUNK, stop))
            ]

    def meetings(self, world_size: int) -> int:
        """How often the ranks meet: until the one with the most chunks is done."""
        sizes = np.diff(self._stops)
        most = max(
            sum(math.ceil(int(sizes[shard]) / CHUNK) for shard in self.share(rank, world_size))
            for rank in range(world_size)
        )
        return math.ceil(most / MEET_CHUNKS)


def _share(
    store: Store,
    plan: Plan,
    encode: Encode,
    ranks: Ranks,
    name: Callable[[Wanted], str],
    setting: str,
    progress: _Progress,
) -> Generator[None]:
    """Encodes and writes this rank's shards; yields after each chunk."""
    mine = plan.share(ranks.rank, ranks.world_size)
    if not mine:
        return
    answers = encode(chunk for shard in mine for chunk in plan.chunks(shard))
    with contextlib.ExitStack() as ended:
        if isinstance(answers, Generator):
            ended.callback(answers.close)  # now, not when the last traceback that knows it goes
        for shard in mine:
            keys, shape, done = plan.keys(shard), plan.shape(shard), 0
            payload = torch.empty((len(keys), *shape), dtype=DTYPES[store.dtype][1])
            for chunk in plan.chunks(shard):
                values = next(answers)
                assert values.shape == (len(chunk), *shape), f"{len(chunk)} entries {shape} gave {tuple(values.shape)}"
                rows = payload[done : done + len(chunk)]
                rows.copy_(values)
                if not torch.isfinite(rows).all():
                    _refuse(rows, values, chunk, store.dtype, name, setting)
                done += len(chunk)
                progress.add(len(chunk))
                if done == len(keys):
                    store.write_shard(keys, payload)
                yield


def _refuse(
    rows: torch.Tensor,
    values: torch.Tensor,
    chunk: list[Wanted],
    dtype: str,
    name: Callable[[Wanted], str],
    setting: str,
) -> None:
    """Raise the UserError for the first row that is not finite."""
    row = next(row for row in range(len(chunk)) if not torch.isfinite(rows[row]).all())
    if not torch.isfinite(values[row]).all():
        raise UserError(
            "the network gave a value that is not finite", name(chunk[row]), "look at this entry, or encode in fp32"
        )
    raise UserError(
        f"{values[row].abs().max():,.0f} is more than {dtype} can hold, in {name(chunk[row])}",
        setting,
        "set it to bf16 or fp32",
    )


class _Progress:
    """Lines for people, from rank 0."""

    def __init__(self, total: int, ranks: Ranks):
        self.own = 0  # entries of this rank
        self._total, self._ranks = total, ranks
        self._others = 0  # entries of the others, when they last met
        self._started = time.monotonic()
        self._next = self._started + SAID_EVERY_SECONDS

    def add(self, count: int) -> None:
        """So many more are encoded here."""
        self.own += count
        now = time.monotonic()
        if now < self._next or self.own + self._others == self._total:
            return
        self._next = now + SAID_EVERY_SECONDS
        done = self.own + self._others
        rate = done / (now - self._started)
        left = (self._total - done) / rate
        self._ranks.say(
            f"cache  {done:,} of {self._total:,} encoded, {rate:,.1f} a second; about {_duration(left)} to go"
        )

    def met(self, done: int) -> None:
        """All ranks together have encoded so many."""
        self._others = done - self.own

    def end(self) -> None:
        seconds = time.monotonic() - self._started
        rate = self._total / max(seconds, 1e-3)
        self._ranks.say(f"cache  {self._total:,} encoded in {_duration(seconds)}, {rate:,.1f} a second")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _readable(size: float) -> str:
    unit = min(3, int(math.log2(max(1, size))) // 10)
    return f"{size / 1024**unit:,.{1 if unit else 0}f} {('bytes', 'KiB', 'MiB', 'GiB')[unit]}"
