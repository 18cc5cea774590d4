"""How the slots of a step are dealt to ranks and micro batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """`global_batch` = `micro_batch` x `world_size` x `accumulation` images."""

    global_batch: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int

    def slots(self, step: int) -> Iterator[list[int]]:
        """This rank's micro batches of the 0-based `step`, one list of slots for each."""
        for turn in range(self.accumulation):
            start = step * self.global_batch + (turn * self.world_size + self.rank) * self.micro_batch
            yield list(range(start, start + self.micro_batch))


def deal(global_batch: int, micro_batch: int | None, rank: int, world_size: int) -> Topology:
    """The topology of one rank; raises ValueError, naming the nearest that fit, if the batch does not divide."""
    micro = micro_batch or max(1, global_batch // world_size)
    per_forward = micro * world_size
    if global_batch % per_forward:
        below = global_batch // per_forward * per_forward
        nearest = ", ".join(str(size) for size in (below, below + per_forward) if size)
        raise ValueError(
            f"batch of {global_batch} images does not divide into micro batches of {micro} on {world_size} "
            f"rank{'s' * (world_size > 1)} ({per_forward}); nearest that fit: {nearest}"
        )
    return Topology(global_batch, micro, global_batch // per_forward, rank, world_size)
