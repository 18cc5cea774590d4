"""Which rank is at fault when a collective fails: what each rank leaves in the launcher's key-value store.

A rank that fails writes down why before it goes. One that only finds the others gone writes that it is still there, and
looks: at the first rank that wrote down why, else at those that wrote nothing, which were killed or have stopped.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from trainer.errors import RunEnd
from trainer.failure import as_status
from trainer.watchdog import Watchdog

BEAT_SECONDS = 2.0  # between two signs of life of a rank 0 that works while the others wait
# Of plain RuntimeErrors: gloo's begin with the place in its source, save the one of a second collective that was under
# way (a gradient's, in the backward) when a first one timed out.
WORDS_OF_A_LOST_RANK = ("gloo/transport", "Application timeout caused pair closure", "NCCL")
WAIT_SECONDS = 3.0  # for what the others have to say: they notice a lost rank within moments of each other


class PeerFailed(RunEnd):
    """Another rank ended this run, in the way that `exit_code` and `state` say."""

    def __init__(self, text: str, exit_code: int = 1, state: str = "failed"):
        self.exit_code, self.state = exit_code, state
        super().__init__(text)


class LostContactError(RuntimeError):
    """Another rank does not answer."""


class Peers:
    """The ranks of this run, as far as they have something to say."""

    def __init__(self, rank: int, world_size: int, timeout_seconds: float):
        store: Any = _get_default_store()
        self.store, self.rank, self.world_size = PrefixStore("difftrain", store), rank, world_size
        # By a connection of its own: a request that waits would hold up the others of its connection.
        alive = PrefixStore("difftrain/alive", store.clone())
        self._watchdog = Watchdog(alive, rank, world_size, timeout_seconds)
        self._told = False
        self._jobs = 0  # of rank 0 alone, counted alike on all ranks

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """On rank 0: within it, the others hear that work goes on; `wait_for_main` is their side of it."""
        job, ended = self._next_job(), threading.Event()

        def beat() -> None:
            count = 0
            while not ended.wait(BEAT_SECONDS):
                count += 1
                self.store.set(f"{job}/beat", str(count))

        thread = threading.Thread(target=beat, name=job, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.store.set(f"{job}/done", "")

    def wait_for_main(self, timeout_seconds: float) -> None:
        """Return when rank 0 has done its work, however long that takes; raises LostContactError once it is silent."""
        job = self._next_job()
        last, heard = None, time.monotonic()
        while True:
            with contextlib.suppress(dist.DistStoreError):  # what `wait` raises when it was not done in time
                self.store.wait([f"{job}/done"], timedelta(seconds=min(BEAT_SECONDS, timeout_seconds)))
                return
            beat = self.store.get(f"{job}/beat") if self.store.check([f"{job}/beat"]) else None
            if beat != last:
                last, heard = beat, time.monotonic()
            elif time.monotonic() - heard > timeout_seconds:
                raise LostContactError(f"timed out waiting {timeout_seconds:g} s for rank 0")

    @contextlib.contextmanager
    def watching(self, steps: Callable[[], int], lost: Callable[[PeerFailed], None]) -> Iterator[None]:
        """Within it, `lost` is called, from a thread, when a rank is lost and the main thread does not notice.

        It has to end the process. `steps` gives the number of steps done.
        """

        def named(ranks: Sequence[int]) -> None:
            if not self._told:
                self._told = True
                lost(self._found(ranks, steps()))

        self._watchdog.watch(steps, named)
        try:
            yield
        finally:
            self._watchdog.end()

    def _found(self, ranks: Sequence[int], step: int) -> PeerFailed:
        with contextlib.suppress(RuntimeError, OSError):  # the store may be what is lost
            for rank in ranks:
                if self.store.check([f"failed/{rank}"]):
                    return self._named(rank)
        return self._missing(ranks, "silent since", step)

    def _next_job(self) -> str:
        self._jobs += 1
        return f"job/{self._jobs}"

    def explain(self, error: BaseException, step: int) -> BaseException:
        """The error itself if it began here, which the others now learn; else a PeerFailed that names who it was.

        `step` is the number of steps done.
        """
        if isinstance(error, PeerFailed) or self._told:
            return error
        self._told = True
        try:
            return self._look(error, step) if lost_contact(error) else self._tell(error, step)
        except (RuntimeError, OSError):  # the store went down with its owner: nothing more can be found out
            return PeerFailed(f"the launcher's store is gone after step {step}: {_first_line(error)}")

    def _tell(self, error: BaseException, step: int) -> BaseException:
        self.store.set(f"failed/{self.rank}", json.dumps([step, *as_status(error)]))
        self._watchdog.say_gone()
        return error

    def _look(self, error: BaseException, step: int) -> PeerFailed:
        self.store.set(f"here/{self.rank}", str(step))
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            for rank in others:
                if self.store.check([f"failed/{rank}"]):
                    return self._named(rank)
            missing = [rank for rank in others if not self.store.check([f"here/{rank}"])]
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if not missing:
            return PeerFailed(f"the ranks lost each other after step {step}, and all are still there: the network?")
        timed_out = re.search("timed out|timeout", str(error), re.IGNORECASE)
        return self._missing(missing, "silent since" if timed_out else "gone after", step)

    def _missing(self, missing: Sequence[int], seen: str, step: int) -> PeerFailed:
        names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        found = PeerFailed(f"{names} {seen} step {step}")
        found.of_one_rank = self.rank == min(set(range(self.world_size)) - set(missing))  # rank 0 may be among them
        return found

    def _named(self, rank: int) -> PeerFailed:
        step, state, exit_code, reason = json.loads(self.store.get(f"failed/{rank}"))
        return PeerFailed(f"rank {rank} failed after step {step}: {reason}", exit_code, state)


def lost_contact(error: BaseException) -> bool:
    """Whether an error says no more than that a collective failed: another rank is the reason."""
    if isinstance(error, LostContactError | dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS_OF_A_LOST_RANK)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
