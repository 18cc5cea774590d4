"""Runs in this process or in their own, and what they leave behind, for the tests of whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.cli import main

TRAIN = str(Path(__file__).resolve().parents[2] / "trainer" / "train.py")
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


CONFIG = """\
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 10, caption_dropout: 0.2, random_flip: true}
train: {seed: 7, max_steps: 6, global_batch_size: 4, micro_batch_size: 4, log_every: 4, deterministic: true}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-3, warmup_steps: 3}
ema: {decay: 0.9}
checkpoint: {every_steps: 2, keep_last: 2}
"""


def train(config: Path, run: Path, *options: str) -> int:
    """Train in this process: the exit code."""
    return main(["train", "--config", str(config), "--output-dir", str(run), *options])


def start(folder: Path, name: str, *overrides: str, ranks: int = 1, **environment: str) -> tuple[int, str]:
    """Train `folder`/config.yaml into `folder`/`name` from its newest checkpoint: the exit code, and all it said.

    One thread a rank, whatever started it: sums are rounded in the order of the threads. Plug-ins lie in `folder`.
    """
    # standalone: a free port, so that launchers can run side by side
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, TRAIN, "--config", "config.yaml", "--output-dir", name, "--resume", "auto"]
    inherited = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
    done = subprocess.run(
        [*command, *(["--set", *overrides] if overrides else [])],
        cwd=folder,
        env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def finish(folder: Path, name: str, *overrides: str, ranks: int = 1, **environment: str) -> str:
    """The same for a run that has to reach its last step: all it said."""
    code, output = start(folder, name, *overrides, ranks=ranks, **environment)
    assert code == 0, output
    return output


def metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics lines without what differs from run to run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "run_manifest.json").read_text())


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    import torch

    return torch.load(run / f"checkpoint-{step}.pt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, through nested dicts and lists."""
    import torch

    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b
