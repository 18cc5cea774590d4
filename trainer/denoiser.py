"""The one module that a training step calls: text encoder and UNet under one forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from trainer.models.base import Components, ModelFamily


class Denoiser(nn.Module):
    """Answers noisy latents under a prompt. One module, so that one wrapper (DDP, autocast) serves all that trains."""

    def __init__(self, family: ModelFamily, components: Components):
        super().__init__()
        self.family = family
        self.unet = components.unet
        self.text_encoder = components.text_encoder

    def train(self, mode: bool = True) -> Denoiser:
        """Train or eval mode for what is trained; a frozen text encoder stays in eval mode."""
        super().train(mode)
        if not self.family.train_text_encoder:
            self.text_encoder.eval()
        return self

    def forward(self, x_t: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """The prediction [B, C, h, w] for latents [B, C, h, w] at model time [B] under token ids [B, chunks, 77]."""
        with torch.set_grad_enabled(self.family.train_text_encoder and torch.is_grad_enabled()):
            cond = self.family.encode_text(self.text_encoder, tokens)
        return self.family.predict(self.unet, x_t, time, cond)
