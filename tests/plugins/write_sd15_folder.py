"""Writes a diffusers folder with Stable Diffusion 1.5's networks and random weights: write_sd15_folder.py FOLDER."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import trainer.models
from trainer.models.base import Components, Provenance
from trainer.models.clip_bpe import clip_tokenizer, openai_merges
from trainer.models.folder import save_diffusers_folder

CONFIGS = Path(trainer.models.__file__).parent / "sd_configs" / "sd15"


def config(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / name / "config.json").read_text())


def drawn(build: Callable[[], Any]) -> Any:
    """A network of the right size; its own initialisation would take minutes, and the numbers do not matter."""
    with torch.device("meta"):
        network: nn.Module = build()
    network.to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, -0.01, 0.01)
    return network


if __name__ == "__main__":
    save_diffusers_folder(
        Components.of(
            unet=drawn(lambda: UNet2DConditionModel.from_config(config("unet"))),
            vae=drawn(lambda: AutoencoderKL.from_config(config("vae"))),
            text_encoder=drawn(lambda: CLIPTextModel(CLIPTextConfig.from_dict(config("text_encoder")))),
            tokenizer=clip_tokenizer(openai_merges()),
            scheduler=json.loads((CONFIGS / "scheduler" / "scheduler_config.json").read_text()),
            provenance=Provenance("random"),
        ),
        Path(sys.argv[1]),
    )
