"""The one module that a training step calls: text encoder and UNet under one forward."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

    from trainer.models.base import ModelFamily


class Denoiser(nn.Module):
    """Answers noisy latents under a prompt. One module, so that one wrapper (DDP, autocast) serves all that trains."""

    def __init__(self, family: ModelFamily, unet: UNet2DConditionModel, text_encoder: CLIPTextModel | None):
        super().__init__()
        self.family = family
        self.unet = unet
        self.text_encoder = text_encoder  # None where its outputs come from a cache

    def train(self, mode: bool = True) -> Denoiser:
        """Train or eval mode for what is trained; a frozen text encoder stays in eval mode."""
        super().train(mode)
        if self.text_encoder is not None and not self.family.train_text_encoder:
            self.text_encoder.eval()
        return self

    def forward(self, x_t: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """The prediction [B, C, h, w] for latents [B, C, h, w] at model time [B].

        `text` is token ids [B, chunks, 77] int64, or what the text encoder made of them, [B, L, D].
        """
        if text.is_floating_point():
            return self.family.predict(self.unet, x_t, time, text)
        assert self.text_encoder is not None, "a batch of tokens is for a denoiser with a text encoder"
        trained = self.family.train_text_encoder
        # A frozen one in fp32, as a cache keeps its outputs: with a cache and without, a step sees the same condition.
        with (
            torch.set_grad_enabled(trained and torch.is_grad_enabled()),
            contextlib.nullcontext() if trained else torch.autocast(x_t.device.type, enabled=False),
        ):
            cond = self.family.encode_text(self.text_encoder, text)
        return self.family.predict(self.unet, x_t, time, cond)
