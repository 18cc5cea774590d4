from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.objectives.base import per_image
from trainer.objectives.diffusion import DiffusionObjective

if TYPE_CHECKING:
    from torch import Tensor


class VPrediction(DiffusionObjective):
    """Predict v = alpha eps - sigma x0 (Salimans and Ho 2022, section 4); the choice of Stable Diffusion 2.x-768."""

    kind = "v_prediction"

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = per_image(*self.alpha_sigma(t))
        return alpha * eps - sigma * x0

    def x0(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = per_image(*self.alpha_sigma(t))
        return alpha * x_t - sigma * pred

    def x0_factor(self, t: Tensor) -> Tensor:
        return self.snr(t) + 1
