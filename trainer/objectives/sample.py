from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.objectives.diffusion import DiffusionObjective

if TYPE_CHECKING:
    from torch import Tensor


class Sample(DiffusionObjective):
    """Predict the clean latents x0 themselves (Ho et al. 2020, section 3.2)."""

    kind = "sample"

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return x0

    def x0(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        return pred

    def x0_factor(self, t: Tensor) -> Tensor:
        return t.new_ones(t.shape)
