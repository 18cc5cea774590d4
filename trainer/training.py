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
from trainer.data.loader import Batch, Encoded, Samples, SlotSchedule, load_batches
from trainer.data.plan import BatchPlan, Plan
from trainer.data.roll import Roll
from trainer.data.topology import Topology
from trainer.denoiser import Denoiser
from trainer.ema import Ema
from trainer.encoding import Encoders, encoded
from trainer.errors import UserError
from trainer.kernels import arrange, compile_networks, eagerly
from trainer.latents import CachedLatents, LatentSource
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
    denoiser: Denoiser
    model: nn.Module  # the same, wrapped for ranks and precision
    encoders: Encoders
    latent_source: LatentSource
    state: TrainState
    samples: Samples
    held_out: Samples | None
    unreadable: int = 0  # pictures that are left out because they cannot be read
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
        vae = self.encoders.vae()
        self.encoders.text_encoder()
        return Sampler(config.model, parts, config.objective, vae, config.data.image_size, steps, guidance)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the networks hold the averaged weights, in eval mode and the run's precision."""
        self.runtime.finish_copies()  # of the weights as they are
        if not self.runtime.gradients_are_buckets:
            self.state.optimizer.zero_grad(set_to_none=True)  # their memory is worth a few more pictures
        self.model.eval()
        compiled = self.config.train.compile != "none"
        with self.state.averaged(), self.runtime.autocast(), eagerly() if compiled else contextlib.nullcontext():
            yield
        self.model.train()
        self.encoders.rest()


def assemble(
    checked: Preflight, runtime: Runtime, run_dir: RunDir, start: Found | None, first_step_only: bool = False
) -> Training:
    """The run, ready for its next step; raises UserError if weights cannot be loaded or do not fit.

    With `first_step_only` a cache is not touched: what that step needs is encoded into memory.
    """
    config, family, device = checked.config, checked.config.model, runtime.device
    components = first_components(config) if start is None else family.load(config.train.seed)
    modules = family.trainable(components)
    if config.train.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
        if family.train_text_encoder:
            components.text_encoder.gradient_checkpointing_enable()
    arrange(components.unet, config.train)
    encoders = Encoders(components, device, family.vae_precision)
    roll = runtime.from_main(lambda: checked.seen.call.roll)
    plan, kept = roll.plan(config.data, config.train.global_batch_size, config.train.seed), None
    if config.cache is not None:
        first = map(plan.record, range(config.train.global_batch_size)) if first_step_only else None
        kept = encoded(checked, config.cache, roll, components, encoders, runtime, first)
    text_encoder = encoders.text_encoder() if "text_encoder" in encoders.needed else None
    latent_source = encoders.vae() if kept is None else CachedLatents(components.vae_config)
    # All imports are done: what they made stays, and need not be searched for garbage. The wrapped model is not part of
    # it: it has to be gone before its process group is.
    gc.freeze()
    denoiser = Denoiser(family, components.unet, text_encoder).train()
    model = runtime.prepare(denoiser)
    shapes = max(1, len(roll.buckets))
    compiled = compile_networks(modules, config.train, family.blocks, shapes, runtime.world_size)
    if compiled:
        runtime.say(
            f"compile {compiled} part{'s' * (compiled > 1)} of {', '.join(modules)} x {shapes} shape"
            f"{'s' * (shapes > 1)} of a batch, alike parts once: minutes, at the first step of each shape"
        )
    state = TrainState(modules, config.optimizer.build(trainable_weights(modules)), None, runtime.scaler)
    if config.ema is not None:
        state.ema = Ema(config.ema, state.weights())
    if start is not None:
        state.load_state_dict(start.load())
    if checked.survey is not None:
        checked.survey.forget_what_is_done_with()
    trained, held_out = _samples(checked, roll, plan, components, kept)
    return Training(
        config=config,
        runtime=runtime,
        run_dir=run_dir,
        topology=checked.topology,
        components=components,
        denoiser=denoiser,
        model=model,
        encoders=encoders,
        latent_source=latent_source,
        state=state,
        samples=trained,
        held_out=held_out,
        unreadable=roll.unreadable,
        first_step=state.step,
    )


def _samples(
    checked: Preflight, roll: Roll, plan: Plan, components: Components, kept: Encoded | None
) -> tuple[Samples, Samples | None]:
    """The samples that are trained on, and those that the held-out loss is taken over, if any."""
    config = checked.config
    train, validation = config.train, config.validation
    samples = partial(
        Samples,
        records=checked.records,
        timesteps=config.timesteps,
        tokenize=partial(config.model.tokenize, components.tokenizer),
        latent_shape=partial(config.model.latent_shape, components.vae_config),
        encoded=kept,
    )
    trained = samples(source=config.data, plan=plan, global_batch=train.global_batch_size, seed=train.seed)
    if validation is None or not len(roll.held_out):
        return trained, None
    chosen = roll.held_out[: validation.max_records]
    as_they_are = {"caption_dropout": 0.0, "random_flip": False, "center_crop": True}
    held_out = samples(
        source=config.data.model_copy(update=as_they_are),
        plan=BatchPlan(chosen, validation.seed, shuffle=False),
        global_batch=len(chosen),
        seed=validation.seed,
    )
    return trained, held_out


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
