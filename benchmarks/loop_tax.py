"""The loop tax: time per step of difftrain over that of a bare PyTorch loop, same maths, same model, data in memory.

Both loops live in one process and take turns in shuffled order; a turn is `--steps` steps. A second bare loop is the
control: whatever its ratio to the first one is, is noise. Two identical loops differ by about 1 % for as long as they
live, so all are built anew `--sets` times. Beside the ratio stand the host's microseconds of a step without a network,
which noise cannot hide. How to read it: README.md.
"""

from __future__ import annotations

import argparse
import operator
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from comparison import add_step_arguments, conclude
from host_time import RANKS, of_ranks, text_of
from pydantic import PrivateAttr
from torch import Tensor

from trainer import loop
from trainer.config import Config
from trainer.config_file import LoadedConfig
from trainer.control import Control
from trainer.data.loader import Batch
from trainer.hook import MainHook, RunView
from trainer.hooks.metrics import Metrics
from trainer.hooks.progress import Progress
from trainer.models.base import ModelFamily
from trainer.preflight import preflight
from trainer.run.metrics import read as read_metrics
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.training import Training, assemble

NAMES = ("bare", "bare again", "difftrain")
LOG_EVERY = 10  # steps between waits for the device, in both loops
LR, DECAY, MAX_NORM = 1e-4, 0.999, 1.0


@dataclass(frozen=True)
class Spent:
    """Seconds on the wall, and seconds of this process on any core: other processes disturb the second far less."""

    wall: float
    cpu: float

    def __sub__(self, earlier: Spent) -> Spent:
        return Spent(self.wall - earlier.wall, self.cpu - earlier.cpu)


def now() -> Spent:
    """Both clocks."""
    return Spent(time.perf_counter(), time.process_time())


class BareLoop:
    """What a competent person writes for one device and one purpose, over batches and latents in memory."""

    def __init__(self, family: ModelFamily, seed: int, batches: list[Batch], latents: list[Tensor], bf16: bool):
        self.batches, self.latents, self.bf16 = batches, latents, bf16
        self.device = latents[0].device
        components = family.load(seed)
        self.unet = components.unet.to(self.device)  # pyright: ignore
        self.text_encoder = components.text_encoder.requires_grad_(False).to(self.device)  # pyright: ignore
        self.parameters = list(self.unet.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.01, fused=True)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        bars = torch.cumprod(1 - betas, dim=0).float().to(self.device)
        self.alpha, self.sigma = bars.sqrt(), (1 - bars).sqrt()
        self.loss = 0.0

    def turn(self) -> Spent:
        """Train on every batch once, and say what it took."""
        began = now()
        for step, (batch, x0) in enumerate(zip(self.batches, self.latents, strict=True), start=1):
            tokens, t, eps = (x.to(self.device, non_blocking=True) for x in (batch.text, batch.t, batch.eps))
            level = (t * 1000).long()
            x_t = self.alpha[level].view(-1, 1, 1, 1) * x0 + self.sigma[level].view(-1, 1, 1, 1) * eps
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                with torch.no_grad():
                    cond = self.text_encoder(tokens[:, 0]).last_hidden_state
                pred = self.unet(x_t, level, encoder_hidden_states=cond, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(pred.float(), eps)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - DECAY)  # pyright: ignore
            if step % LOG_EVERY == 0 or step == len(self.batches):
                self.loss = loss.item()
                print(f"step {step} loss {self.loss:.4f}", flush=True)
        _wait_for(self.device)
        return now() - began


class OurLoop:
    """`trainer.loop.run` itself with the hooks of a real run that act at every logging step, over the same batches."""

    def __init__(self, training: Training, batches: list[Batch], latents: list[Tensor]):
        self.training, self.clock = training, Clock()
        stored = {batch.slots[0]: batch for batch in batches}
        training.samples.batch = lambda slots: stored[slots[0]]
        training.latent_source = StoredLatents(batches, latents)
        self.hooks = [Metrics(), Progress(), self.clock]

    @property
    def loss(self) -> float:
        """That of the last step of the last turn."""
        return read_metrics(self.training.run_dir.metrics)[-1]["loss"]

    def turn(self) -> Spent:
        """Train on every batch once, and say what the loop took."""
        self.training.state.step = 0
        control = Control()
        try:
            loop.run(self.training, self.hooks, control, print)
        finally:
            control.close()
        return self.clock.spent


class StoredLatents:
    """A LatentSource that has every batch's latents already."""

    def __init__(self, batches: list[Batch], latents: list[Tensor]):
        self.by_slot = {batch.slots[0]: x0 for batch, x0 in zip(batches, latents, strict=True)}

    def latents(self, batch: Batch) -> Tensor:
        return self.by_slot[batch.slots[0]]


class Clock(MainHook):
    """Put last among the hooks, it hears of the loop's first step after the others and of its end with them.

    Opening a run belongs to no step, so it is not timed.
    """

    _began: Spent = PrivateAttr()
    _spent: Spent = PrivateAttr()

    @property
    def spent(self) -> Spent:
        """On the last turn."""
        return self._spent

    def on_start(self, view: RunView) -> None:
        self._began = now()

    def on_end(self, view: RunView, state: str, exit_code: int, reason: str) -> None:
        self._spent = now() - self._began


def config_of(args: argparse.Namespace) -> Config:
    """A run of the tiny model on drawn shapes, `--steps` long."""
    return Config.model_validate(
        {
            "model": {"kind": "tiny"},
            "data": {"kind": "shapes", "image_size": args.image_size, "num_workers": 0},
            "train": {
                "max_steps": args.steps,
                "global_batch_size": args.batch,
                "precision": args.precision,
                "log_every": LOG_EVERY,
                "max_grad_norm": MAX_NORM,
            },
            "objective": {"kind": "epsilon"},
            "lr": {"kind": "constant", "peak": LR, "warmup_steps": 0},
            "ema": {"decay": DECAY, "warmup": False},
        }
    )


def prepare(args: argparse.Namespace, folder: Path, order: Sequence[str]) -> dict[str, OurLoop | BareLoop]:
    """The loops of NAMES, built in this order, over the same batches and from the same weights."""
    config = config_of(args)
    runtime = Runtime(config.train.precision, config.train.deterministic)
    run_dir, checked = RunDir(folder), preflight(LoadedConfig(config, Path("loop_tax"), "", {}), 0, 1)
    training = assemble(checked, runtime, run_dir, None)
    batches = list(training.batches(0, args.steps))
    latents = [training.encoders.vae().latents(batch.to(runtime.device)) for batch in batches]
    # Pixels have done their part; on a GPU their copy would be ours alone.
    batches = [replace(batch, pixels=torch.empty(0), posterior_eps=torch.empty(0)) for batch in batches]

    def build(name: str) -> OurLoop | BareLoop:
        if name == "difftrain":
            return OurLoop(assemble(checked, runtime, run_dir, None), batches, latents)
        return BareLoop(config.model, config.train.seed, batches, latents, args.precision == "bf16")

    return {name: build(name) for name in order}


def measure(args: argparse.Namespace) -> list[dict[str, list[Spent]]]:
    """For each set what each loop's turns took; turns that are not timed check that all loops do the same maths."""
    generator = random.Random(0)
    sets: list[dict[str, list[Spent]]] = []
    for _ in range(args.sets):
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            loops = prepare(args, Path(folder), generator.sample(NAMES, len(NAMES)))
            for each in loops.values():
                each.turn()
            losses = [each.loss for each in loops.values()]
            assert max(losses) - min(losses) < 1e-3 * min(losses), f"the loops do not compute the same: losses {losses}"
            turns: dict[str, list[Spent]] = {name: [] for name in NAMES}
            for _ in range(args.rounds):
                for name in generator.sample(NAMES, len(NAMES)):
                    turns[name].append(loops[name].turn())
            sets.append(turns)
    return sets


def compare(sets: list[dict[str, list[Spent]]], steps: int, clock: str) -> dict[str, dict[str, Any]]:
    """For each loop by one of the clocks: milliseconds per step and ratio to `bare`, with each set's own ratio.

    A set's ratio is the median over its rounds, the ratio the median over the sets.
    """
    rows = {}
    for name in NAMES:
        seconds = [[getattr(spent, clock) for spent in turns[name]] for turns in sets]
        bares = [[getattr(spent, clock) for spent in turns["bare"]] for turns in sets]
        ratios = [statistics.median(map(operator.truediv, *pair)) for pair in zip(seconds, bares, strict=True)]
        rows[name] = {
            "step_milliseconds": 1000 * statistics.median(chain(*seconds)) / steps,
            "ratio": statistics.median(ratios),
            "ratios_of_sets": ratios,
        }
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser, "loops")
    parser.add_argument("--host-steps", type=int, default=3000, help="steps without a network (default 3000)")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    sets, device = measure(args), torch.accelerator.current_accelerator() or torch.device("cpu")
    clocks = {clock: compare(sets, args.steps, clock) for clock in ("wall", "cpu")}
    for clock, rows in clocks.items():
        print(f"{clock + ' clock':12}{'ms/step':>9}{'x bare':>9}   lowest to highest set")
        for name, row in rows.items():
            low, high = min(row["ratios_of_sets"]), max(row["ratios_of_sets"])
            print(f"{name:12}{row['step_milliseconds']:9.2f}{row['ratio']:9.3f}   {low:.3f} to {high:.3f}")
        print()
    turns_of = f"medians of {args.sets} sets of {args.rounds} rounds of {args.steps} steps"
    step_of = f"tiny model, batch {args.batch}, {args.image_size} px, {args.precision} on {device.type}"
    print(f"{turns_of}; {step_of}, {args.threads} thread{'s' * (args.threads > 1)}")
    host = [of_ranks(ranks, args.host_steps) for ranks in RANKS]
    print("\nthe host, " + "\nthe host, ".join(map(text_of, host)))
    size = {name: value for name, value in vars(args).items() if name != "json"}
    tax = {clock: rows["difftrain"]["ratio"] for clock, rows in clocks.items()}
    conclude({"loop_tax": tax, "device": device.type, **size, "clocks": clocks, "host": host}, arguments, args.json)
    return 0


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
