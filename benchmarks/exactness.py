"""What exactness costs: deterministic kernels, and randomness that is computed from each sample's place in the run.

Everything is timed in one process, in shuffled rounds; see README.md in this folder for how to read the result.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; deterministic mode wants it

import torch
from comparison import add_step_arguments, conclude
from loop_tax import Clock, Spent
from torch import Tensor

from trainer import loop
from trainer.config import Config
from trainer.config_file import LoadedConfig
from trainer.control import Control
from trainer.data.captions import caption_of
from trainer.data.loader import Samples
from trainer.hooks.checkpointing import copied
from trainer.hooks.metrics import Metrics
from trainer.hooks.progress import Progress
from trainer.preflight import Preflight, preflight
from trainer.rng import normal, randint, uniform
from trainer.run.metrics import read as read_metrics
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.training import assemble

NAMES = ("normal", "normal again", "deterministic")
SHAPES = ((4, 64, 64), (4, 8, 8))  # latents of 512 px and of 64 px pictures
CLOCKS = ("wall", "cpu")


class RepeatedRun:
    """One run that trains the same steps from the same state again and again: in one mode or the other."""

    def __init__(self, checked: Preflight, runtime: Runtime, folder: Path):
        self.clock = Clock()
        self.training = assemble(checked, runtime, RunDir(folder), None)
        self.hooks = [Metrics(), Progress(), self.clock]
        folder.mkdir()
        self._start: dict[str, Any] | None = None
        self.turn(deterministic=False)  # not timed
        self._start = copied(self.training.state.state_dict())

    def turn(self, deterministic: bool) -> tuple[Spent, list[float]]:
        """Train all its steps: what that took, and their losses."""
        torch.use_deterministic_algorithms(deterministic)  # as Runtime does for train.deterministic
        if self._start is not None:
            self.training.state.load_state_dict(self._start)
        self.training.state.step = 0
        control = Control()
        try:
            loop.run(self.training, self.hooks, control, print)
        finally:
            control.close()
            torch.use_deterministic_algorithms(False)
        return self.clock.spent, [line["loss"] for line in read_metrics(self.training.run_dir.metrics)]


def config_of(args: argparse.Namespace) -> Config:
    """A run of the tiny model on drawn shapes, `--steps` long, its pictures drawn and encoded in the same process."""
    return Config.model_validate(
        {
            "model": {"kind": "tiny"},
            "data": {"kind": "shapes", "image_size": args.image_size, "num_workers": 0, "caption_dropout": 0.1},
            "train": {"max_steps": args.steps, "global_batch_size": args.batch, "precision": args.precision},
            "objective": {"kind": "epsilon"},
            "lr": {"kind": "constant", "peak": 1e-4, "warmup_steps": 0},
            "ema": {},
        }
    )


def measure_modes(args: argparse.Namespace, checked: Preflight, runtime: Runtime) -> list[dict[str, list[Spent]]]:
    """For each set what the turns of each mode took, in shuffled order; the run is built anew for each set.

    The modes share one run, because two runs of one mode differ by several per cent for as long as they live.
    """
    generator = random.Random(0)
    sets: list[dict[str, list[Spent]]] = []
    for _ in range(args.sets):
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            run = RepeatedRun(checked, runtime, Path(folder) / "run")
            turns: dict[str, list[Spent]] = {name: [] for name in NAMES}
            losses: list[list[float]] = []
            for _ in range(args.rounds):
                for name in generator.sample(NAMES, len(NAMES)):
                    spent, of_turn = run.turn(deterministic=name == "deterministic")
                    turns[name].append(spent)
                    losses.append(of_turn)
            same = all(abs(a - b) < 1e-2 * a for turn in losses for a, b in zip(losses[0], turn, strict=True))
            assert same, f"the modes do not compute the same: {losses}"
            sets.append(turns)
    return sets


def compare_modes(sets: list[dict[str, list[Spent]]], steps: int, clock: str) -> dict[str, dict[str, Any]]:
    """For each mode by one of the clocks: milliseconds per step and speed over `normal`, with each set's own.

    A set's speed compares the quickest turns, for noise only ever adds time; the speed is the median over the sets.
    """
    rows = {}
    for name in NAMES:
        seconds = [[getattr(spent, clock) for spent in turns[name]] for turns in sets]
        normals = [[getattr(spent, clock) for spent in turns["normal"]] for turns in sets]
        speeds = [min(theirs) / min(ours) for ours, theirs in zip(seconds, normals, strict=True)]
        rows[name] = {
            "step_milliseconds": 1000 * min(each for turns in seconds for each in turns) / steps,
            "speed": statistics.median(speeds),
            "speeds_of_sets": speeds,
        }
    return rows


def draws(batch: int) -> dict[str, Callable[[Sequence[int]], Any]]:
    """By name: what draws something for the samples of `batch` slots, ours beside PyTorch's own generator."""
    config = Config.model_validate(
        {
            "model": {"kind": "tiny"},
            "data": {"kind": "shapes"},
            "train": {"max_steps": 1, "global_batch_size": batch},
            "objective": {"kind": "epsilon"},
            "lr": {"kind": "constant", "peak": 1e-4, "warmup_steps": 0},
        }
    )
    generator, law = torch.Generator(), config.timesteps
    found: dict[str, Callable[[Sequence[int]], Any]] = {}

    def ours(stream: str, shape: tuple[int, ...]) -> Callable[[Sequence[int]], Tensor]:
        return lambda slots: normal(0, stream, slots, shape)

    def theirs(shape: tuple[int, ...]) -> Callable[[Sequence[int]], Tensor]:
        return lambda slots: torch.randn((len(slots), *shape), generator=generator)

    for shape in SHAPES:
        size = "x".join(map(str, shape))
        found[f"torch.randn {size}"] = theirs(shape)
        found[f"noise {size}"] = ours("noise", shape)
        found[f"posterior {size}"] = ours("posterior", shape)
    found["time"] = lambda slots: law.draw(0, slots, batch)
    found["caption"] = lambda slots: [
        (uniform(0, "caption_dropout", slot), randint(0, "caption", slot, 5)) for slot in slots
    ]
    found["torch.rand, one number"] = lambda slots: [torch.rand((), generator=generator).item() for _ in slots]
    return found


def measure_draws(batch: int, repeats: int) -> dict[str, float]:
    """Microseconds per sample of each draw, the median over `repeats` shuffled rounds."""
    functions, seen, shuffled = draws(batch), {}, random.Random(0)
    for number in range(repeats):
        slots = range(number * batch, (number + 1) * batch)
        for name in shuffled.sample(list(functions), len(functions)):
            seen.setdefault(name, []).append(_seconds(lambda name=name, slots=slots: functions[name](slots)) / batch)
    return {name: 1e6 * statistics.median(seen[name]) for name in functions}


def loader_draws(samples: Samples, slots: Sequence[int]) -> None:
    """Everything that `Samples.batch` draws for these slots, and nothing else."""
    source, seed = samples.source, samples.seed
    for slot in slots:
        index = samples.plan.record(slot)
        caption_of(source, samples.records[index].captions, seed, slot)
        streams = [] if source.center_crop else ["crop_x", "crop_y"]
        for stream in streams + ["flip"] * source.random_flip:
            uniform(seed, stream, slot)
    samples.timesteps.draw(seed, slots, samples.global_batch)
    normal(seed, "noise", slots, samples.latent_shape(*samples.size(0)))
    normal(seed, "posterior", slots, samples.latent_shape(*samples.size(0)))


def share_of_a_step(
    args: argparse.Namespace, checked: Preflight, runtime: Runtime, step_milliseconds: float
) -> dict[str, float]:
    """Milliseconds that the draws of one step take in the loader, and their share of the step."""
    with tempfile.TemporaryDirectory() as folder:
        samples = assemble(checked, runtime, RunDir(folder), None).samples
    times = []
    for step in range(args.repeats):
        slots = range(step * args.batch, (step + 1) * args.batch)
        times.append(_seconds(lambda slots=slots: loader_draws(samples, slots)))
    milliseconds = 1000 * statistics.median(times)
    return {"milliseconds": milliseconds, "share": milliseconds / step_milliseconds}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the JSON: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser, "runs")
    parser.add_argument("--repeats", type=int, default=300, help="times that each draw is timed (default 300)")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    config = config_of(args)
    runtime = Runtime(config.train.precision, deterministic=False)
    checked = preflight(LoadedConfig(config, Path("exactness"), "", {}), 0, 1)
    sets = measure_modes(args, checked, runtime)
    modes = {clock: compare_modes(sets, args.steps, clock) for clock in CLOCKS}
    microseconds = measure_draws(args.batch, args.repeats)
    step = modes["wall"]["normal"]["step_milliseconds"]
    loader = share_of_a_step(args, checked, runtime, step)

    for clock, rows in modes.items():
        print(f"{clock + ' clock':18}{'ms/step':>9}{'speed':>9}   lowest to highest set")
        for name, row in rows.items():
            low, high = min(row["speeds_of_sets"]), max(row["speeds_of_sets"])
            print(f"{name:18}{row['step_milliseconds']:9.2f}{row['speed']:9.3f}   {low:.3f} to {high:.3f}")
        print()
    step_of = f"tiny model, batch {args.batch}, {args.image_size} px, {args.precision} on {runtime.device.type}"
    print(f"{args.sets} sets of {args.rounds} turns of {args.steps} steps, the quickest of each; {step_of}, ", end="")
    print(f"{args.threads} thread{'s' * (args.threads > 1)}\n")
    print(f"{'a draw':26}{'us a sample':>12}{'x torch.randn':>15}")
    for name, each in microseconds.items():
        size = name.rpartition(" ")[2]
        base = microseconds.get(f"torch.randn {size}")
        print(f"{name:26}{each:12.2f}" + (f"{each / base:15.2f}" if base else ""))
    print(f"\nall draws of a step, in-process: {loader['milliseconds']:.2f} ms of {step:.2f}, {loader['share']:.1%}")
    sizes = {name: value for name, value in vars(args).items() if name != "json"}
    speed = {clock: rows["deterministic"]["speed"] for clock, rows in modes.items()}
    result = {"speed": speed, "device": runtime.device.type, **sizes, "modes": modes}
    conclude({**result, "draw_microseconds": microseconds, "draws_of_a_step": loader}, arguments, args.json)
    return 0


def _seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
