"""The contract of a model family: how its networks are loaded, and how text and time reach them."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from trainer.registry import Part

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import Tensor, nn
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class Provenance:
    """Where weights came from: null where it could not be known."""

    source: str
    revision: str | None = None
    files: dict[str, str] | None = None  # file name -> sha256


@dataclass
class Components:
    """The networks of a latent diffusion model, in fp32 on the CPU as loaded."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: dict[str, Any]  # scheduler_config.json of the base model; says what it was trained to predict
    provenance: Provenance


class ModelFamily(Part, home="trainer.models"):
    """Section `model`: the networks to train and how to call them."""

    init_from: str | None = Field(
        default=None,
        description="Start from another run's weights: a run folder, or FOLDER@STEP; its EMA weights if it has any.",
    )
    train_text_encoder: bool = Field(default=False, description="Train the text encoder together with the UNet.")
    vae_precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Precision of the frozen VAE; in fp16 many VAEs overflow to black pictures."
    )

    @abstractmethod
    def check(self) -> None:
        """Refuse what can be seen to be wrong without loading a weight or using the network; raises UserError."""

    @abstractmethod
    def provenance(self) -> Provenance:
        """Where the weights would come from, without loading them, importing torch or using the network."""

    @abstractmethod
    def load(self, seed: int) -> Components:
        """The networks, from disk, hub or thin air; `seed` decides every weight that no file does."""

    @abstractmethod
    def trainable(self, components: Components) -> dict[str, nn.Module]:
        """The networks that learn, by the name they have in a checkpoint; all else in `components` is frozen."""

    @abstractmethod
    def tokenize(self, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> tuple[Tensor, int]:
        """Token ids [B, chunks, 77] int64, and how many of the captions had to be cut."""

    @abstractmethod
    def encode_text(self, text_encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
        """What the UNet attends to, [B, L, D], from token ids [B, chunks, 77]."""

    @abstractmethod
    def predict(self, unet: UNet2DConditionModel, x_t: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        """The UNet's answer [B, C, h, w] to noisy latents [B, C, h, w] at model time [B] under `cond` [B, L, D]."""

    @abstractmethod
    def latent_shape(self, vae: AutoencoderKL, image_size: int) -> tuple[int, int, int]:
        """The shape [C, h, w] of one picture's latents."""


def sha256(path: Path) -> str:
    """The sha256 of a file in hex, read once as long as its size and time stay the same."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
