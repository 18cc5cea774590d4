from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.objectives.base import Objective, per_image

if TYPE_CHECKING:
    from torch import Tensor


class Flow(Objective):
    """Rectified flow (Liu et al. 2022, eq. 1): a straight path from data (t = 0) to noise (t = 1)."""

    kind = "flow"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def model_time(self, t: Tensor) -> Tensor:
        return 1000 * t

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0

    def x0(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        (t,) = per_image(t)
        return x_t - t * pred

    def x0_factor(self, t: Tensor) -> Tensor:
        return 1 / t.square()
