"""Pictures from prompts: deterministic DDIM, which for rectified flow is the Euler method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainer.objectives.base import per_image
from trainer.rng import normal

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from trainer.latents import OnlineVae
    from trainer.models.base import Components, ModelFamily
    from trainer.objectives.base import Objective


@dataclass(frozen=True)
class Sampler:
    """Draws pictures with the weights that `components` hold now."""

    family: ModelFamily
    components: Components
    objective: Objective
    vae: OnlineVae
    image_size: int
    steps: int
    guidance: float
    at_once: int = 4  # pictures: guidance doubles them, and a training run leaves little memory

    def draw(self, prompts: Sequence[str], seed: int, places: Sequence[int]) -> list[Image]:
        """One picture per prompt. Picture i depends on (seed, places[i]) and its prompt, not on its neighbours."""
        pictures: list[Image] = []
        for start in range(0, len(prompts), self.at_once):
            chunk = slice(start, start + self.at_once)
            pictures += self._draw(prompts[chunk], seed, places[chunk])
        return pictures

    @torch.no_grad()
    def _draw(self, prompts: Sequence[str], seed: int, places: Sequence[int]) -> list[Image]:
        device = self.components.unet.device
        shape = self.family.latent_shape(self.components.vae_config, self.image_size, self.image_size)
        x = normal(seed, "sample", places, shape).to(device)
        cond, uncond = self._encode(prompts).to(device), self._encode([""] * len(prompts)).to(device)
        for step in range(self.steps, 0, -1):
            t = torch.full((len(prompts),), step / self.steps, device=device)
            pred = self._predict(x, t, cond, uncond)
            x0 = self.objective.x0(x, pred, t)
            if step == 1:
                x = x0
                break
            # Song et al. 2021, eq. 12 with eta = 0: keep the predicted noise, move to the next noise level.
            alpha, sigma = per_image(*self.objective.alpha_sigma(t))
            eps = (x - alpha * x0) / sigma
            alpha, sigma = per_image(*self.objective.alpha_sigma(torch.full_like(t, (step - 1) / self.steps)))
            x = alpha * x0 + sigma * eps
        return [_to_image(self.vae.decode(latents[None])[0]) for latents in x]  # decoding takes the most memory

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        tokens, _ = self.family.tokenize(self.components.tokenizer, prompts)
        return self.family.encode_text(self.components.text_encoder, tokens.to(self.components.unet.device))

    def _predict(self, x: Tensor, t: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        """The guided prediction (Ho and Salimans 2022, eq. 6, with w = guidance - 1)."""
        time, unet = self.objective.model_time(t), self.components.unet
        if self.guidance == 1:
            return self.family.predict(unet, x, time, cond).float()
        both = self.family.predict(unet, x.repeat(2, 1, 1, 1), time.repeat(2), torch.cat([uncond, cond])).float()
        without, under = both.chunk(2)
        return without + self.guidance * (under - without)


def _to_image(pixels: Tensor) -> Image:
    from PIL import Image

    levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu()
    return Image.fromarray(levels.numpy())
