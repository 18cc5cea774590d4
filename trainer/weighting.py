"""How much each time t counts. Written once, in x0 space; the objective's `x0_factor` carries it to any objective."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from pydantic import Field

from trainer.registry import Part

if TYPE_CHECKING:
    from torch import Tensor


class Weighting(Part, home="trainer.weighting", default_kind="uniform"):
    """The weight of a sample's loss as a function of its noise level."""

    @abstractmethod
    def weight(self, snr: Tensor, x0_factor: Tensor) -> Tensor:
        """The factor of the objective's own loss, [B], from the signal-to-noise ratio [B] and `x0_factor` [B]."""


class Uniform(Weighting):
    """The objective's own loss as it is."""

    kind = "uniform"

    def weight(self, snr: Tensor, x0_factor: Tensor) -> Tensor:
        return snr.new_ones(snr.shape)


class MinSnr(Weighting):
    """Min-SNR-gamma (Hang et al. 2023, section 3.4): min(SNR, gamma) in x0 space.

    That is min(snr, gamma)/snr for epsilon, min(snr, gamma)/(snr + 1) for v and min(snr, gamma) for x0.
    """

    kind = "min_snr"

    gamma: float = Field(default=5.0, gt=0, description="Signal-to-noise ratio above which the weight stays constant.")

    def weight(self, snr: Tensor, x0_factor: Tensor) -> Tensor:
        # A finite snr has a finite factor; with no signal at all (snr = 0) epsilon's 0/0 cannot occur: it is refused.
        return snr.clamp(max=self.gamma) / x0_factor
