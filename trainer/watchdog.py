"""A thread that hears that the other ranks are alive, and ends this process when one is not.

Collectives find out too, as long as the main thread comes to one. On a GPU it may not: once a rank is gone amid the
backward, the others' kernels wait for it, their queue of launches fills up, and the main thread stays in a call of the
driver that no error ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from torch.distributed.distributed_c10d import PrefixStore

BEAT_SECONDS = 2.0
GRACE_SECONDS = 5.0  # beyond the time-out: a main thread that is not stuck has more to tell


class Watchdog:
    """Beats in `store`, under the rank's number, and calls `lost`, once and from its thread, with ranks that do not.

    A rank is lost after `timeout_seconds` and GRACE_SECONDS without a beat, or with the store itself. Every rank has
    made its Watchdog before any starts to watch.
    """

    def __init__(self, store: PrefixStore, rank: int, world_size: int, timeout_seconds: float):
        self.store, self.rank = store, rank
        self.others = [other for other in range(world_size) if other != rank]
        self.patience_seconds = timeout_seconds + GRACE_SECONDS
        self._ended = threading.Event()
        self.store.set(str(rank), "0")

    def watch(self, lost: Callable[[list[int]], None]) -> None:
        """Begin, and go on until `end`."""
        threading.Thread(target=self._watch, args=(lost,), name="watchdog", daemon=True).start()

    def end(self) -> None:
        """Watch no more: this rank has come to its end, or tells of one itself."""
        self._ended.set()

    def _watch(self, lost: Callable[[list[int]], None]) -> None:
        beats: dict[int, bytes] = {}
        heard = dict.fromkeys(self.others, time.monotonic())
        count = 0
        while not self._ended.wait(BEAT_SECONDS):
            count += 1
            for other, beat in zip(self.others, self._exchange(count), strict=False):
                if beat != beats.get(other):
                    beats[other], heard[other] = beat, time.monotonic()
            silent = [other for other in self.others if time.monotonic() - heard[other] > self.patience_seconds]
            if silent and not self._ended.is_set():
                lost(silent)
                return

    def _exchange(self, count: int) -> list[bytes]:
        """The newest beat of each other rank; none if the store is gone, with the machine that had it."""
        try:
            self.store.set(str(self.rank), str(count))
            return self.store.multi_get([str(other) for other in self.others])
        except (RuntimeError, OSError):
            return []
