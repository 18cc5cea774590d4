"""The contract of a model family: how its networks are loaded, and how text and time reach them."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from trainer.registry import Part

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import Tensor, nn
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class Provenance:
    """Where weights came from: null where it could not be known."""

    source: str
    revision: str | None = None
    files: dict[str, str] | None = None  # file name -> sha256


@dataclass
class Components:
    """The networks of a latent diffusion model, in fp32 on the CPU as loaded.

    Each is loaded when it is first asked for: a run that trains from a cache loads no encoder, and the job that fills
    the cache no UNet.
    """

    tokenizer: CLIPTokenizer
    scheduler: dict[str, Any]  # scheduler_config.json of the base model; says what it was trained to predict
    provenance: Provenance
    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    text_config: CLIPTextConfig
    load_unet: Callable[[], UNet2DConditionModel]
    load_vae: Callable[[], AutoencoderKL]
    load_text_encoder: Callable[[], CLIPTextModel]
    hash_encoders: Callable[[], dict[str, str]]  # `vae` and `text_encoder`: what decides every weight of each

    @classmethod
    def of(
        cls,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: dict[str, Any],
        provenance: Provenance,
    ) -> Self:
        """Of networks that are in memory already, and that nothing but their weights identifies."""
        return cls(
            tokenizer=tokenizer,
            scheduler=scheduler,
            provenance=provenance,
            unet_config=unet.config,
            vae_config=vae.config,
            text_config=text_encoder.config,
            load_unet=lambda: unet,
            load_vae=lambda: vae,
            load_text_encoder=lambda: text_encoder,
            hash_encoders=lambda: {"vae": weights_hash(vae), "text_encoder": weights_hash(text_encoder)},
        )

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        """The UNet."""
        return self.load_unet()

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The VAE, frozen."""
        return self.load_vae().requires_grad_(False).eval()

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        """The text encoder, frozen until `ModelFamily.trainable` says otherwise."""
        return self.load_text_encoder().requires_grad_(False).eval()

    def loaded(self, name: str) -> bool:
        """Whether `unet`, `vae` or `text_encoder` is in memory."""
        return name in self.__dict__

    def forget(self, name: str) -> None:
        """Free `vae` or `text_encoder`, for those who hold no reference to it; it is loaded again if need be."""
        self.__dict__.pop(name, None)


class ModelFamily(Part, home="trainer.models"):
    """Section `model`: the networks to train and how to call them."""

    init_from: str | None = Field(
        default=None,
        description="Start from another run's weights: a run folder, or FOLDER@STEP; its EMA weights if it has any.",
    )
    train_text_encoder: bool = Field(default=False, description="Train the text encoder together with the UNet.")
    blocks: ClassVar[tuple[str, ...]] = ()  # classes of the networks' parts that repeat, for `train.compile: blocks`

    vae_precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        default="fp32",
        description="Precision of the frozen VAE; in fp16 many VAEs overflow to black pictures. `auto` is decided "
        "once, at a run's first start: bf16 on a GPU that computes in it, if the first pictures' latents say the same.",
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
    def load_tokenizer(self) -> CLIPTokenizer:
        """The tokenizer that `load` would give, without a network."""

    @abstractmethod
    def trainable(self, components: Components) -> dict[str, nn.Module]:
        """The networks that learn, by the name they have in a checkpoint; all else in `components` is frozen."""

    @abstractmethod
    def tokenize(self, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> tuple[Tensor, int]:
        """Token ids [B, chunks, 77] int64, and how many of the captions had to be cut."""

    @abstractmethod
    def token_counts(self, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption has, before any of them is cut."""

    @abstractmethod
    def prompt_room(self, tokenizer: CLIPTokenizer) -> int:
        """How many tokens of a caption `tokenize` keeps."""

    @abstractmethod
    def encode_text(self, text_encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
        """What the UNet attends to, [B, L, D], from token ids [B, chunks, 77]."""

    @abstractmethod
    def predict(self, unet: UNet2DConditionModel, x_t: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        """The UNet's answer [B, C, h, w] to noisy latents [B, C, h, w] at model time [B] under `cond` [B, L, D]."""

    @abstractmethod
    def latent_shape(self, vae_config: Mapping[str, Any], width: int, height: int) -> tuple[int, int, int]:
        """The shape [C, h, w] of the latents of a picture of so many pixels."""

    @abstractmethod
    def text_recipe(self) -> dict[str, Any]:
        """What beside its weights decides what `encode_text` makes of a caption."""


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


def weights_hash(network: nn.Module) -> str:
    """The sha256 of a network's weights, in hex."""
    import torch

    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def sha256_of(paths: Sequence[Path]) -> str:
    """One hash of several files' contents, in their order."""
    return hashlib.sha256("".join(sha256(path) for path in paths).encode()).hexdigest()
