"""Saves the state: every `checkpoint.every_steps`, at the end, and when a signal asks for a stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from trainer.checkpoint import prune_checkpoints, save_checkpoint
from trainer.errors import Diverged, StorageFailed
from trainer.hook import CollectiveHook

if TYPE_CHECKING:
    from trainer.training import Training

MAX_FAILURES = 3


class Checkpointing(CollectiveHook):
    """All ranks take part, rank 0 writes. A full disk costs one save, three in a row or the last one end the run."""

    every_steps: int
    keep_last: int
    sidecar_facts: dict[str, Any]
    _failures: int = PrivateAttr(0)

    def due(self, step: int, last: bool) -> bool:
        return last or step % self.every_steps == 0

    def after_step(self, training: Training, last: bool) -> None:
        import torch

        weights = list(training.state.weights().values())
        with torch.no_grad():
            finite = torch.isfinite(torch.nn.utils.get_total_norm(weights))
        if not finite:
            raise Diverged(f"the weights are not finite after step {training.state.step}; nothing was saved")
        problem = self._save(training) if training.runtime.is_main else None
        self._failures = self._failures + 1 if training.runtime.any(problem is not None) else 0
        if self._failures >= MAX_FAILURES or (self._failures and last):
            raise StorageFailed(f"checkpoint-{training.state.step} could not be saved: {problem or 'see rank 0'}")

    def _save(self, training: Training) -> str | None:
        """Why it failed, or None."""
        state, run_dir = training.state, training.run_dir
        content = {**state.state_dict(), "config": training.config.model_dump(mode="json")}
        images = {"images_seen": state.step * training.topology.global_batch}
        try:
            save_checkpoint(run_dir, content, images | self.sidecar_facts)
            prune_checkpoints(run_dir, self.keep_last)
        except OSError as error:
            print(f"warning: checkpoint-{state.step} was not saved, older ones are kept: {error}", flush=True)
            return str(error)
        return None
