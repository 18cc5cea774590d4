"""What a row trains on: how large a step is, its batches on the device, and what its network answers in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from gpu_model import Benchmarked, clean_latents, kept_batches, shape_of, unet_on
from torch import Tensor

from trainer.data.loader import Batch

SEED = 0  # of every network's weights
CHUNK = 8  # samples of the fp32 reference at a time


@dataclass(frozen=True)
class Step:
    """What a step trains, and how often: together with a device it decides every number of a loop."""

    model: str
    batch: int  # images of a micro batch
    pixels: int
    precision: str
    warm: int  # steps that are not looked at
    steps: int  # steps that are
    accumulation: int = 1

    @property
    def images(self) -> int:
        """Images of an optimizer step."""
        return self.batch * self.accumulation

    @property
    def text(self) -> str:
        """For people, and for the names of rows."""
        accumulated = f" x {self.accumulation}" if self.accumulation > 1 else ""
        return f"{self.model} {self.pixels} px, {self.batch}{accumulated} images, {self.precision}"


@dataclass(frozen=True)
class Data:
    """The batches of a step on their device, and what its network makes of the first one in fp32."""

    step: Step
    device: torch.device

    @cached_property
    def batches(self) -> list[Batch]:
        """KEPT micro batches."""
        return kept_batches(shape_of(self.step.model), self.device, self.step.batch, self.step.pixels)

    @cached_property
    def latents(self) -> list[Tensor]:
        """Their x0."""
        return clean_latents(self.batches)

    def noisy(self, number: int = 0) -> tuple[Tensor, Tensor]:
        """x_t [B, C, h, w] and the model time [B] of one of the batches."""
        batch, (alpha, sigma) = self.batches[number], alphas_and_sigmas(self.device)
        level = (batch.t * 1000).long()
        x_t = alpha[level].view(-1, 1, 1, 1) * self.latents[number] + sigma[level].view(-1, 1, 1, 1) * batch.eps
        return x_t, level

    @cached_property
    def reference(self) -> Tensor:
        """The untrained network's answer to the first batch in fp32, without autocast, on the host."""
        shape = shape_of(self.step.model)
        unet = unet_on(self.device, shape.unet, SEED)
        family, (x_t, time) = family_of(self.step, self.device), self.noisy()
        with torch.no_grad():
            parts = zip(*(each.split(CHUNK) for each in (x_t, time, self.batches[0].text)), strict=True)
            return torch.cat([family.predict(unet, *part) for part in parts]).cpu()

    def error_of(self, pred: Tensor) -> float:
        """How far an answer to the first batch is from the reference, in parts of the reference's norm."""
        return float((pred.detach().cpu().float() - self.reference).norm() / self.reference.norm())


def family_of(step: Step, device: torch.device) -> Benchmarked:
    """The model family of a step."""
    return Benchmarked(network=step.model, device=str(device))  # pyright: ignore[reportArgumentType]


def alphas_and_sigmas(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of Stable Diffusion's 1000 levels."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bars = torch.cumprod(1 - betas, dim=0).float().to(device)
    return bars.sqrt(), (1 - bars).sqrt()
