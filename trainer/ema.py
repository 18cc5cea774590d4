"""The exponential moving average of the trainable weights (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from trainer.registry import Section

if TYPE_CHECKING:
    from torch import Tensor


class EmaSpec(Section):
    """A moving average of the trainable weights, used for samples and kept in checkpoints."""

    decay: float = Field(default=0.9999, ge=0, lt=1, description="Largest decay per optimizer step.")
    warmup: bool = Field(
        default=True, description="Grow the decay as (1 + step) / (10 + step), so that early weights fade."
    )

    def decay_at(self, step: int) -> float:
        """The decay that the update after the 0-based `step` uses: a pure function of the step."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class Ema:
    """Averages of `weights` (name -> tensor), same shapes, fp32, on the same device."""

    def __init__(self, spec: EmaSpec, weights: Mapping[str, Tensor]):
        self.spec = spec
        self.average = {name: weight.detach().clone() for name, weight in weights.items()}

    def update(self, weights: Mapping[str, Tensor], step: int, skipped: Tensor) -> None:
        """Move towards `weights` after `step`, unless `skipped` (a 0-dim float, 1 or 0, on the device) is 1.

        No synchronisation with an accelerator: there the flag enters as a factor.
        """
        import torch

        averages, current = list(self.average.values()), list(weights.values())
        rate = 1 - self.spec.decay_at(step)
        with torch.no_grad():  # the weights require gradients: every average would grow a graph, step after step
            if skipped.device.type != "cpu":
                rates = [rate * (1 - skipped)] * len(averages)
                torch._foreach_lerp_(averages, current, rates)  # pyright: ignore[reportPrivateImportUsage]
            elif not skipped:
                torch._foreach_lerp_(averages, current, rate)  # pyright: ignore[reportPrivateImportUsage]
