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
    """Averages of `weights` (name -> tensor): same shapes, dtypes and strides, on the same device."""

    def __init__(self, spec: EmaSpec, weights: Mapping[str, Tensor]):
        self.spec = spec
        self.average = {name: weight.detach().clone() for name, weight in weights.items()}
        # The kernel of `update` walks memory, not indices: averages of other strides would be wrong without an error.
        for name, weight in weights.items():
            average = self.average[name]
            alike = average.stride() == weight.stride() and average.dtype == weight.dtype
            assert alike, (
                f"{name}: average {average.dtype}, strides {average.stride()}; weight {weight.dtype}, {weight.stride()}"
            )

    def update(self, weights: Mapping[str, Tensor], step: int, skipped: Tensor) -> None:
        """Move towards `weights` after `step`, unless `skipped` (a 0-dim float32, 1 or 0, on the device) is 1.

        One fused kernel that reads the flag where it is: nobody waits for it, and a skipped step changes no bit, even
        if a weight is not a number. It is a step of SGD with weight decay -1, whose gradients are the weights w:
        a - (-rate) * (w - a) = a + rate * (w - a).
        """
        import torch

        with torch.no_grad():  # the weights require gradients: every average would grow a graph, step after step
            torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
                list(self.average.values()),
                list(weights.values()),
                [],
                weight_decay=-1.0,
                momentum=0.0,
                lr=-(1 - self.spec.decay_at(step)),
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=skipped,
            )

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Become `values`, in the memory and the layout that the averages have."""
        for name, average in self.average.items():
            average.copy_(values[name])
