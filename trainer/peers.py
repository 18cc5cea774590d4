"""Which rank is at fault when a collective fails: what each rank leaves in the launcher's key-value store.

A rank that fails writes down why before it goes. One that only finds the others gone writes that it is still there, and
looks: at the first rank that wrote down why, else at those that wrote nothing, which were killed or have stopped.
"""

from __future__ import annotations

import json
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from trainer.errors import RunEnd

WAIT_SECONDS = 3.0  # for what the others have to say: they notice a lost rank within moments of each other


class PeerFailed(RunEnd):
    """Another rank ended this run, in the way that `exit_code` and `state` say."""

    def __init__(self, text: str, exit_code: int = 1, state: str = "failed"):
        self.exit_code, self.state = exit_code, state
        super().__init__(text)


class Peers:
    """The ranks of this run, as far as they have something to say."""

    def __init__(self, rank: int, world_size: int):
        self.store, self.rank, self.world_size = PrefixStore("difftrain", _get_default_store()), rank, world_size
        self._told = False

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
        ended = isinstance(error, RunEnd)
        text = str(error) if ended else f"{type(error).__name__}: {error}"
        facts = {"text": text, "step": step}
        facts |= {"exit_code": error.exit_code, "state": error.state} if ended else {}
        self.store.set(f"failed/{self.rank}", json.dumps(facts))
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
        names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        seen = "silent since" if "timed out" in str(error).lower() else "gone after"
        found = PeerFailed(f"{names} {seen} step {step}")
        found.of_one_rank = self.rank == min(set(range(self.world_size)) - set(missing))  # rank 0 may be among them
        return found

    def _named(self, rank: int) -> PeerFailed:
        facts = json.loads(self.store.get(f"failed/{rank}"))
        text = f"rank {rank} failed after step {facts.pop('step')}: {facts.pop('text')}"
        return PeerFailed(text, **facts)


def lost_contact(error: BaseException) -> bool:
    """Whether an error says no more than that a collective failed: another rank is the reason."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    # gloo's errors are plain RuntimeErrors that begin with the place in its source.
    return isinstance(error, RuntimeError) and ("gloo/transport" in str(error) or "NCCL" in str(error))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
