"""The noise schedule of discrete-time diffusion: alpha(t) and sigma(t) with alpha^2 + sigma^2 = 1."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ScheduleName = Literal["scaled_linear", "linear", "cosine"]


@functools.lru_cache(maxsize=64)
def alpha_bars(
    name: ScheduleName,
    beta_start: float,
    beta_end: float,
    num_timesteps: int,
    zero_terminal_snr: bool,
    device: torch.device,
) -> Tensor:
    """The cumulative products of 1 - beta, [num_timesteps] float32 on `device`, falling from almost 1 to almost 0.

    `linear` is Ho et al. 2020 (section 4), `scaled_linear` (linear in sqrt(beta)) Rombach et al. 2022, `cosine` Nichol
    and Dhariwal 2021 (eq. 17). With `zero_terminal_snr` the last entry is exactly 0 (Lin et al. 2023, algorithm 1).
    """
    import torch

    if name == "cosine":
        time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
        f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif name == "linear":
        betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    else:
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    bars = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        root = bars.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        bars = root**2
    return bars.float().to(device)
