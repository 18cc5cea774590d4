"""One run's parts, assembled: networks on their device, optimizer, data, and how to feed one to the other."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from trainer.checkpoint import Found, find, find_newest, named_run
from trainer.config import Config
from trainer.data.loader import Batch, Samples, SlotSchedule, load_batches
from trainer.data.plan import BatchPlan
from trainer.data.topology import Topology
from trainer.denoiser import Denoiser
from trainer.ema import Ema
from trainer.errors import UserError
from trainer.latents import CachedLatents, LatentSource, OnlineVae
from trainer.preflight import Preflight
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.sampler import Sampler
from trainer.state import TrainState, trainable_weights

if TYPE_CHECKING:
    from trainer.models.base import Components


@dataclass
class Training:
    """Everything a step, a collective hook, or the loop needs."""

    config: Config
    runtime: Runtime
    run_dir: RunDir
    topology: Topology
    components: Components
    model: nn.Module  # the Denoiser, wrapped for ranks and precision
    vae: OnlineVae
    latent_source: LatentSource
    state: TrainState
    samples: Samples
    held_out: Samples | None
    first_step: int = 0  # optimizer steps done before this start
    captions_cut: int = 0  # since this start
    measured: dict[str, Any] = field(default_factory=dict)  # what hooks measured after the newest step

    def batches(self, first_step: int, max_steps: int) -> Generator[Batch]:
        """This rank's micro batches from `first_step` on; closing it ends the loader's workers."""
        schedule = SlotSchedule(self.topology, first_step, max_steps)
        return load_batches(self.samples, schedule, pin_memory=self.runtime.device.type == "cuda")

    def sampler(self, steps: int, guidance: float) -> Sampler:
        """Draws pictures with the weights of the moment, at `steps` network evaluations each."""
        config, parts = self.config, self.components
        return Sampler(config.model, parts, config.objective, self.vae, config.data.image_size, steps, guidance)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the networks hold the averaged weights, in eval mode and the run's precision."""
        self.model.eval()
        with self.state.averaged(), self.runtime.autocast():
            yield
        self.model.train()


def assemble(checked: Preflight, runtime: Runtime, run_dir: RunDir, start: Found | None) -> Training:
    """The run, ready for its next step; raises UserError if weights cannot be loaded or do not fit."""
    config, family, device = checked.config, checked.config.model, runtime.device
    components = first_components(config) if start is None else family.load(config.train.seed)
    modules = family.trainable(components)
    if config.train.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
        if family.train_text_encoder:
            components.text_encoder.gradient_checkpointing_enable()
    vae = OnlineVae(components.vae.to(device), family.vae_precision)
    # All imports are done: what they made stays, and need not be searched for garbage. The wrapped model is not part of
    # it: it has to be gone before its process group is.
    gc.freeze()
    model = runtime.prepare(Denoiser(family, components).train())
    state = TrainState(modules, config.optimizer.build(trainable_weights(modules)), None, runtime.scaler)
    if config.ema is not None:
        state.ema = Ema(config.ema, state.weights())
    if start is not None:
        state.load_state_dict(start.load())
    samples = partial(
        Samples,
        records=checked.records,
        timesteps=config.timesteps,
        tokenize=partial(family.tokenize, components.tokenizer),
        latent_shape=family.latent_shape(components.vae, config.data.image_size),
    )
    train, validation = config.train, config.validation
    held_out = None
    if validation is not None and len(checked.held_out_indices):
        chosen = checked.held_out_indices[: validation.max_records]
        as_they_are = {"caption_dropout": 0.0, "random_flip": False, "center_crop": True}
        held_out = samples(
            source=config.data.model_copy(update=as_they_are),
            plan=BatchPlan(chosen, validation.seed, shuffle=False),
            global_batch=len(chosen),
            seed=validation.seed,
        )
    trained = samples(
        source=config.data,
        plan=BatchPlan(checked.training_indices, train.seed),
        global_batch=train.global_batch_size,
        seed=train.seed,
    )
    if config.cache is not None:
        trained.moments = config.cache.moments(trained, vae, runtime)
    return Training(
        config=config,
        runtime=runtime,
        run_dir=run_dir,
        topology=checked.topology,
        components=components,
        model=model,
        vae=vae,
        latent_source=CachedLatents(vae) if config.cache is not None else vae,
        state=state,
        samples=trained,
        held_out=held_out,
        first_step=state.step,
    )


def first_components(config: Config) -> Components:
    """The networks before the first step: the model's own weights, or those of the run it starts from."""
    family = config.model
    components = family.load(config.train.seed)
    if family.init_from is not None:
        load_weights(family.trainable(components), *named_run(family.init_from))
    return components


def load_weights(modules: dict[str, nn.Module], run_dir: RunDir, step: int | None, averaged: bool = True) -> int:
    """Load another run's weights, of its newest checkpoint for None, into `modules` and return their step.

    Its EMA weights if it has any and `averaged` is set. Raises UserError if the run, the checkpoint or a module is
    missing, or a shape does not fit.
    """
    found = find_newest(run_dir, say=lambda line: None) if step is None else find(run_dir, step)
    if found is None:
        raise UserError("there is no checkpoint in this folder", str(run_dir.path), "give the folder of a run")
    content = found.load()
    for name, module in modules.items():
        if name not in content["modules"]:
            there = ", ".join(content["modules"])
            raise UserError(f"the checkpoint holds no {name}", str(found.path), f"it holds: {there}")
        weights: dict[str, Any] = content["modules"][name]
        if averaged and content["ema"] is not None:
            prefix = f"{name}."
            weights = weights | {
                key.removeprefix(prefix): value for key, value in content["ema"].items() if key.startswith(prefix)
            }
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise UserError(f"the weights of {name} do not fit this model: {first}", str(found.path)) from None
    return content["step"]
