"""The loss on held-out records, with noise and times that never change, so that two values can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.hook import CollectiveHook

if TYPE_CHECKING:
    from trainer.training import Training


class HeldOutLoss(CollectiveHook):
    """Adds `validation_loss` to the metrics: the unweighted mean over held-out records, with averaged weights."""

    every_steps: int
    max_steps: int

    def due(self, step: int, last: bool) -> bool:
        return step == self.max_steps or step % self.every_steps == 0  # not when a signal wants the process gone

    def measure(self, training: Training) -> dict[str, float]:
        import torch

        runtime, objective, held_out = training.runtime, training.config.objective, training.held_out
        assert held_out is not None, "this hook is only made when records are held out"
        micro, count = training.topology.micro_batch, held_out.global_batch
        starts = range(runtime.rank * micro, count, runtime.world_size * micro)
        total = torch.zeros((), device=runtime.device)
        with torch.no_grad(), training.evaluating():
            for start in starts:
                batch = held_out.batch(list(range(start, min(start + micro, count)))).to(runtime.device)
                x_t, target = objective.corrupt(training.latent_source.latents(batch), batch.eps, batch.t)
                pred = training.denoiser(x_t, objective.model_time(batch.t), batch.text)
                total += objective.loss(pred, target).sum()
        return {"validation_loss": runtime.sum(total).item() / count}
