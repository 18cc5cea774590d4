"""Pictures from a finished or running run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import Config
from trainer.grid import labelled_grid
from trainer.latents import OnlineVae
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.sampler import Sampler
from trainer.training import load_weights

if TYPE_CHECKING:
    from PIL.Image import Image


def draw(
    config: Config,
    run: Path,
    checkpoint: int | None,
    prompts: Sequence[str],
    seed: int,
    steps: int,
    guidance: float,
    averaged: bool,
) -> tuple[int, Image]:
    """The step of the weights (the newest for None), and the picture of one prompt or the labelled grid of several.

    Raises UserError as loading does.
    """
    step, sampler, runtime = sampler_of(config, run, checkpoint, steps, guidance, averaged)
    try:
        with runtime.autocast():
            pictures = sampler.draw(prompts, seed, range(len(prompts)))
    finally:
        runtime.close()
    if len(pictures) == 1:
        return step, pictures[0]
    weights = "EMA" if averaged and config.ema else "current"
    title = f"step {step} · {weights} weights · {steps} steps · guidance {guidance:g} · seed {seed}"
    return step, labelled_grid(pictures, prompts, title)


def sampler_of(
    config: Config, run: Path, checkpoint: int | None, steps: int, guidance: float, averaged: bool
) -> tuple[int, Sampler, Runtime]:
    """The step of a run's weights, a sampler with them on this machine's device, and the runtime to call it under."""
    runtime = Runtime("fp32" if config.train.precision == "fp16" else config.train.precision, deterministic=False)
    components = config.model.load(config.train.seed)
    modules = config.model.trainable(components)
    step = load_weights(modules, RunDir(run), checkpoint, averaged)
    for network in (components.unet, components.text_encoder, components.vae):
        network.to(runtime.device).eval()  # pyright: ignore[reportArgumentType]
    vae = OnlineVae(components.vae, config.model.vae_precision)
    size = config.data.image_size
    return step, Sampler(config.model, components, config.objective, vae, size, steps, guidance), runtime
