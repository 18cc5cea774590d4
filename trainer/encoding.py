"""The frozen encoders of a run, on its device, and what of its data they encode before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from trainer.data.loader import Encoded
from trainer.data.roll import Roll
from trainer.encoder_cache.base import EncodingCache, Job
from trainer.encoder_cache.memory import in_memory
from trainer.latents import OnlineVae
from trainer.preflight import Preflight
from trainer.runtime import Runtime

if TYPE_CHECKING:
    from transformers import CLIPTextModel

    from trainer.models.base import Components


class Encoders:
    """The VAE and the text encoder on the run's device, each from when it is first asked for."""

    def __init__(self, components: Components, device: torch.device, vae_precision: str):
        self._components, self._device, self._vae_precision = components, device, vae_precision
        self._vae: OnlineVae | None = None
        self.needed = {"vae", "text_encoder"}  # at every step

    def vae(self) -> OnlineVae:
        """The frozen VAE."""
        if self._vae is None:
            network = self._components.vae
            nn.Module.to(network, self._device)
            self._vae = OnlineVae(network, self._vae_precision)
        return self._vae

    def text_encoder(self) -> CLIPTextModel:
        """The text encoder."""
        network = self._components.text_encoder
        # Not if it is there already: `to` would put other gradients in the place of those that DDP's buckets hold.
        if next(network.parameters()).device.type != self._device.type:  # `cpu` and `cpu:0` are one device
            nn.Module.to(network, self._device)
        return network

    def rest(self) -> None:
        """Free those that no step needs."""
        if "vae" not in self.needed:
            self._vae = None
            self._components.forget("vae")
        if "text_encoder" not in self.needed:
            self._components.forget("text_encoder")


def encoded(
    checked: Preflight,
    cache: EncodingCache,
    roll: Roll,
    components: Components,
    encoders: Encoders,
    runtime: Runtime,
    only: Iterable[int] | None = None,
) -> Encoded:
    """Everything that the run needs encoded; of the encoders, those are in memory that are needed for something new.

    With `only` these records alone, in memory.
    """
    with_text = cache.keeps_text(checked.config.model.train_text_encoder)
    if only is None:
        kept = cache.encode(job_of(checked, roll, components, encoders, runtime.device), with_text, runtime)
    else:
        job = job_of(checked, roll.only(only), components, encoders, runtime.device)
        kept = in_memory(job, cache.crops, with_text, runtime)
    encoders.needed -= {"vae", "text_encoder"} if with_text else {"vae"}
    encoders.rest()
    return kept


def job_of(checked: Preflight, roll: Roll, components: Components, encoders: Encoders, device: torch.device) -> Job:
    """What the run wants encoded, and by what."""
    config, survey = checked.config, checked.survey
    return Job(
        source=config.data,
        records=checked.records,
        roll=roll,
        most_held_out=0 if config.validation is None else config.validation.max_records,
        family=config.model,
        components=components,
        vae=encoders.vae,
        text_encoder=encoders.text_encoder,
        device=device,
        contents=survey.contents if survey else None,
        sizes=survey.sizes if survey else None,
    )
