"""The learning rate as a pure function of the step: it cannot run too fast on many ranks or restart on a resume."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

from pydantic import Field

from trainer.registry import Part


class LrLaw(Part, home="trainer.lr", default_kind="constant"):
    """The learning rate of every step."""

    depends_on_max_steps: ClassVar[bool] = False

    peak: float = Field(gt=0, description="Largest learning rate, reached after the warm-up.")
    warmup_steps: int = Field(default=0, ge=0, description="Optimizer steps of linear warm-up from peak/warmup_steps.")

    def rate(self, step: int, max_steps: int) -> float:
        """The learning rate of the 0-based `step` of `max_steps`."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        span = max(1, max_steps - self.warmup_steps)
        return self.peak * self.after_warmup(min(1.0, (step - self.warmup_steps) / span))

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """The fraction of the peak at `progress` in [0, 1] through the steps that follow the warm-up."""


class Constant(LrLaw):
    """The peak at every step after the warm-up."""

    kind = "constant"

    def after_warmup(self, progress: float) -> float:
        return 1.0


class Decay(LrLaw):
    """What the falling laws share."""

    depends_on_max_steps: ClassVar[bool] = True

    final_fraction: float = Field(
        default=0.0, ge=0, le=1, description="Learning rate at the end, as a fraction of the peak."
    )


class Linear(Decay):
    """A straight line from the peak to the final fraction."""

    kind = "linear"

    def after_warmup(self, progress: float) -> float:
        return 1 + (self.final_fraction - 1) * progress


class Cosine(Decay):
    """Half a cosine from the peak to the final fraction (Loshchilov and Hutter 2017, eq. 5, without restarts)."""

    kind = "cosine"

    def after_warmup(self, progress: float) -> float:
        return self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * progress)) / 2
