"""The two loops that are compared on a device: difftrain's own, and what a competent person writes for one purpose.

Both train the same random network on the same three batches, which lie on the device, and mark the end of every step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from gpu_device import Marks, forget_peak
from gpu_model import KEPT, shape_of, unet_on
from gpu_step import SEED, Data, alphas_and_sigmas, family_of
from pydantic import PrivateAttr
from torch import Tensor

from trainer import loop
from trainer.config import Config
from trainer.config_file import LoadedConfig
from trainer.control import Control
from trainer.hook import Hook, MainHook, RunView
from trainer.hooks.metrics import Metrics
from trainer.hooks.progress import Progress
from trainer.latents import CachedLatents
from trainer.preflight import preflight
from trainer.run.metrics import read as read_metrics
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.training import Training, assemble

LR, DECAY, MAX_NORM = 1e-5, 0.9999, 1.0
LOG_EVERY = 10  # steps between waits for the device, in both loops


class BareLoop:
    """A PyTorch loop without a feature to spare: autocast, fused AdamW, clipping, EMA, a loss fetched at times."""

    def __init__(self, data: Data):
        self.data, step = data, data.step
        self.family = family_of(step, data.device)
        self.unet: Any = unet_on(data.device, shape_of(step.model).unet, SEED).train()
        self.parameters = list(self.unet.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.01, fused=True)
        self.alpha, self.sigma = alphas_and_sigmas(data.device)

    def answer(self) -> Tensor:
        """To the first batch, as training computes it."""
        return self._predict(*self.data.noisy(), self.data.batches[0].text)

    def _predict(self, x_t: Tensor, time: Tensor, text: Tensor) -> Tensor:
        on = self.data.step.precision == "bf16"
        with torch.autocast(self.data.device.type, torch.bfloat16, enabled=on):
            return self.family.predict(self.unet, x_t, time, text).float()

    def run(self, marks: Marks) -> list[float]:
        """Train `warm` and `steps` steps: the loss of each."""
        step, losses = self.data.step, []
        for number in range(step.warm + step.steps):
            batch, x0 = self.data.batches[number % KEPT], self.data.latents[number % KEPT]
            level = (batch.t * 1000).long()
            x_t = self.alpha[level].view(-1, 1, 1, 1) * x0 + self.sigma[level].view(-1, 1, 1, 1) * batch.eps
            self.optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.mse_loss(self._predict(x_t, level, batch.text), batch.eps)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - DECAY)  # pyright: ignore
            losses.append(loss.detach())
            if (number + 1) % LOG_EVERY == 0:
                print(f"step {number + 1} loss {losses[-1].item():.4f}", flush=True)
            marks.add()
            if number + 1 == step.warm:
                forget_peak(self.data.device)
        return torch.stack(losses).tolist()

    def close(self) -> None:
        """Nothing is left to end."""


class Clock(MainHook):
    """Marks the end of every step, once all that belongs to it was done or queued."""

    _act: Callable[[int], None] = PrivateAttr()

    def calls(self, act: Callable[[int], None]) -> Clock:
        """Call `act` with the number of steps done after each of them."""
        self._act = act
        return self

    def due(self, step: int, last: bool) -> bool:
        return True

    def after_step(self, view: RunView, last: bool) -> None:
        self._act(view.step)


class OurLoop:
    """`trainer.loop.run` with the hooks of a real run that act at every logging step."""

    def __init__(self, data: Data, folder: Path, overrides: Mapping[str, Any], hooks: Sequence[Hook] = ()):
        self.data, self.hooks = data, list(hooks)
        config = config_of(data, overrides)
        self.runtime = Runtime(config.train.precision, config.train.deterministic)
        checked = preflight(LoadedConfig(config, Path("gpu"), "", {}), 0, 1)
        self.training: Training = assemble(checked, self.runtime, RunDir(folder), None)
        stored = data.batches
        self.training.samples.batch = lambda slots: stored[slots[0] // len(slots) % KEPT]
        self.training.latent_source = CachedLatents(self.training.components.vae_config)

    def answer(self) -> Tensor:
        """To the first batch, as training computes it; the first call compiles what is to be compiled."""
        batch, objective = self.data.batches[0], self.training.config.objective
        x_t, _ = objective.corrupt(self.data.latents[0], batch.eps, batch.t)
        return self.training.model(x_t, objective.model_time(batch.t), batch.text).float()

    def run(self, marks: Marks) -> list[float]:
        """Train `warm` and `steps` steps: the loss of each."""

        def mark(step: int) -> None:
            marks.add()
            if step == self.data.step.warm:
                forget_peak(self.data.device)

        control = Control()
        try:
            loop.run(self.training, [Metrics(), Progress(), *self.hooks, Clock().calls(mark)], control, print)
        finally:
            control.close()
        return [line["loss"] for line in read_metrics(self.training.run_dir.metrics)]

    def close(self) -> None:
        """Leave the runtime's process group and settings."""
        del self.training
        self.runtime.close()


def config_of(data: Data, overrides: Mapping[str, Any]) -> Config:
    """The run of a step; `overrides` names what differs, as `train.log_every` does."""
    step = data.step
    values: dict[str, Any] = {
        "model": {"kind": "benchmark", "network": step.model, "device": str(data.device)},
        "data": {"kind": "shapes", "image_size": step.pixels, "num_workers": 0, "num_images": max(8, step.images)},
        "train": {
            "seed": SEED,
            "max_steps": step.warm + step.steps,
            "global_batch_size": step.images,
            "micro_batch_size": step.batch,
            "precision": step.precision,
            "log_every": LOG_EVERY,
            "max_grad_norm": MAX_NORM,
        },
        "objective": {"kind": "epsilon"},
        "lr": {"kind": "constant", "peak": LR, "warmup_steps": 0},
        "ema": {"decay": DECAY, "warmup": False},
    }
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return Config.model_validate(values)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within it what loops print goes nowhere, as it would to a log."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
