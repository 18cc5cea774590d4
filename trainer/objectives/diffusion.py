"""What the discrete-time (DDPM) objectives share: the noise schedule and its table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from trainer.objectives.base import Objective
from trainer.schedule import ScheduleName, alpha_bars

if TYPE_CHECKING:
    from torch import Tensor


class DiffusionObjective(Objective):
    """Discrete-time diffusion (Ho et al. 2020): t in [0, 1) names one of `num_timesteps` noise levels."""

    schedule: ScheduleName = Field(
        default="scaled_linear", description="Noise schedule; `scaled_linear` is that of Stable Diffusion."
    )
    beta_start: float = Field(default=0.00085, gt=0, lt=1, description="First beta; unused by the cosine schedule.")
    beta_end: float = Field(default=0.012, gt=0, lt=1, description="Last beta; unused by the cosine schedule.")
    num_timesteps: int = Field(default=1000, ge=2, le=100_000, description="Number of noise levels.")
    zero_terminal_snr: bool = Field(
        default=False, description="Rescale the schedule so that its last level is pure noise (Lin et al. 2023)."
    )

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = alpha_bars(
            self.schedule, self.beta_start, self.beta_end, self.num_timesteps, self.zero_terminal_snr, t.device
        )
        bars = table[self.level(t)]
        return bars.sqrt(), (1 - bars).sqrt()

    def level(self, t: Tensor) -> Tensor:
        """The noise level of t, [B] int64 in [0, num_timesteps)."""
        return (t * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)

    def model_time(self, t: Tensor) -> Tensor:
        return self.level(t)
