"""Pictures to latents and back (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from trainer.data.transforms import as_float

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from torch import Tensor

    from trainer.data.loader import Batch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LatentSource(Protocol):
    """Where a batch's clean latents come from."""

    def latents(self, batch: Batch) -> Tensor:
        """x0 [B, C, h, w] float32 of the batch's pictures, about unit variance."""
        ...


class Posterior:
    """How a sample is made of what the VAE says a picture may mean, and scaled; needs the VAE's config alone."""

    def __init__(self, vae_config: Mapping[str, Any]):
        self.scale = vae_config["scaling_factor"]
        self.shift = vae_config.get("shift_factor") or 0.0

    def sample(self, mean: Tensor, std: Tensor, posterior_eps: Tensor) -> Tensor:
        """x0 [B, C, h, w], of about unit variance: the posterior at its noise [B, C, h, w]."""
        return (mean + std * posterior_eps - self.shift) * self.scale


class OnlineVae(Posterior):
    """Encodes on the fly with a frozen VAE, in its own precision whatever the step's."""

    def __init__(self, vae: AutoencoderKL, precision: str):
        super().__init__(vae.config)
        self.vae = vae.requires_grad_(False).eval()
        torch.nn.Module.to(vae, DTYPES[precision])  # diffusers' own `to` warns about nothing

    def latents(self, batch: Batch) -> Tensor:
        assert batch.pixels is not None, "a batch without pictures is for CachedLatents"
        return self.encode(as_float(batch.pixels), batch.posterior_eps)

    def encode(self, pixels: Tensor, posterior_eps: Tensor) -> Tensor:
        """A sample of the posterior, [B, C, h, w] float32, from pixels [B, 3, H, W] and its noise [B, C, h, w]."""
        return self.sample(*self.posterior(pixels), posterior_eps)

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of what pixels [B, 3, H, W] may mean, each [B, C, h, w] float32, unscaled."""
        with self._own_precision(pixels):
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist  # pyright: ignore
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] float32 in [-1, 1] from latents [B, C, h, w]."""
        with self._own_precision(x0):
            latents = (x0 / self.scale + self.shift).to(self.vae.dtype)
            pixels = self.vae.decode(latents, return_dict=False)[0]
        return pixels.float().clamp(-1, 1)

    def _own_precision(self, like: Tensor) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(like.device.type, enabled=False)


class CachedLatents(Posterior):
    """Samples the posteriors that come with a batch from a cache."""

    def latents(self, batch: Batch) -> Tensor:
        assert batch.moments is not None, "a batch of pictures is for OnlineVae"
        return self.sample(batch.moments[:, 0], batch.moments[:, 1], batch.posterior_eps)
