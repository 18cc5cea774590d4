"""One optimizer step: the whole of diffusion training on one page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainer.rng import draw_seed

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.loader import Batch, Substitute
    from trainer.training import Training


@dataclass(frozen=True)
class StepResult:
    """What one step leaves behind. Tensors stay on the device: nobody waits for them before metrics are written."""

    step: int  # 1-based
    lr: float
    sums: Tensor  # [2] global loss, captions cut; summed over micro batches and ranks
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # 1.0 if the gradient was not finite and nothing was changed, else 0.0
    substitutes: list[Substitute]  # records of this rank that could not be read
    batch_digest: int  # of what this rank was fed, 64 bits; the sum over the ranks is that of the global batch
    data_wait_seconds: float


def train_step(training: Training, batches: Iterator[Batch]) -> StepResult:
    """Advance `training.state` by one step over this rank's share of the global batch."""
    config, runtime, state = training.config, training.runtime, training.state
    topology = training.topology
    optimizer, weights = state.optimizer, state.weights()

    # 1. Gradients of the weighted mean loss over the global batch, accumulated over micro batches and ranks.
    # Freed and made anew, unless they are the memory of DDP's buckets: the first micro batches would get other memory.
    optimizer.zero_grad(set_to_none=not (runtime.gradients_are_buckets and topology.accumulation > 1))
    sums = torch.zeros(2, device=runtime.device)
    digest, waited = 0, 0.0
    substitutes: list[Substitute] = []
    for turn in range(topology.accumulation):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        batch = batch.to(runtime.device)
        with runtime.sync_gradients_if(turn == topology.accumulation - 1, training.model):
            # Divided once, by the global count: how the batch is cut into ranks and micro batches cannot matter.
            loss = sample_losses(training, batch).sum() / topology.global_batch
            runtime.backward(loss * topology.world_size)  # DDP averages over the ranks; the gradient is their sum
        sums[0] += loss.detach()
        sums[1] += batch.captions_cut
        digest += batch.digest
        substitutes += batch.substitutes

    # 2. Clip, and find out whether the gradient is finite: its norm is, if and only if all of it is.
    runtime.unscale(optimizer)
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    if config.train.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(list(weights.values()), config.train.max_grad_norm, grad_norm)
    skipped = (~torch.isfinite(grad_norm)).float()

    # 3. Update weights and their average, unless the gradient was not finite.
    runtime.finish_copies()
    lr = config.lr.rate(state.step, config.train.max_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    step_unless(optimizer, skipped)
    if state.scaler is not None:
        state.scaler.update()
    if state.ema is not None:
        state.ema.update(weights, state.step, skipped)

    state.step += 1
    return StepResult(state.step, lr, runtime.sum(sums), grad_norm, skipped, substitutes, digest, waited)


def sample_losses(training: Training, batch: Batch) -> Tensor:
    """The weighted loss of each sample, [B] float32, of a micro batch that is on the device."""
    objective, weighting = training.config.objective, training.config.weighting
    training.runtime.seed_dropout(draw_seed(training.config.train.seed, "dropout", batch.slots[0]))
    x0 = training.latent_source.latents(batch)
    x_t, target = objective.corrupt(x0, batch.eps, batch.t)
    pred = training.model(x_t, objective.model_time(batch.t), batch.text)
    weight = weighting.weight(objective.snr(batch.t), objective.x0_factor(batch.t))
    return weight * objective.loss(pred, target)


def step_unless(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Let the optimizer step unless `skipped` (0-dim float) is 1, waiting for no accelerator if it can be told."""
    on_accelerator = skipped.device.type != "cpu"
    if on_accelerator and getattr(optimizer, "_step_supports_amp_scaling", False):
        step_unless_flagged(optimizer, skipped)
    elif not skipped:
        optimizer.step()


def step_unless_flagged(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """The same for a fused optimizer, whose kernels read the flag where it is."""
    optimizer.grad_scale, optimizer.found_inf = None, skipped  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
