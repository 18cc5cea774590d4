"""What becomes of each record of a source: trained on, held out, or left out, and why. Settled once, at the start."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from trainer.data.buckets import HELD_OUT, LEFT_OUT, OUT_OF_SCALE, Bucket, assign
from trainer.data.plan import BatchPlan, BucketPlan, Members, Plan
from trainer.errors import UserError

if TYPE_CHECKING:
    from numpy import ndarray

    from trainer.data.record import Records, Source

TRAINED = 0  # the code of what is trained on, if there are no buckets
MOST_TOLD = 1000  # faults that one message lists


class LeftOut(NamedTuple):
    """A record that is not trained on."""

    record: int  # its index
    reason: str  # names the record, where that is not the same as its key


@dataclass(frozen=True)
class Roll:
    """One byte a record: the bucket it is trained in, or that it is held out or left out."""

    records: int
    codes: ndarray | None = None  # uint8 [records]; None if every record is trained on and there are no buckets
    buckets: tuple[Bucket, ...] = ()
    unreadable: int = 0  # of those left out, the pictures that cannot be read
    members: Members | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", None if self.codes is None else Members(self.codes))

    @property
    def training(self) -> Sequence[int]:
        """The indices of the records that are trained on, ascending, if there are no buckets."""
        assert not self.buckets, "a plan with buckets deals its records by bucket"
        return range(self.records) if self.members is None else self.members.of(TRAINED)

    @property
    def held_out(self) -> Sequence[int]:
        """The indices of the held-out records, ascending."""
        return range(0) if self.members is None else self.members.of(HELD_OUT)

    @property
    def trained(self) -> int:
        """How many records are trained on."""
        if self.members is None:
            return self.records
        return sum(len(self.members.of(code)) for code in (range(len(self.buckets)) if self.buckets else (TRAINED,)))

    def count(self, code: int) -> int:
        """How many records have this code."""
        return 0 if self.members is None else len(self.members.of(code))

    def only(self, records: Iterable[int]) -> Roll:
        """The same with every other record left out."""
        import numpy as np

        kept = np.zeros(self.records, bool)
        kept[list(records)] = True
        codes = np.full(self.records, TRAINED, np.uint8) if self.codes is None else self.codes
        return Roll(self.records, np.where(kept, codes, np.uint8(LEFT_OUT)), self.buckets, self.unreadable)

    def plan(self, source: Source, global_batch: int, seed: int) -> Plan:
        """Which record each slot reads; raises UserError if no bucket fills a batch and what remains is dropped."""
        if self.members is None or not self.buckets:
            return BatchPlan(self.training, seed)
        return BucketPlan(self.members, self.buckets, global_batch, seed, source.bucket_remainder)


class RollCall(NamedTuple):
    """The roll, and what there is to say of it."""

    roll: Roll
    left_out: list[LeftOut]  # ascending
    without_caption: int  # records that train the unconditional model for want of a caption


def call_roll(source: Source, records: Records, sizes: ndarray | None, bad: Sequence[LeftOut]) -> RollCall:
    """Settle what becomes of every record.

    `sizes` [N, 2] are the pictures' widths and heights, needed where there are buckets; `bad` are the pictures that
    cannot be read. Raises UserError with every record that a policy of `source` does not leave out, or if too many
    are left out, or if nothing is left to train on.
    """
    unreadable = {record for record, _ in bad}
    captions = [LeftOut(index, fault) for index, fault in records.caption_faults() if index not in unreadable]
    refused = [*(bad if source.on_bad == "error" else ()), *(captions if source.on_missing_caption == "error" else ())]
    if refused:
        raise _refusal(source, records, refused, len(bad) if source.on_bad == "error" else 0)
    if len(bad) > source.max_bad_fraction * len(records):
        raise UserError(
            f"{len(bad):,} of {len(records):,} pictures cannot be read, more than data.max_bad_fraction = "
            f"{source.max_bad_fraction:g} of them: {_listed(bad)}",
            "data.max_bad_fraction",
            "mend them or raise it",
        )
    left_out = [*bad, *(captions if source.on_missing_caption == "skip" else ())]
    buckets = source.buckets()
    without_caption = 0
    if source.on_missing_caption == "empty":  # of several captions, those that can be used are
        without_caption = sum(not any(map(str.strip, records[record].captions)) for record, _ in captions)
    if not left_out and not buckets and source.validation_fraction == 0:
        return RollCall(Roll(len(records)), [], without_caption)
    import numpy as np

    if buckets:
        assert sizes is not None, "buckets need the sizes of the pictures"
        known = np.maximum(sizes, 1)  # a picture that cannot be read has none, and no bucket
        codes = assign(known[:, 0], known[:, 1], buckets, source.bucket_max_upscale, source.bucket_max_downscale)
    else:
        codes = np.full(len(records), TRAINED, np.uint8)
    for index, _ in left_out:
        codes[index] = LEFT_OUT
    if source.validation_fraction:
        for index in range(len(records)):
            if codes[index] != LEFT_OUT and _unit_hash(records.held_out_by(index)) < source.validation_fraction:
                codes[index] = HELD_OUT
    roll = Roll(len(records), codes, buckets, len(bad))
    if not roll.trained:
        raise _nothing_left(source, roll)
    out_of_scale = roll.members.of(OUT_OF_SCALE) if roll.members and buckets else ()
    for index in out_of_scale:
        assert sizes is not None, "buckets need the sizes of the pictures"
        width, height = sizes[index]
        told = f"{records.where(index)}: {width} x {height} pixels is beyond the scale limits of every bucket"
        left_out.append(LeftOut(index, told))
    return RollCall(roll, sorted(left_out), without_caption)


def _refusal(source: Source, records: Records, refused: Sequence[LeftOut], bad: int) -> UserError:
    captions = len(refused) - bad
    fixes = []
    if bad:
        fixes.append("mend or remove the pictures, or leave them out: data.on_bad=skip")
    if captions:
        fixes.append("write the captions, or data.on_missing_caption=empty or =skip")
    counts = [f"{bad:,} pictures cannot be read"] * bool(bad) + [f"{captions:,} have no caption"] * bool(captions)
    return UserError(f"of {len(records):,} records {' and '.join(counts)}: {_listed(refused)}", None, "; ".join(fixes))


def _listed(left_out: Sequence[LeftOut]) -> str:
    told = [reason for _, reason in left_out[:MOST_TOLD]]
    if len(left_out) > len(told):
        told.append(f"and {len(left_out) - len(told):,} more; `difftrain audit` lists them all")
    return "\n  ".join(["", *told])


def _nothing_left(source: Source, roll: Roll) -> UserError:
    kinds = {"held out": HELD_OUT, "left out": LEFT_OUT, "beyond the scale limits": OUT_OF_SCALE}
    counts = " and ".join(f"{roll.count(code):,} {name}" for name, code in kinds.items() if roll.count(code))
    where = "data.validation_fraction" if roll.count(HELD_OUT) else "data"
    return UserError(f"of {roll.records:,} records {counts}: none is left to train on", where, "add records")


def _unit_hash(key: str) -> float:
    """A number in [0, 1) that stays the same for a key on every machine and in every version.

    Held out by a hash of its key alone, a record stays so when others come or go; the fraction is met nearly.
    """
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, person=b"held out")
    return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53
