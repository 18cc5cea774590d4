"""Runs in this process or in their own, and what they leave behind, for the tests of whole runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import psutil
from forked import ROOT, Job, environment

from trainer.checkpoint import fault_of
from trainer.cli import main
from trainer.run.rundir import RunDir

TRAIN = str(ROOT / "trainer" / "train.py")
# Six steps of four pictures, saved at every second one; 10 records, so that epochs end within a batch.
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


def train_arguments(folder: Path, name: str, *overrides: str) -> list[str]:
    """What `difftrain train` needs to train `folder`/config.yaml into `folder`/`name` from its newest checkpoint."""
    words = ["--config", str(folder / "config.yaml"), "--output-dir", str(folder / name), "--resume", "auto"]
    return [*words, *(["--set", *overrides] if overrides else [])]


def launch(folder: Path, name: str, *overrides: str, ranks: int = 1, **more: str) -> Job:
    """A job that trains `folder`/config.yaml into `folder`/`name` from its newest checkpoint."""
    return Job("train", *train_arguments(folder, name, *overrides), cwd=folder, ranks=ranks, **more)


@contextmanager
def command(*words: str, cwd: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A real command in a session of its own, of which nothing is left at the end; `python` is this one."""
    with subprocess.Popen(
        [sys.executable if word == "python" else word for word in words],
        cwd=cwd,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            end_all_of(process)


def end_all_of(process: subprocess.Popen[str]) -> None:
    """Kill a command and all that it started."""
    with suppress(psutil.NoSuchProcess):  # ranks have sessions of their own
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    with suppress(ProcessLookupError):  # its session outlives it
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def torchrun(folder: Path, name: str, *overrides: str, ranks: int = 2, **more: str) -> AbstractContextManager[Any]:
    """A training job by the real launcher, for tests of what it does when a rank ends."""
    # standalone: a free port, so that launchers can run side by side
    launcher = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), TRAIN)
    return command(*launcher, *train_arguments(folder, name, *overrides), cwd=folder, **more)


def ended(folder: Path, name: str, *overrides: str, ranks: int = 1, **more: str) -> tuple[int, str]:
    """Train in a process of its own until it ends: the exit code of rank 0, and all that the ranks said."""
    with launch(folder, name, *overrides, ranks=ranks, **more) as job:
        said, _ = job.communicate(timeout=300)
        return job.wait(), said


def finish(folder: Path, name: str, *overrides: str, ranks: int = 1, **more: str) -> str:
    """The same for a run that has to reach its last step: all it said."""
    code, said = ended(folder, name, *overrides, ranks=ranks, **more)
    assert code == 0, said
    return said


class Process(Protocol):
    """A job, or a subprocess.Popen."""

    def poll(self) -> int | None: ...


def wait_for(condition: Callable[[], Any], process: Process | None = None, seconds: float = 90) -> None:
    """Until `condition` holds; fails if the process ends, or the time runs out, before that."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        assert process is None or process.poll() is None, f"it ended with {process.poll()}"
        time.sleep(0.002)


def copy_of(run: Path, to: Path) -> Path:
    """A run that the test may harm."""
    shutil.copytree(run, to)
    return to


def metrics(run: Path) -> list[dict[str, Any]]:
    """The whole metrics lines without what differs from run to run; a line that is being written is no whole one.

    Raises FileNotFoundError if there are none, so that two runs that left nothing are not equal.
    """
    whole = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return [{key: value for key, value in json.loads(line).items() if key != "timing"} for line in whole]


def steps(run: Path) -> int:
    """How many steps the metrics of a run, which may be going on, hold."""
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "run_manifest.json").read_text())


def files(run: Path) -> dict[str, bytes]:
    """The files of a run by name, without its subfolders."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    import torch

    return torch.load(run / f"checkpoint-{step}.pt", weights_only=True)


def saved(run: Path) -> list[int]:
    """The steps of the checkpoints that have a sidecar."""
    return RunDir(run).checkpoint_steps()


def whole(run: Path, step: int) -> bool:
    """Whether the checkpoint of `step` verifies."""
    return fault_of(RunDir(run), step) is None


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, through nested dicts and lists."""
    import torch

    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def same_run(a: Path, b: Path, step: int) -> bool:
    """Whether two runs agree to the bit in the state of `step` and in every metrics line."""
    ours, theirs = (checkpoint(run, step) for run in (a, b))
    return all(same(ours[part], theirs[part]) for part in ("modules", "optimizer", "ema")) and metrics(a) == metrics(b)
