"""Which record each slot reads, computed from the seed alone: there is no data-loader state to save."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from trainer.data.buckets import HELD_OUT, LEFT_OUT, OUT_OF_SCALE, Bucket
from trainer.errors import UserError
from trainer.rng import Permutation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Plan(ABC):
    """What each slot of a run reads. A function of the slot alone: what it keeps, it keeps to be quick."""

    @abstractmethod
    def record(self, slot: int) -> int:
        """The index of the record that this slot reads."""

    @abstractmethod
    def substitute(self, slot: int, draw: float) -> int:
        """The index of a record that may stand in for this slot's, chosen by `draw` in [0, 1)."""

    def bucket(self, slot: int) -> Bucket | None:
        """The size of this slot's crop, one for the whole global batch; None where a run has but one, its source's."""
        return None


class BatchPlan(Plan):
    """The order of the records: every epoch reads each of `indices` once, in an order computed from (seed, epoch).

    Batches run on from one epoch into the next, so nothing is dropped. A plan pickles as its indices and a few numbers.
    """

    def __init__(self, indices: Sequence[int], seed: int, shuffle: bool = True):
        assert len(indices) > 0, "a plan over no records"
        self.indices, self.seed, self.shuffle = indices, seed, shuffle
        self._current: tuple[int, Permutation] | None = None  # a few numbers, kept to build it once an epoch

    def record(self, slot: int) -> int:
        """The index of the record that this slot reads."""
        epoch, position = divmod(slot, len(self.indices))
        return self.indices[self._permutation(epoch)[position] if self.shuffle else position]

    def substitute(self, slot: int, draw: float) -> int:
        """Any of the records."""
        return self.indices[int(draw * len(self.indices))]

    def _permutation(self, epoch: int) -> Permutation:
        current = self._current
        if current is None or current[0] != epoch:
            current = self._current = epoch, Permutation(len(self.indices), self.seed, "order", epoch)
        return current[1]


class Members:
    """The records of each code in `codes` [N] uint8, found in constant time and without a list of them.

    Beside the codes, one byte a record and perhaps memory-mapped, it holds 4 bytes for every code in use and BLOCK
    records: how many of the code come before (rank and select; Jacobson 1989, "Space-efficient static trees and
    graphs"). It pickles as the codes and these; of a whole memory-mapped file as the file's name.
    """

    BLOCK = 4096  # a memory page of codes is what one look-up reads

    def __init__(self, codes: NDArray[np.uint8]):
        import numpy as np

        assert codes.dtype == np.uint8, f"codes of {codes.dtype}"
        assert codes.ndim == 1, f"codes of shape {codes.shape}"
        self.codes = codes
        starts = range(0, len(codes), self.BLOCK)
        counts = np.empty((len(starts), 256), np.uint16)
        for row, start in enumerate(starts):
            counts[row] = np.bincount(codes[start : start + self.BLOCK], minlength=256)
        self._before: dict[int, NDArray[Any]] = {}  # by code: members before each block, and of all blocks
        for code in map(int, np.flatnonzero(counts.any(axis=0))):
            before = np.zeros(len(starts) + 1, np.uint32 if len(codes) < 2**32 else np.uint64)
            np.cumsum(counts[:, code], out=before[1:], dtype=before.dtype)
            self._before[code] = before

    def __len__(self) -> int:
        """How many records there are, of all codes."""
        return len(self.codes)

    def count(self, code: int) -> int:
        """How many records have this code."""
        return int(self._before[code][-1]) if code in self._before else 0

    def member(self, code: int, number: int) -> int:
        """The index of the `number`-th record, from 0, with this code."""
        import numpy as np

        assert 0 <= number < self.count(code), f"member {number} of {self.count(code)} with code {code}"
        before = self._before[code]
        # As a scalar of the array's own type: with another type numpy would convert the whole array at every call.
        block = int(before.searchsorted(before.dtype.type(number), side="right")) - 1
        start = block * self.BLOCK
        places = np.equal(self.codes[start : start + self.BLOCK], code).nonzero()[0]
        return start + int(places[number - int(before[block])])

    def of(self, code: int) -> Sequence[int]:
        """The indices of the records with this code, ascending, as a sequence that stores none of them."""
        return _MembersOf(self, code)

    def __getstate__(self) -> dict[str, Any]:
        import numpy as np

        state = self.__dict__.copy()
        if isinstance(self.codes, np.memmap) and isinstance(self.codes.base, mmap.mmap):  # a view's offset is not known
            state["codes"] = _MappedCodes(str(self.codes.filename), self.codes.offset, len(self.codes))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        import numpy as np

        if isinstance(mapped := state["codes"], _MappedCodes):
            state["codes"] = np.memmap(mapped.file, np.uint8, mode="r", offset=mapped.offset, shape=(mapped.length,))
        self.__dict__.update(state)


class _MappedCodes(NamedTuple):
    file: str
    offset: int
    length: int


class _MembersOf(Sequence[int]):
    def __init__(self, members: Members, code: int):
        self.members, self.code = members, code

    def __len__(self) -> int:
        return self.members.count(self.code)

    @overload
    def __getitem__(self, number: int) -> int: ...
    @overload
    def __getitem__(self, number: slice) -> list[int]: ...
    def __getitem__(self, number: int | slice) -> int | list[int]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        return self.members.member(self.code, range(len(self))[number])

    def __iter__(self) -> Iterator[int]:
        """All of them: block by block, some fifty times quicker than one by one."""
        import numpy as np

        codes, size = self.members.codes, self.members.BLOCK
        for start in range(0, len(codes), size):
            yield from (np.flatnonzero(codes[start : start + size] == self.code) + start).tolist()


class BucketRow(NamedTuple):
    """What the first epoch makes of the records of one bucket."""

    bucket: Bucket
    records: int
    batches: int
    repeats: int  # reads beyond the first of a record
    dropped: int  # records that are not read


class BucketPlan(Plan):
    """The order of the records where every global batch is of one bucket; `members` has buckets by place in `buckets`.

    Each bucket has an endless stream of positions, an epoch of it in an order computed from (seed, its size, epoch).
    With `remainder` "run_on" a bucket of n records has had ceil(e * n / global_batch) batches after e epochs: every
    record was read e times at least, nothing is dropped, and over the whole run no more than global_batch - 1 positions
    are ahead of that, since what was read ahead is not read again later. With "drop" it has floor(n / global_batch)
    batches in every epoch, and what the order of that epoch has at its end is not read in it.

    The buckets' batches of an epoch come in an order computed from (seed, epoch). The start of an epoch costs a few
    operations for each bucket, however many records there are; an epoch may be without a batch if one batch is several.
    """

    def __init__(
        self,
        members: Members,
        buckets: Sequence[Bucket],
        global_batch: int,
        seed: int,
        remainder: Literal["run_on", "drop"] = "run_on",
    ):
        assert len(set(buckets)) == len(buckets), "a bucket stands twice"
        self.global_batch, self.seed, self.remainder = global_batch, seed, remainder
        # By size, so that a plan depends on what the buckets are and not on how they are numbered.
        self._streams = [
            BucketStream(members, code, bucket, global_batch, seed, remainder == "drop")
            for code, bucket in sorted(enumerate(buckets), key=lambda item: item[1])
            if members.count(code)
        ]
        self._reads = sum(stream.length for stream in self._streams)  # an epoch, but for what is read ahead
        if not self._streams:
            without = {HELD_OUT: "held out", LEFT_OUT: "left out", OUT_OF_SCALE: "too small or too large"}
            causes = [f"{members.count(code):,} {why}" for code, why in without.items() if members.count(code)]
            raise UserError(f"no record is in any bucket: {', '.join(causes) or 'there is none'}", "data")
        if not self._reads:
            fullest = max(self._streams, key=lambda stream: stream.records)
            raise UserError(
                f"no bucket fills a batch of {global_batch:,} images: {fullest.bucket} has the most records, "
                f"{fullest.records:,}, and records that fill no whole batch are to be dropped",
                "train.global_batch_size",
                f"{fullest.records:,} or less; or data.bucket_remainder=run_on, or fewer buckets",
            )
        self._current = self._epoch_of(0)
        self._read: tuple[int, BucketStream, int] | None = None  # the last step asked for, its stream and its batch

    def record(self, slot: int) -> int:
        """The index of the record that this slot reads."""
        step, place = divmod(slot, self.global_batch)
        stream, batch = self._batch(step)
        return stream.record(batch * self.global_batch + place)

    def substitute(self, slot: int, draw: float) -> int:
        """Any of the records of the same bucket."""
        stream, _ = self._batch(slot // self.global_batch)
        return stream.members.member(stream.code, int(draw * stream.records))

    def bucket(self, slot: int) -> Bucket:
        """The size of this slot's crop, one for the whole global batch."""
        return self._batch(slot // self.global_batch)[0].bucket

    def epoch(self, step: int) -> int:
        """The epoch that this step is in."""
        current = self._current
        if not current.first_step <= step < current.first_step + current.steps:
            current = self._current = self._epoch_of(step)
        return current.epoch

    def steps(self, epoch: int) -> int:
        """How many batches this epoch has."""
        return self._first_step(epoch + 1) - self._first_step(epoch)

    def dropped(self, epoch: int) -> Iterator[int]:
        """The indices of the records with a bucket that this epoch does not read, by bucket; none where it runs on."""
        for stream in self._streams:
            for place in range(stream.length, stream.records):
                yield stream.at(epoch, place)

    def repeated(self, epoch: int) -> Iterator[tuple[int, int]]:
        """Of each record that this epoch reads more than once its index and how often, by bucket."""
        for stream in self._streams:
            yield from stream.repeated(epoch)

    def table(self) -> list[BucketRow]:
        """A row for each bucket that has records, by size."""
        rows = []
        for stream in self._streams:
            batches, left = stream.batches(1), stream.records - stream.length
            repeats = batches * self.global_batch - stream.length
            rows.append(BucketRow(stream.bucket, stream.records, batches, repeats, left))
        return rows

    def _batch(self, step: int) -> tuple[BucketStream, int]:
        """The bucket that this step reads and which batch of its stream."""
        if self._read is None or self._read[0] != step:
            self.epoch(step)
            epoch, first_step, _, order, ends = self._current
            number = order[step - first_step]
            place = bisect_right(ends, number)
            stream = self._streams[place]
            batch = stream.batches(epoch) + number - (ends[place - 1] if place else 0)
            self._read = step, stream, batch
        return self._read[1:]

    def _first_step(self, epoch: int) -> int:
        return sum(stream.batches(epoch) for stream in self._streams)

    def _epoch_of(self, step: int) -> _Epoch:
        # An epoch never starts before its share of the reads, so this one is no later than:
        latest = step * self.global_batch // self._reads
        epoch = bisect_right(range(latest + 1), step, key=self._first_step) - 1
        first_step, steps = self._first_step(epoch), self.steps(epoch)
        ends = list(accumulate(stream.batches(epoch + 1) - stream.batches(epoch) for stream in self._streams))
        return _Epoch(epoch, first_step, steps, Permutation(steps, self.seed, "batch order", epoch), ends)


class _Epoch(NamedTuple):
    epoch: int
    first_step: int
    steps: int
    order: Permutation  # from a step of the epoch to a batch of it, the batches numbered bucket by bucket
    ends: list[int]  # by bucket: the first batch that is no longer its


class BucketStream:
    """The endless stream of one bucket's records, an epoch of them after the other, cut into global batches."""

    def __init__(self, members: Members, code: int, bucket: Bucket, global_batch: int, seed: int, drop: bool):
        self.members, self.code, self.bucket, self.global_batch, self.seed = members, code, bucket, global_batch, seed
        self.records = members.count(code)
        self.length = self.records - drop * (self.records % global_batch)  # positions of an epoch
        self._current: tuple[int, Permutation] | None = None  # a few numbers, kept to build it once an epoch

    def batches(self, epochs: int) -> int:
        """How many batches this bucket has had after so many epochs."""
        return -(-epochs * self.length // self.global_batch)

    def record(self, position: int) -> int:
        """The index of the record at this position of the stream."""
        return self.at(*divmod(position, self.length))

    def at(self, epoch: int, place: int) -> int:
        """The index of the record at this place of the bucket's order in an epoch."""
        current = self._current
        if current is None or current[0] != epoch:
            # Named by the size: a bucket that is added gets another number to its neighbours, but no other order.
            order = Permutation(self.records, self.seed, f"bucket order {self.bucket}", epoch)
            current = self._current = epoch, order
        return self.members.member(self.code, current[1][place])

    def repeated(self, epoch: int) -> Iterator[tuple[int, int]]:
        """Of each record that this epoch's batches read more than once its index and how often."""
        if not self.length:
            return
        # Up to a position in the stream's epoch k every record is read k times, and those before it once more.
        (first, start), (last, end) = (
            divmod(self.batches(each) * self.global_batch, self.length) for each in (epoch, epoch + 1)
        )
        if last == first:
            return
        before = {self.at(first, place) for place in range(start)}
        after = {self.at(last, place) for place in range(end)}
        for record in sorted(after) if last == first + 1 else self.members.of(self.code):
            reads = last - first + (record in after) - (record in before)
            if reads > 1:
                yield record, reads
