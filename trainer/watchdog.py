"""A thread that hears that the other ranks are alive, and says when one is not and the main thread has not noticed.

Collectives find out too, as long as the main thread comes to one. On a GPU it may not: once a rank is gone amid the
backward, the others' kernels wait for it, their queue of launches fills up, and the main thread stays in a call of the
driver that no error ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from torch.distributed.distributed_c10d import PrefixStore

BEAT_SECONDS = 2.0
GRACE_SECONDS = 5.0  # for a main thread that is not stuck: it has more to tell
GONE = "gone"  # the key under which a rank that fails says so


class Watchdog:
    """Beats in `store`, under the rank's number, and listens to the others. Made on every rank before any watches."""

    def __init__(self, store: PrefixStore, rank: int, world_size: int, timeout_seconds: float):
        self.store, self.rank, self.timeout_seconds = store, rank, timeout_seconds
        self.others = [other for other in range(world_size) if other != rank]
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.store.set(str(rank), "0")

    def watch(self, steps: Callable[[], int], lost: Callable[[Sequence[int]], None]) -> None:
        """Begin, and go on until `end`: call `lost`, once and from a thread, with the ranks that are lost.

        A rank is lost if it has been silent for the time-out and GRACE_SECONDS, or has said that it failed. Nothing
        is called while the main thread still moves: `steps` gives the steps it has done, and has to stand still for as
        long (for 2 GRACE_SECONDS after a failure), plus the time of the longest step so far.
        """
        self._thread = threading.Thread(target=self._watch, args=(steps, lost), name="watchdog", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Watch no more: this rank has come to its end, or tells of one itself."""
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * BEAT_SECONDS)  # else it could be in the store as the interpreter goes

    def _watch(self, steps: Callable[[], int], lost: Callable[[Sequence[int]], None]) -> None:
        beats: dict[int, bytes] = {}
        heard = dict.fromkeys(self.others, time.monotonic())
        done, moved, longest, count = steps(), time.monotonic(), 0.0, 0
        while not self._ended.wait(BEAT_SECONDS):
            count += 1
            newest, gone = self._exchange(count)
            now = time.monotonic()
            if steps() != done:
                longest = max(longest, now - moved) if done else longest  # a first one compiles
                done, moved = steps(), now
            for other, beat in newest.items():
                if beat != beats.get(other):
                    beats[other], heard[other] = beat, now
            silent = [other for other in self.others if now - heard[other] > self.timeout_seconds + GRACE_SECONDS]
            stuck = now - moved - longest
            if (gone and stuck > 2 * GRACE_SECONDS) or (silent and stuck > self.timeout_seconds + GRACE_SECONDS):
                if not self._ended.is_set():
                    lost(gone or silent)
                return

    def _exchange(self, count: int) -> tuple[dict[int, bytes], list[int]]:
        """The newest beat of each other rank, and a rank that said that it is gone.

        Nothing if the store is gone, with the machine or the launcher that had it: all are silent then.
        """
        try:
            self.store.set(str(self.rank), str(count))
            beats = self.store.multi_get([str(other) for other in self.others])
            gone = [int(self.store.get(GONE))] if self.store.check([GONE]) else []
        except (RuntimeError, OSError):
            return {}, []
        return dict(zip(self.others, beats, strict=True)), gone

    def say_gone(self) -> None:
        """Let the others know that this rank has failed, and why stands in the store."""
        self.store.set(GONE, str(self.rank))
