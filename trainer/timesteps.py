"""From which law the training times t in [0, 1) are drawn, as a pure function of the slot."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from statistics import NormalDist

from pydantic import Field

from trainer.registry import Part
from trainer.rng import uniform

LARGEST_T = 1 - 2**-24  # the largest float32 below 1


class TimestepLaw(Part, home="trainer.timesteps", default_kind="uniform"):
    """The distribution of training times."""

    stratified: bool = Field(
        default=True,
        description="Spread the times of one step evenly over the global batch (Kingma et al. 2021, appendix I.1): "
        "the same law with less variance. False draws each sample's time on its own.",
    )

    @abstractmethod
    def quantile(self, u: float) -> float:
        """The inverse distribution function, from u in [0, 1) to t in [0, 1]."""

    def draw(self, seed: int, slots: Sequence[int], global_batch: int) -> list[float]:
        """The times of the samples in `slots`, each in [0, 1) and representable as float32 below 1."""
        return [min(max(self.quantile(self._u(seed, slot, global_batch)), 0.0), LARGEST_T) for slot in slots]

    def _u(self, seed: int, slot: int, global_batch: int) -> float:
        if not self.stratified:
            return uniform(seed, "timestep", slot)
        step, position = divmod(slot, global_batch)
        return (uniform(seed, "timestep/offset", step) + position / global_batch) % 1.0


class Uniform(TimestepLaw):
    """Uniform over [0, 1)."""

    kind = "uniform"

    def quantile(self, u: float) -> float:
        return u


class LogitNormal(TimestepLaw):
    """t = sigmoid(n), n ~ N(mean, std^2) (Esser et al. 2024, section 3.1): more weight on the middle of the path."""

    kind = "logit_normal"

    mean: float = Field(default=0.0, description="Mean of the logit; positive favours noise.")
    std: float = Field(default=1.0, gt=0, description="Standard deviation of the logit.")

    def quantile(self, u: float) -> float:
        normal = NormalDist(self.mean, self.std).inv_cdf(min(max(u, 2**-53), 1 - 2**-53))
        return 1 / (1 + math.exp(-normal)) if normal > -700 else 0.0
