"""How fast a VAE encodes pictures in each precision, and how far its latents are from those of fp32."""

from __future__ import annotations

import torch
from gpu_ceiling import milliseconds
from gpu_device import forget_peak, peak
from gpu_model import vae_on
from row_file import Row

from trainer.latents import OnlineVae


def vae_row(device: torch.device, model: str, batch: int, pixels: int, precision: str) -> Row:
    """Images a second of the VAE's encoder, and the relative error of its means against fp32."""
    pictures = torch.rand(batch, 3, pixels, pixels, generator=torch.Generator(device).manual_seed(2), device=device)
    pictures = pictures * 2 - 1
    exact, _ = OnlineVae(vae_on(device, model), "fp32").posterior(pictures[:2])
    vae = OnlineVae(vae_on(device, model), precision)
    error = float((vae.posterior(pictures[:2])[0] - exact).norm() / exact.norm())
    forget_peak(device)
    ms = milliseconds(device, lambda: vae.posterior(pictures), 5)
    row = {"model": model, "batch": batch, "pixels": pixels, "precision": precision, "fp32_error": error}
    return row | {"ms": round(ms, 3), "images_per_second": round(1000 * batch / ms, 2)} | peak(device)
