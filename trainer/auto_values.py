"""The values `auto` of a config: each is decided once, at a run's first start, and is a value like any other then.

It is written to config.resolved.yaml and to every checkpoint, enters the keys of caches, and stays through resumes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from trainer.data.transforms import as_float
from trainer.encoder_cache.base import Pictures, Shown
from trainer.encoding import Encoders, job_of
from trainer.errors import UserError
from trainer.latents import OnlineVae

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from torch import Tensor

    from trainer.checkpoint import Found
    from trainer.config import Config
    from trainer.preflight import Preflight
    from trainer.runtime import Runtime

PICTURES = 4  # of the first batch, that both precisions encode
MOST_ERROR = 0.03  # root mean square of the means' difference, over that of the means: bf16 has 8 bits, 0.4 %


def with_resolved(config: Config, saved: dict[str, Any]) -> Config:
    """The config with what a `saved` one of the same run decided in the place of `auto`."""
    kept = saved.get("model", {}).get("vae_precision")
    return _with_vae_precision(config, kept) if config.model.vae_precision == "auto" and kept is not None else config


def resolve_auto(checked: Preflight, runtime: Runtime, start: Found | None) -> Preflight:
    """The run without any `auto`: as its checkpoint has it, else decided now. Every rank calls it."""
    if checked.config.model.vae_precision != "auto":
        return checked

    def decide() -> Config:
        if start is not None:
            return with_resolved(checked.config, start.load()["config"])
        precision, why = vae_precision(checked, runtime.device, runtime.has_bf16)
        runtime.say(f"vae    in {precision} from now on: {why}")
        return _with_vae_precision(checked.config, precision)

    return replace(checked, loaded=replace(checked.loaded, config=runtime.from_main(decide)))


def vae_precision(checked: Preflight, device: torch.device, has_bf16: bool) -> tuple[str, str]:
    """What `auto` means for a new run on this device, and why."""
    if not has_bf16:
        return "fp32", f"this {device.type} has no fast bf16"
    config, roll = checked.config, checked.seen.call.roll
    components = config.model.load(config.train.seed)
    plan = roll.plan(config.data, config.train.global_batch_size, config.train.seed)
    first = list(dict.fromkeys(plan.record(slot) for slot in range(min(PICTURES, config.train.global_batch_size))))
    job = job_of(checked, roll.only(first), components, Encoders(components, device, "fp32"), device)
    variants = job.variants(1)
    pixels = Pictures(checked.records)[[Shown(record, variants.view(record, 0), b"") for record in first]]
    if isinstance(pixels, UserError):
        raise pixels
    torch.nn.Module.to(components.vae, device)
    error = bf16_error(components.vae, as_float(pixels.to(device)))
    components.forget("vae")
    if error <= MOST_ERROR:
        return "bf16", f"the latents of {len(pixels)} pictures are within {error:.2%} of fp32"
    return "fp32", f"in bf16 the latents of {len(pixels)} pictures are {error:.2%} off, over {MOST_ERROR:.0%}"


def bf16_error(vae: AutoencoderKL, pixels: Tensor) -> float:
    """How far the VAE's means of pixels [B, 3, H, W] are off in bf16, relative to fp32; infinite if not finite.

    Root mean square of the difference over that of the fp32 means. The VAE is left in bf16.
    """
    exact, _ = OnlineVae(vae, "fp32").posterior(pixels)
    rough, _ = OnlineVae(vae, "bf16").posterior(pixels)
    error = ((rough - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()
    return error if torch.isfinite(rough).all() else float("inf")


def _with_vae_precision(config: Config, precision: str) -> Config:
    model = config.model.model_copy(update={"vae_precision": precision})
    return config.model_copy(update={"model": model})
