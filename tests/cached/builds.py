"""Builds that the tests start: entries whose tensors follow from their index, and ranks that are threads."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.cached.build import CHUNK, Wanted, build
from trainer.cached.store import Store

RECIPE = {"vae": "0" * 64, "transform": 1}
SHAPE, WIDE = (2, 4, 4, 4), (2, 4, 2, 8)
SHARD_BYTES = 64 * (128 * 2 + 24)  # two chunks of either shape in fp16
LIMITS = {"shard_bytes": SHARD_BYTES, "shards": 4}
COUNT = 500  # six shards of one shape and three of the other, the last ones not full
SHARD = 2 * CHUNK


def make_store(folder: Path, dtype: str = "fp16", **recipe: Any) -> Store:
    return Store(folder, "moments", {**RECIPE, **recipe}, dtype)


def key(index: int, version: int = 0) -> bytes:
    return hashlib.sha256(f"{index} {version}".encode()).digest()[:16]


def entries(count: int, changed: Iterable[int] = ()) -> list[Wanted]:
    """Of two shapes in turn; another version of those that changed."""
    changed = set(changed)
    return [
        Wanted(
            key(index, int(index in changed)), WIDE if index % 3 == 0 else SHAPE, index + 10_000 * (index in changed)
        )
        for index in range(count)
    ]


def answer(entry: Wanted) -> torch.Tensor:
    return torch.randn(entry.shape, generator=torch.Generator().manual_seed(entry.index))


class Encoder:
    """Notes each entry in a file, which a kill does not undo, and calls `before` with the number of the chunk."""

    def __init__(self, log: Path, before: Callable[[int], None] = lambda chunk: None):
        self.log, self.before = log, before

    def __call__(self, chunks: Iterable[list[Wanted]]) -> Iterator[torch.Tensor]:
        for number, chunk in enumerate(chunks):
            self.before(number)
            with open(self.log, "a") as file:
                file.write("".join(f"{entry.index}\n" for entry in chunk))
            yield torch.stack([answer(entry) for entry in chunk])

    def noted(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []


class Alone:
    """The only rank."""

    rank, world_size, local_world_size, is_main = 0, 1, 1, True

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def from_main(self, action: Callable[[], Any]) -> Any:
        return action()

    def gather(self, item: Any) -> list[Any]:
        return [item]


class Threads:
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, slots: list[Any], said: list[str]):
        self.local_world_size = world_size
        self.rank, self.world_size, self._barrier, self._slots, self.said = rank, world_size, barrier, slots, said

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
        if self.is_main:
            self.said.append(line)

    def gather(self, item: Any) -> list[Any]:
        self._slots[self.rank] = item
        self._barrier.wait(30)
        every = list(self._slots)
        self._barrier.wait(30)
        return every

    def from_main(self, action: Callable[[], Any]) -> Any:
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = action(), None
            except Exception as error:  # noqa: BLE001 - handed on to every rank
                outcome = None, error
        value, error = self.gather(outcome)[0]
        if error is not None:
            raise error
        return value


def build_on(world_size: int, store: Store, wanted: list[Wanted], encoder: Any, **options: Any) -> list[Any]:
    """What `build` returned or raised on each rank."""
    barrier, said = threading.Barrier(world_size), []
    slots: list[Any] = [None] * world_size
    ends: list[Any] = [None] * world_size

    def one(rank: int) -> None:
        ranks = Threads(rank, world_size, barrier, slots, said)
        given = wanted if rank == 0 else iter(())
        try:
            ends[rank] = build(store, given, encoder, ranks, **{**LIMITS, **options})
        except Exception as error:  # noqa: BLE001 - the test looks at it
            ends[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ends


def build_alone(
    store: Store, wanted: list[Wanted], encoder: Any, ranks: Alone | None = None, **options: Any
) -> tuple[int, list[str]]:
    """How many were encoded, and what was said."""
    ranks = ranks or Alone()
    return build(store, wanted, encoder, ranks, **{**LIMITS, **options}), ranks.said


def in_a_process(target: Callable[[], Any]) -> Any:
    """A started process of its own that runs `target`."""
    process = multiprocessing.get_context("fork").Process(target=target, daemon=True)
    process.start()
    return process


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def files(store: Store) -> dict[str, bytes]:
    """All that is in the folder, but for the lock and the lookups of runs."""
    return {path.name: path.read_bytes() for path in store.folder.iterdir() if path.is_file() and path.name != "lock"}


def shards(store: Store) -> list[Path]:
    return sorted(store.folder.glob("shard-*"))


def flip(path: Path, at: int) -> None:
    """Change one bit of a file, as a disk may."""
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)
