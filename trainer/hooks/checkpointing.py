"""Saves the state: every `checkpoint.every_steps`, at the end, when a stop is asked for, and on request."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from trainer.checkpoint import Retention, prune_checkpoints, save_checkpoint
from trainer.errors import Diverged, StorageFailed
from trainer.hook import CollectiveHook

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from trainer.run.rundir import RunDir
    from trainer.training import Training

MAX_FAILURES = 3


class Checkpointing(CollectiveHook):
    """All ranks take part, rank 0 writes. A full disk costs one save, three in a row or the last one end the run.

    In the background the steps wait for a copy of the state in host memory alone, on a GPU not before they change the
    state; a thread then serialises, hashes and commits it. A new save waits for the one before, and the run does not
    end before the last one has.
    """

    saves: ClassVar[bool] = True

    every_steps: int
    retention: Retention
    background: bool
    sidecar_facts: dict[str, Any]
    _failures: int = PrivateAttr(0)  # in a row; the same on all ranks
    _thread: threading.Thread | None = PrivateAttr(None)
    _problem: str | None = PrivateAttr(None)  # why the save before failed
    _copy: Any = PrivateAttr(None)  # of the state at the save before: its memory takes the next one
    _said_no_room: bool = PrivateAttr(False)

    def due(self, step: int, last: bool) -> bool:
        return last or step % self.every_steps == 0

    def measure(self, training: Training) -> dict[str, float]:
        # Before this step's metrics line is written: a kill then never costs two intervals.
        training.runtime.from_main(self._wait)
        return {}

    def after_step(self, training: Training, last: bool) -> None:
        import torch

        weights = list(training.state.weights().values())
        with torch.no_grad():
            finite = torch.isfinite(torch.nn.utils.get_total_norm(weights))
        if not finite:
            raise Diverged(f"the weights are not finite after step {training.state.step}; nothing was saved")
        self._account(training)
        training.runtime.from_main(lambda: self._save(training, last))
        if last:
            self._account(training)
            if self._failures:
                raise StorageFailed(f"checkpoint-{training.state.step} could not be saved: {self._why()}")

    def on_end(self, training: Training) -> None:
        self._wait()

    def _account(self, training: Training) -> None:
        """Wait for the save before and count its failure; raises StorageFailed on all ranks after three in a row."""
        self._wait()
        failed = training.runtime.any(self._problem is not None)
        self._failures = self._failures + 1 if failed else 0
        if self._failures >= MAX_FAILURES:
            raise StorageFailed(f"{MAX_FAILURES} checkpoints in a row could not be saved: {self._why()}")

    def _why(self) -> str:
        return self._problem or "see rank 0"

    def _wait(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _save(self, training: Training, last: bool) -> None:
        state = training.state
        content = {**state.state_dict(), "config": training.config.model_dump(mode="json")}
        facts = {
            "images_seen": state.step * training.topology.global_batch,
            "validation_loss": training.measured.get("validation_loss"),
            **self.sidecar_facts,
        }
        if not last and self.background and self._room_for(content):
            with training.runtime.copies_to_host() as wait_for_copy:
                self._copy = copied(content, self._copy)
            arguments = (training.run_dir, self._copy, facts, wait_for_copy)
            self._thread = threading.Thread(target=self._write, args=arguments, name=f"checkpoint-{state.step}")
            self._thread.start()
        else:
            self._write(training.run_dir, content, facts, wait_for_copy=lambda: None)

    def _write(
        self, run_dir: RunDir, content: dict[str, Any], facts: dict[str, Any], wait_for_copy: Callable[[], None]
    ) -> None:
        self._problem = "the save did not end"
        try:
            wait_for_copy()
            save_checkpoint(run_dir, content, facts)
            self._problem = None
        except OSError as error:
            print(f"warning: checkpoint-{content['step']} was not saved, older ones are kept: {error}", flush=True)
            self._problem = str(error)
            return
        try:
            prune_checkpoints(run_dir, self.retention)
        except OSError as error:
            print(f"warning: an old checkpoint was not removed: {error}", flush=True)

    def _room_for(self, content: dict[str, Any]) -> bool:
        import psutil

        if self._copy is not None:
            return True
        needed, free = sum(tensor.nbytes for tensor in tensors(content)), psutil.virtual_memory().available
        if needed <= 0.8 * free:
            return True
        if not self._said_no_room:
            self._said_no_room = True
            print(
                f"note   a copy of the state takes {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free: "
                "steps wait while checkpoints are written",
                flush=True,
            )
        return False


def copied(content: Any, former: Any = None) -> Any:
    """`content` with every tensor in it copied to host memory of its own, through nested dicts, lists and tuples.

    The memory is that of `former`, an earlier copy of the like, wherever its tensors fit: to touch fresh memory for the
    first time takes longer than the copy itself.
    """
    import torch

    if torch.is_tensor(content):
        fits = torch.is_tensor(former) and former.shape == content.shape and former.dtype == content.dtype
        # From a GPU into pinned memory, in the order of the copies' stream; the host goes on.
        host = (
            former if fits else torch.empty_like(content, device="cpu", pin_memory=content.is_cuda, requires_grad=False)
        )
        return host.copy_(content.detach(), non_blocking=True)
    if isinstance(content, dict):
        formers = former if isinstance(former, dict) else {}
        return {key: copied(value, formers.get(key)) for key, value in content.items()}
    if isinstance(content, list | tuple):
        formers = former if isinstance(former, list | tuple) and len(former) == len(content) else [None] * len(content)
        return type(content)(map(copied, content, formers))
    return content


def tensors(content: Any) -> list[Tensor]:
    """The tensors in `content`, through nested dicts, lists and tuples."""
    import torch

    if torch.is_tensor(content):
        return [content]
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [tensor for value in inside for tensor in tensors(value)]
