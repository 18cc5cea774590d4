from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import model_validator

from trainer.objectives.base import per_image
from trainer.objectives.diffusion import DiffusionObjective

if TYPE_CHECKING:
    from torch import Tensor


class Epsilon(DiffusionObjective):
    """Predict the noise (Ho et al. 2020, eq. 14); the choice of Stable Diffusion 1.x and 2.x-base."""

    kind = "epsilon"

    @model_validator(mode="after")
    def _needs_signal_everywhere(self) -> Epsilon:
        if self.zero_terminal_snr:
            raise ValueError(
                "epsilon cannot be learnt where there is no signal; use v_prediction with zero_terminal_snr"
            )
        return self

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps

    def x0(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = per_image(*self.alpha_sigma(t))
        return (x_t - sigma * pred) / alpha

    def x0_factor(self, t: Tensor) -> Tensor:
        return self.snr(t)
