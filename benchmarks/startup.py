"""Start-up: what a person waits for before `difftrain --help`, `difftrain validate` and a first training step.

Every run is a process of its own, in shuffled order. See README.md in this folder for how to read the result.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from comparison import conclude
from pydantic import PrivateAttr

from trainer.hook import MainHook, RunView

MARKS = "startup_marks.json"
DIFFTRAIN = (sys.executable, "-m", "trainer")
PARTS = ("until the config is read", "data, imports, model", "first batch", "first step")

# A complete config: the tiny model on drawn shapes. This file is its plug-in.
CONFIG = """
plugins: [startup]
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0}
train: {max_steps: 2, global_batch_size: 4}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-4, warmup_steps: 0}
hooks: [{kind: startup_marks}]
"""


class StartupMarks(MainHook):
    """Writes down when the config was being read, when the loop began, and when its first step was done."""

    kind = "startup_marks"

    _marks: dict[str, float] = PrivateAttr(default_factory=lambda: {"config": IMPORTED})

    def due(self, step: int, last: bool) -> bool:
        return step == 1

    def on_start(self, view: RunView) -> None:
        self._marks["loop"] = time.monotonic()

    def after_step(self, view: RunView, last: bool) -> None:
        self._marks["step"] = time.monotonic()
        (view.folder / MARKS).write_text(json.dumps(self._marks), encoding="utf-8")


IMPORTED = time.monotonic()  # as a plug-in: right before the config is validated


def environment() -> dict[str, str]:
    """This process's, with this folder where Python looks for plug-ins, and one thread.

    Two threads wait for each other actively: on a busy machine the first step would measure that.
    """
    paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def run(command: Sequence[str]) -> dict[str, float]:
    """Wall and CPU seconds of `command`, and when it began on the monotonic clock; raises if it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, "began": began}


def train(config: Path, folder: Path) -> dict[str, float]:
    """The parts of the way from the process's start to the end of its first optimizer step, wall seconds."""
    spent = run([*DIFFTRAIN, "train", "--config", str(config), "--output-dir", str(folder)])
    marks = json.loads((folder / MARKS).read_text(encoding="utf-8"))
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    batch = first["timing"]["data_wait_seconds"]
    return {
        "wall": marks["step"] - spent["began"],
        "cpu": spent["cpu"],  # of the whole process: one more step and a checkpoint
        PARTS[0]: marks["config"] - spent["began"],
        PARTS[1]: marks["loop"] - marks["config"],
        PARTS[2]: batch,
        PARTS[3]: marks["step"] - marks["loop"] - batch,
    }


def imports(config: Path, folder: Path) -> dict[str, float]:
    """Seconds that a training process imports for: `all`, then the heaviest packages (`-X importtime` is not free)."""
    arguments = ["train", "--config", str(config), "--output-dir", str(folder)]
    command = [sys.executable, "-X", "importtime", *DIFFTRAIN[1:], *arguments]
    listing = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stderr
    microseconds: Counter[str] = Counter()
    for own, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", listing, re.MULTILINE):
        microseconds[module.partition(".")[0]] += int(own)
    return {"all": microseconds.total() / 1e6} | {name: own / 1e6 for name, own in microseconds.most_common(8)}


def measure(runs: int, folder: Path) -> dict[str, dict[str, float]]:
    """The median of everything that is timed, for each command."""
    config = folder / "config.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    validate = [*DIFFTRAIN, "validate", "--config", str(config), "--output-dir"]
    commands = {
        'python -c "import torch"': lambda number: run([sys.executable, "-c", "import torch"]),
        "difftrain --help": lambda number: run([*DIFFTRAIN, "--help"]),
        "difftrain validate": lambda number: run([*validate, str(folder / f"validate-{number}")]),
        "difftrain train": lambda number: train(config, folder / f"train-{number}"),
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    order, generator = list(commands), random.Random(0)
    run([sys.executable, "-c", "import torch, diffusers, transformers"])  # reads the files into the page cache
    for number in range(runs):
        generator.shuffle(order)
        for name in order:
            seen[name].append(commands[name](number))
    return {
        name: {part: statistics.median(each[part] for each in results) for part in results[0] if part != "began"}
        for name, results in seen.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the JSON: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="processes started for each command (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        medians = measure(args.runs, Path(folder))
        packages = imports(Path(folder) / "config.yaml", Path(folder) / "imports")
    whole, start = medians['python -c "import torch"'], medians["difftrain train"]
    print(f"{'command':28}{'wall s':>8}{'CPU s':>8}   CPU / import torch")
    for name, parts in medians.items():
        print(f"{name:28}{parts['wall']:8.3f}{parts['cpu']:8.3f}{parts['cpu'] / whole['cpu']:8.2f}")
    print(f"\n{'difftrain train, in order':28}{'wall s':>8}")
    for part in PARTS:
        print(f"{part:28}{start[part]:8.3f}")
    print(f"\nmedians of {args.runs} runs; train: wall until the first step is done, CPU of the whole run of 2 steps")
    print("imports of train, s: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in packages.items()))
    ratio = {clock: medians["difftrain --help"][clock] / whole[clock] for clock in ("wall", "cpu")}
    result = {"runs": args.runs, "help_over_torch": ratio, "seconds": medians, "imports": packages}
    conclude(result, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
