"""Everything random, computed from (seed, stream, slot).

A *slot* is the 0-based index of a training sample since the run began: `step * global_batch_size + position`. A
*stream* is the name of one use of randomness ("noise", "flip", ...), so that adding a new use never shifts another.
Nothing here reads or writes global generator state, knows a rank, or depends on the order of calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def draw_seed(seed: int, stream: str, slot: int) -> int:
    """A 64-bit integer, uniform over [0, 2**64), by a keyed hash: equal on every machine and in every version."""
    message = b"%d\0%s\0%d" % (seed, stream.encode(), slot)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")


def uniform(seed: int, stream: str, slot: int) -> float:
    """A float64 in [0, 1) with 53 random bits."""
    return (draw_seed(seed, stream, slot) >> 11) * 2.0**-53


def randint(seed: int, stream: str, slot: int, n: int) -> int:
    """An integer in [0, n); its bias is below n / 2**53."""
    return int(uniform(seed, stream, slot) * n)


def normal(seed: int, stream: str, slots: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, [B, *shape] float32 on the CPU; row i depends on slots[i] alone."""
    import torch

    out = torch.empty((len(slots), *shape))
    generator = torch.Generator()
    for row, slot in zip(out, slots, strict=True):
        generator.manual_seed(draw_seed(seed, stream, slot))
        torch.randn(shape, generator=generator, out=row)
    return out


class Permutation:
    """A pseudo-random permutation of range(n), computed one index at a time in constant memory.

    A balanced Feistel network over the smallest even number of bits that holds n, walked until the result falls below
    n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", the cycle-walking cipher): on average under
    four walks, no table, and the start of an epoch costs the same for ten records as for a billion.
    """

    ROUNDS = 6

    def __init__(self, n: int, seed: int, stream: str, epoch: int):
        assert n > 0, f"a permutation of {n} records"
        self.n = n
        self.half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self.keys = [draw_seed(seed, f"{stream}/round{round}", epoch) for round in range(self.ROUNDS)]

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self.n, f"index {index} of {self.n}"
        value = self._encrypt(index)
        while value >= self.n:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        mask = (1 << self.half_bits) - 1
        left, right = value >> self.half_bits, value & mask
        for key in self.keys:
            left, right = right, left ^ (_mix64(right ^ key) & mask)
        return left << self.half_bits | right


def _mix64(z: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)
