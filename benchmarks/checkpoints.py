"""Checkpoints: what a save costs the steps around it, and how long a killed run takes until it trains again.

Every run is a `difftrain train` of its own, in shuffled rounds; this file is its plug-in. See README.md in this folder
for how to read the result.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from comparison import conclude
from pydantic import PrivateAttr
from startup import DIFFTRAIN, environment

from trainer.checkpoint import find_newest, save_checkpoint
from trainer.hook import CollectiveHook, MainHook, RunView
from trainer.hooks.checkpointing import tensors
from trainer.run.metrics import MetricsLog
from trainer.run.metrics import read as read_metrics
from trainer.run.rundir import RunDir

if TYPE_CHECKING:
    from trainer.training import Training

GAPS, MARKS = "step_gaps.json", "resume_marks.json"
WARM_UP = 3  # steps that are not looked at
EARLY = 10  # the step of the early checkpoint
NEVER = "checkpoint.every_steps=1000000000"
COLUMNS = {"step": 8, "longest": 9, "worst": 8, "stall": 8}  # of the first table, with their widths
IMPORTED = time.monotonic()  # as a plug-in: right before the config is validated

# A complete config: the tiny family on drawn shapes.
CONFIG = """
plugins: [checkpoints]
model: {{kind: tiny, unet_channels: {channels}, unet_head_width: 8}}
data: {{kind: shapes, image_size: 32, num_workers: 0}}
train: {{max_steps: 10, global_batch_size: 2}}
objective: {{kind: epsilon}}
lr: {{kind: constant, peak: 1e-4, warmup_steps: 0}}
ema: {{}}
"""


class StepClock(MainHook):
    """Writes down the time from the end of each step to the end of the next, with all that hooks did in it."""

    kind = "step_clock"

    _stamps: list[float] = PrivateAttr(default_factory=list)

    def due(self, step: int, last: bool) -> bool:
        return True

    def after_step(self, view: RunView, last: bool) -> None:
        self._stamps.append(time.perf_counter())

    def on_end(self, view: RunView, state: str, exit_code: int, reason: str) -> None:
        gaps = [later - earlier for earlier, later in zip(self._stamps, self._stamps[1:], strict=False)]
        (view.folder / GAPS).write_text(json.dumps(gaps), encoding="utf-8")


class PlainSave(CollectiveHook):
    """What a run without this trainer would do with the same state: torch.save and fsync, or a copy and no more."""

    kind = "plain_save"

    every_steps: int
    how: Literal["torch.save", "copy"]

    def due(self, step: int, last: bool) -> bool:
        return not last and step % self.every_steps == 0

    def after_step(self, training: Training, last: bool) -> None:
        import torch

        content = training.state.state_dict()
        if self.how == "copy":
            copies = [tensor.clone() for tensor in tensors(content)]
            assert copies, "a state without tensors"
            return
        with open(training.run_dir.path / f"plain-{training.state.step}.pt", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())


class DiesAfterOneStep(MainHook):
    """Writes down when the loop began and when its first step was done, and ends the process as by kill -9.

    So a run is where it was, and can be resumed from the same checkpoint again.
    """

    kind = "dies_after_one_step"

    _began: float = PrivateAttr()

    def due(self, step: int, last: bool) -> bool:
        return True

    def on_start(self, view: RunView) -> None:
        self._began = time.monotonic()

    def after_step(self, view: RunView, last: bool) -> None:
        marks = {"config": IMPORTED, "loop": self._began, "step": time.monotonic(), "number": view.step}
        (view.folder / MARKS).write_text(json.dumps(marks), encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)


def train(config: Path, folder: Path, threads: int, *more: str, expected: int = 0) -> float:
    """When a run began, on the monotonic clock; raises unless it ended with the `expected` exit code."""
    command = [*DIFFTRAIN, "train", "--config", str(config), "--output-dir", str(folder), *more]
    began = time.monotonic()
    done = subprocess.run(
        command, env=environment() | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
    )
    if done.returncode != expected:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return began


def variants(every: int) -> dict[str, list[str]]:
    """How a run saves -> config overrides."""

    def plain(how: str) -> list[str]:
        return [NEVER, f"hooks=[{{kind: plain_save, every_steps: {every}, how: {how}}}, {{kind: step_clock}}]"]

    ours = [f"checkpoint.every_steps={every}", "hooks=[{kind: step_clock}]"]
    return {
        "no saves": [NEVER, "hooks=[{kind: step_clock}]"],
        "torch.save": plain("torch.save"),
        "torch.save, again": plain("torch.save"),
        "copy alone": plain("copy"),
        "in the background": ours,
        "background=false": ["checkpoint.background=false", *ours],
    }


def save_rounds(args: argparse.Namespace, config: Path, folder: Path) -> tuple[dict[str, list[list[float]]], int]:
    """For each variant and round the gaps of its steps, from that of step 2 to the last but one; bytes of a checkpoint.

    The last step is left out: in all variants it saves in the foreground.
    """
    steps = (args.saves + 1) * args.every
    gaps: dict[str, list[list[float]]] = {name: [] for name in variants(args.every)}
    size_bytes = 0
    generator = random.Random(0)
    for number in range(args.rounds):
        for name in generator.sample(list(gaps), len(gaps)):
            run = folder / "saves"
            overrides = [f"train.max_steps={steps}", *variants(args.every)[name]]
            train(config, run, args.threads, "--set", *overrides)
            size_bytes = RunDir(run).checkpoint(steps).stat().st_size
            gaps[name].append(json.loads((run / GAPS).read_text(encoding="utf-8"))[:-1])
            shutil.rmtree(run)
            os.sync()  # what this run left to be written must not disturb the next
        print(f"saves: round {number + 1} of {args.rounds}", file=sys.stderr)
    return gaps, size_bytes


def longest(gaps: Sequence[float], every: int) -> list[float]:
    """For each save the longest gap from that of its own step to the last before the next save."""
    first = every - 2  # gaps[0] is that of step 2
    return [max(gaps[start : start + every]) for start in range(first, len(gaps), every)]


def stall(gaps: Sequence[float], every: int) -> float:
    """The longest gap at a save, the median over the saves, beyond the median step."""
    return statistics.median(longest(gaps, every)) - statistics.median(gaps[WARM_UP:])


def compare_saves(gaps: dict[str, list[list[float]]], every: int) -> dict[str, dict[str, Any]]:
    """For each variant: seconds of its median step and longest gaps, its stall over that of torch.save, round by round.

    `cost` is what a save costs in all: the longer mean of all gaps than in the run without saves, times the steps
    between two saves.
    """
    rows = {}
    for name, rounds in gaps.items():
        stalls = [stall(each, every) for each in rounds]
        plain = [stall(each, every) for each in gaps["torch.save"]]
        means = [statistics.fmean(each[WARM_UP:]) for each in rounds]
        without = [statistics.fmean(each[WARM_UP:]) for each in gaps["no saves"]]
        at_saves = [gap for each in rounds for gap in longest(each, every)]
        rows[name] = {
            "step": statistics.median(gap for each in rounds for gap in each[WARM_UP:]),
            "longest": statistics.median(at_saves),
            "worst": max(at_saves),
            "stall": statistics.median(stalls),
            "ratios": [ours / theirs for ours, theirs in zip(stalls, plain, strict=True)],
            "costs": [every * (ours - theirs) for ours, theirs in zip(means, without, strict=True)],
        }
    return rows


def moved_on(run: RunDir, folder: Path, step: int) -> RunDir:
    """`run` as it would be had it come to `step`: its newest checkpoint and its metrics, with the numbers changed."""
    found = find_newest(run, say=print)
    assert found is not None, "a run without a checkpoint"
    shutil.copytree(run.path, folder)
    moved = RunDir(folder)
    old = found.sidecar["step"]
    moved.sidecar(old).unlink()
    moved.checkpoint(old).unlink()
    content = {key: value for key, value in found.load().items() if key != "format"}
    own = {"format", "step", "file", "bytes", "sha256"}
    facts = {key: value for key, value in found.sidecar.items() if key not in own}
    save_checkpoint(moved, content | {"step": step}, facts)
    lines, log = read_metrics(moved.metrics), MetricsLog(moved.metrics)
    log.rewind(0)
    block = 10_000
    for first in range(1, step + 1, block):
        numbers = range(first, min(first + block, step + 1))
        log.append([lines[number % len(lines)] | {"step": number} for number in numbers])
        log.sync()
    log.close()
    return moved


def resume(config: Path, run: RunDir, step: int, threads: int) -> dict[str, float]:
    """Wall seconds from the start of a process that goes on after `step` to the end of its first step, with parts."""
    more = ["--resume", "latest", "--set", f"train.max_steps={step + 10}", "hooks=[{kind: dies_after_one_step}]"]
    began = train(config, run.path, threads, *more, expected=-signal.SIGKILL)
    marks = json.loads((run.path / MARKS).read_text(encoding="utf-8"))
    assert marks["number"] == step + 1, f"the first step was {marks['number']}, not {step + 1}"
    return {
        "wall": marks["step"] - began,
        "until the config is read": marks["config"] - began,
        "until the loop begins": marks["loop"] - marks["config"],
        "first step": marks["step"] - marks["loop"],
    }


def resume_rounds(args: argparse.Namespace, config: Path, folder: Path) -> dict[str, list[dict[str, float]]]:
    """For a run at an early step, its twin, and the same at a late step: what resuming took, round by round."""
    first = RunDir(folder / "early")
    train(config, first.path, args.threads, "--set", f"train.max_steps={EARLY}")
    early, again, late = f"step {EARLY}", f"step {EARLY}, again", f"step {args.late:,}"
    runs = {
        early: (moved_on(first, folder / "moved", EARLY), EARLY),
        again: (moved_on(first, folder / "again", EARLY), EARLY),
        late: (moved_on(first, folder / "late", args.late), args.late),
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    generator = random.Random(0)
    for number in range(args.resumes):
        for name in generator.sample(list(runs), len(runs)):
            run, step = runs[name]
            seconds[name].append(resume(config, run, step, args.threads))
        print(f"resumes: round {number + 1} of {args.resumes}", file=sys.stderr)
    return seconds


def compare_resumes(seconds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """For each run the medians of the parts, and its wall seconds over those of the early one, round by round."""
    early = next(iter(seconds.values()))
    return {
        name: {
            "seconds": {part: statistics.median(each[part] for each in rounds) for part in rounds[0]},
            "ratios": [ours["wall"] / theirs["wall"] for ours, theirs in zip(rounds, early, strict=True)],
        }
        for name, rounds in seconds.items()
    }


def print_saves(rows: dict[str, dict[str, Any]]) -> None:
    """The first table, in milliseconds."""
    head = "".join(f"{name:>{width}}" for name, width in COLUMNS.items())
    print(f"{'milliseconds':20}{head}   {'stall over torch.save':26}a save costs in all")
    for name, row in rows.items():
        seconds = "".join(f"{1000 * row[column]:{width}.0f}" for column, width in COLUMNS.items())
        ratios, cost = spread(row["ratios"]), spread([1000 * cost for cost in row["costs"]], 0)
        print(f"{name:20}{seconds}   {ratios:26}{cost}" if name != "no saves" else f"{name:20}{seconds}")


def print_resumes(rows: dict[str, dict[str, Any]]) -> None:
    """The second table, in seconds."""
    first = next(iter(rows))
    print(f"{'resumed after':24}{'wall s':>8}   {'over ' + first:26}parts, s")
    for name, row in rows.items():
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in row["seconds"].items() if part != "wall")
        print(f"{name:24}{row['seconds']['wall']:8.2f}   {spread(row['ratios']):26}{parts}")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median of `values` and their range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the JSON: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way to save (default 5; 0: none)")
    parser.add_argument("--saves", type=int, default=4, help="saves of a run (default 4)")
    parser.add_argument("--every", type=int, default=25, help="steps between saves (default 25)")
    parser.add_argument("--channels", type=int, nargs="+", default=[192, 224], help="of the UNet (default 192 224)")
    parser.add_argument("--resumes", type=int, default=9, help="resumes of each run (default 9; 0: none)")
    parser.add_argument("--late", type=int, default=1_000_000, help="step of the late one (default 1000000)")
    parser.add_argument("--threads", type=int, default=1, help="of torch in the runs, on the CPU (default 1)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, every round included")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        large, small = folder / "large.yaml", folder / "small.yaml"
        large.write_text(CONFIG.format(channels=args.channels), encoding="utf-8")
        small.write_text(CONFIG.format(channels=[32, 40]), encoding="utf-8")
        seconds = resume_rounds(args, small, folder) if args.resumes else {}
        gaps, size_bytes = save_rounds(args, large, folder) if args.rounds else ({}, 0)
    result = {name: value for name, value in vars(args).items() if name not in ("json", "folder")}
    if gaps:
        result |= {"checkpoint_bytes": size_bytes, "saving": compare_saves(gaps, args.every)}
        print_saves(result["saving"])
        print(f"checkpoints of {size_bytes / 1e6:.0f} MB, {args.every} steps apart; ", end="")
        print(f"{args.rounds} rounds of {args.saves} saves, {args.threads} thread{'s' * (args.threads > 1)}\n")
    if seconds:
        result["resuming"] = compare_resumes(seconds)
        print_resumes(result["resuming"])
        print(f"medians of {args.resumes} processes, from the start of each to the end of its first step")
    conclude(result, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
