"""Which record each slot reads, computed from the seed alone: there is no data-loader state to save."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from trainer.data.record import Records
from trainer.errors import UserError
from trainer.rng import Permutation


class BatchPlan:
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

    def _permutation(self, epoch: int) -> Permutation:
        current = self._current
        if current is None or current[0] != epoch:
            current = self._current = epoch, Permutation(len(self.indices), self.seed, "order", epoch)
        return current[1]


def split(records: Records, validation_fraction: float) -> tuple[Sequence[int], Sequence[int]]:
    """The indices of the training records and of the held-out ones, each ascending, 4 bytes an index or fewer.

    A record is held out by a hash of its key alone: not by the seed, its place or its neighbours, so that it stays
    held out when records come or go. The number held out is therefore near the fraction, not equal to it.
    """
    if validation_fraction == 0:
        return range(len(records)), range(0)
    training, held_out = array("I"), array("I")
    for index in range(len(records)):
        (held_out if _unit_hash(records[index].key) < validation_fraction else training).append(index)
    if not training:
        raise UserError(
            f"all {len(records):,} records are held out and none is left to train on",
            "data.validation_fraction",
            "lower it or add records",
        )
    return training, held_out


def _unit_hash(key: str) -> float:
    """A number in [0, 1) that stays the same for a key on every machine and in every version."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, person=b"held out")
    return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53
