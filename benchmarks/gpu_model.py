"""What the GPU benchmarks train: networks with random weights, made where they run, and batches that lie there."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from networks import ROOT, TOKENS, Network, network
from torch.utils.flop_counter import FlopCounterMode

from trainer.data.loader import Batch
from trainer.latents import CachedLatents
from trainer.models.base import Provenance
from trainer.models.tiny import VAE_CONFIG, Tiny, tiny_vae
from trainer.models.unet_clip import UNetClip

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel

    from trainer.models.base import Components

Model = Literal["sd15", "sd21", "sdxl", "tiny"]
KEPT = 3  # batches that rows rotate among
POOLED = 1280  # width of SDXL's pooled text condition
CLIP_LAYERS = {"sd15": 12, "sd21": 23}  # of the text encoders, as published


def shape_of(model: str) -> Network:
    """The UNet of `model` and the shapes of what it takes."""
    return Network("tiny", dict(Tiny().load(0).unet_config)) if model == "tiny" else network(model)


class Benchmarked(UNetClip):
    """A network of a published shape with random weights; its VAE and tokenizer, which no row asks, are tiny."""

    kind = "benchmark"

    network: Model
    device: str

    def check(self) -> None:
        pass

    def provenance(self) -> Provenance:
        return Provenance(source=f"{self.network} with random weights")

    def load_tokenizer(self) -> Any:
        return Tiny().load_tokenizer()

    def load(self, seed: int) -> Components:
        config = shape_of(self.network).unet
        unet = lambda: unet_on(torch.device(self.device), config, seed)  # noqa: E731
        return replace(Tiny().load(seed), unet_config=config, load_unet=unet, provenance=self.provenance())

    def predict(self, unet: UNet2DConditionModel, x_t: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        if self.network != "sdxl":
            return super().predict(unet, x_t, time, cond)
        sizes = torch.full(
            (len(x_t), 6), 8.0 * x_t.shape[-1], device=x_t.device
        )  # original, crop, target: as if square
        added = {"text_embeds": cond[:, 0, :POOLED], "time_ids": sizes}
        return unet(x_t, time, encoder_hidden_states=cond, added_cond_kwargs=added, return_dict=False)[0]


def unet_on(device: torch.device, config: Any, seed: int) -> UNet2DConditionModel:
    """An fp32 UNet whose weights `seed` decides, made on its device."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(seed)
    make: Any = UNet2DConditionModel.from_config
    with device:
        return make(dict(config))


def vae_on(device: torch.device, model: str) -> AutoencoderKL:
    """A VAE of `model`'s size with random weights, fp32."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    with device:
        if model == "tiny":
            return tiny_vae()
        shipped = "sd21" if model == "sd21" else "sd15"  # SDXL's has the shape of SD 1.5's
        make: Any = AutoencoderKL.from_config
        return make(json.loads((ROOT / "trainer/models/sd_configs" / shipped / "vae/config.json").read_text()))


def text_encoder_on(device: torch.device, model: str) -> CLIPTextModel:
    """A CLIP text encoder of `model`'s size with random weights, fp32."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    if model == "tiny":
        return Tiny().load(0).text_encoder.to(device)  # pyright: ignore
    width = shape_of(model).text_width
    with device:
        return CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=CLIP_LAYERS[model],
                num_attention_heads=width // 64,
            )
        )


@dataclass(frozen=True)
class Kept(Batch):
    """A batch that is on the device: there is nothing to pin."""

    def pin_memory(self) -> Kept:
        return self


def kept_batches(shape: Network, device: torch.device, batch: int, pixels: int) -> list[Batch]:
    """KEPT batches as they come from a cache, drawn on the device: latents of about unit variance, and text."""
    generator = torch.Generator(device).manual_seed(1)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    made: list[Batch] = []
    for number in range(KEPT):
        size = shape.latents(batch, pixels)
        mean = drawn(*size) / VAE_CONFIG["scaling_factor"]
        made.append(
            Kept(
                slots=list(range(number * batch, (number + 1) * batch)),
                keys=[f"{number}/{index}" for index in range(batch)],
                captions=[""] * batch,
                digest=number,
                captions_cut=0,
                substitutes=[],
                pixels=None,
                moments=torch.stack([mean, torch.full_like(mean, 0.01)], dim=1),
                text=drawn(batch, TOKENS, shape.text_width),
                sizes=torch.zeros(batch, 6, dtype=torch.int64, device=device),
                t=torch.rand(batch, generator=generator, device=device),
                eps=drawn(*size),
                posterior_eps=drawn(*size),
            )
        )
    return made


def clean_latents(batches: list[Batch]) -> list[Tensor]:
    """x0 of each, [B, C, h, w] float32, as difftrain makes them of a cache's moments."""
    return [CachedLatents(VAE_CONFIG).latents(batch) for batch in batches]


def tflop_of_step(shape: Network, batch: int, pixels: int) -> float:
    """TFLOP of one step: three times the UNet's forward, counted without computing; recomputed activations not."""
    device = torch.device("meta")
    unet: Any = unet_on(device, shape.unet, 0)
    family = Benchmarked(network=shape.name, device="meta")  # pyright: ignore[reportArgumentType]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents = torch.empty(shape.latents(1, pixels), device=device)
        text = torch.empty(1, TOKENS, shape.text_width, device=device)
        family.predict(unet, latents, torch.zeros(1, dtype=torch.int64, device=device), text)
    return 3 * batch * counter.get_total_flops() / 1e12
