"""The contract of an objective.

Noise and time are arguments and every result is per sample: all randomness and all reduction stay outside, so that an
objective is tested without mocks and its loss does not depend on batching. Every objective here follows a straight or
curved path x_t = alpha(t) x0 + sigma(t) eps from data (t = 0) to noise (t = 1); one sampler and one set of weightings
serve them all.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from trainer.registry import Part

if TYPE_CHECKING:
    from torch import Tensor


class Objective(Part, home="trainer.objectives"):
    """What the network learns to predict, and how noise is mixed into the data."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of data and noise at time t [B] in [0, 1], each [B] float32."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """What the network is told of t [B], on the scale 0 to 1000 of its time embedding, [B]."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should answer, [B, C, h, w]."""

    @abstractmethod
    def x0(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        """The clean latents that the answer `pred` means, [B, C, h, w]: the inverse of `target`."""

    @abstractmethod
    def x0_factor(self, t: Tensor) -> Tensor:
        """This objective's squared error over the squared error of its x0, [B]; weightings are written in x0 space."""

    def corrupt(self, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents x_t and the target, each [B, C, h, w]."""
        alpha, sigma = per_image(*self.alpha_sigma(t))
        return alpha * x0 + sigma * eps, self.target(x0, eps, t)

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """The mean squared error of each sample, [B] float32."""
        return (pred.float() - target.float()).square().flatten(1).mean(dim=1)

    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio alpha^2 / sigma^2, [B]; infinite where there is no noise."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma).square()


def per_image(*factors: Tensor) -> tuple[Tensor, ...]:
    """Each [B] factor as [B, 1, 1, 1], to multiply images with."""
    return tuple(factor.view(-1, 1, 1, 1) for factor in factors)
