"""Real processes, really killed: what a run is worth after it was not asked."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import fault_of
from trainer.hooks.checkpointing import tensors
from trainer.run.rundir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.fault]

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, str(ROOT / "trainer" / "train.py")]
KILLS = int(os.environ.get("DIFFTRAIN_KILLS", "20"))
SIGNALS = int(os.environ.get("DIFFTRAIN_SIGNALS", "20"))
CONFIG = """\
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 10, caption_dropout: 0.2, random_flip: true}
train: {seed: 7, max_steps: 1000000, global_batch_size: 4, micro_batch_size: 2, log_every: 1}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-3, warmup_steps: 3}
ema: {decay: 0.9}
checkpoint: {every_steps: 1, keep_last: 3}
"""


def start(folder: Path, name: str, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    command = [*TRAIN, "--config", str(config), "--output-dir", str(folder / name), "--resume", "auto"]
    return subprocess.Popen(
        [*command, *(["--set", *overrides] if overrides else [])],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, name: str, *overrides: str, **environment: str) -> str:
    with start(folder, name, *overrides, **environment) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def lines(run: Path) -> list[dict[str, Any]]:
    """The whole lines of the metrics, without what differs from run to run."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").is_file() else ""
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in text.split("\n")[:-1]]


def equal(a: Path, b: Path, step: int) -> bool:
    """Whether two runs agree to the bit in the state of `step` and in every metrics line."""
    states = [torch.load(RunDir(run).checkpoint(step), weights_only=True) for run in (a, b)]
    ours, theirs = ([state[part] for part in ("modules", "optimizer", "ema")] for state in states)
    same = all(torch.equal(x, y) for x, y in zip(tensors(ours), tensors(theirs), strict=True))
    return same and lines(a) == lines(b)


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        assert process.poll() is None, f"it ended: {process.stdout and process.stdout.read()}"
        time.sleep(0.002)


def test_killed_at_random_moments_and_resumed_each_time_it_ends_as_the_unbroken_run(tmp_path: Path):
    halves = KILLS // 2, KILLS - KILLS // 2
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor() as both:  # a start needs one core for seconds: two runs at a time
        list(both.map(killed_again_and_again, folders, (1, 2), halves))


def killed_again_and_again(folder: Path, seed: int, kills: int) -> None:
    chance, run = random.Random(seed), folder / "killed"
    lost = []
    for _ in range(kills):
        before = len(lines(run))
        newest = max(RunDir(run).checkpoint_steps(), default=0)
        with start(folder, "killed") as process:
            # It has gone on from its checkpoint, and past it: the kill lands inside the loop.
            wanted = newest + chance.randint(1, 4)
            wait_for(lambda now=before, wanted=wanted: len(lines(run)) >= wanted and len(lines(run)) != now, process)
            time.sleep(chance.uniform(0, 0.08))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        steps = [line["step"] for line in lines(run)]
        assert steps == list(range(1, len(steps) + 1))
        verified = [step for step in RunDir(run).checkpoint_steps() if fault_of(RunDir(run), step) is None]
        lost.append(len(steps) - max(verified, default=0))
    assert max(lost) <= 1, f"intervals lost at each kill: {lost}"
    last = len(lines(run)) + 2
    finish(folder, "killed", f"train.max_steps={last}")
    finish(folder, "whole", f"train.max_steps={last}")
    assert equal(run, folder / "whole", last)
    assert not list(run.glob(".*")), "what the kills left half-written was swept away"
    starts = json.loads((run / "run_manifest.json").read_text())["starts"]
    assert len(starts) == kills + 1


def test_a_kill_between_the_checkpoint_and_its_sidecar_leaves_the_one_before(tmp_path: Path):
    with start(tmp_path, "killed", "train.max_steps=6", DIFFTRAIN_KILL_AT="checkpoint-4.pt renamed") as process:
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    run = RunDir(tmp_path / "killed")
    assert run.checkpoint(4).is_file()
    assert run.checkpoint_steps()[-1] == 3
    assert "at step 3" in finish(tmp_path, "killed", "train.max_steps=6")
    finish(tmp_path, "whole", "train.max_steps=6")
    assert equal(run.path, tmp_path / "whole", 6)


def test_without_any_whole_checkpoint_the_resume_is_refused_and_names_each(tmp_path: Path):
    finish(tmp_path, "run", "train.max_steps=3")
    run = RunDir(tmp_path / "run")
    for step in run.checkpoint_steps():
        run.checkpoint(step).write_bytes(b"")
    before = sorted(path.name for path in run.path.iterdir())
    with start(tmp_path, "run", "train.max_steps=6") as refused:
        output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert all(f"checkpoint-{step}: it has 0 bytes instead of" in output for step in (1, 2, 3))
    assert sorted(path.name for path in run.path.iterdir()) == before


def test_a_full_disk_costs_saves_and_not_the_run_until_three_in_a_row_fail(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        finish(tmp_path, "disk/run", "train.max_steps=2")
        filler = disk / "filler"
        with open(filler, "wb") as file:  # leaves some room: metrics and manifest still fit, a checkpoint does not
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            file.write(b"0" * (free - 200_000))
        with start(tmp_path, "disk/run", "train.max_steps=30") as process:
            output, _ = process.communicate(timeout=120)
        assert process.returncode == 74, output
        assert output.count("was not saved, older ones are kept: [Errno 28] No space left on device") == 3, output
        run = RunDir(disk / "run")
        assert run.checkpoint_steps() == [1, 2]
        assert not list(run.path.glob(".*"))
        filler.unlink()
        finish(tmp_path, "disk/run", "train.max_steps=8")
        finish(tmp_path, "whole", "train.max_steps=8")
        assert equal(run.path, tmp_path / "whole", 8)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_three_resumes_within_one_epoch_mid_accumulation_end_as_the_unbroken_run_in_bf16(tmp_path: Path):
    more = ("train.precision=bf16", "model.train_text_encoder=true", "data.num_images=100")
    for last in (2, 5, 6, 8):
        finish(tmp_path, "broken", *more, f"train.max_steps={last}", f"data.num_workers={last % 2 * 2}")
    finish(tmp_path, "whole", *more, "train.max_steps=8")
    assert equal(tmp_path / "broken", tmp_path / "whole", 8)


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id of the trainers below a launcher."""
    import psutil

    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            rank = process.environ().get("RANK")
        except psutil.Error:
            continue
        if rank is not None and "train.py" in " ".join(process.cmdline()):
            found.setdefault(int(rank), process.pid)  # parents come before the children they forked
    return found


def start_two_ranks(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    # torchrun: `accelerate launch` imports for seconds before it does the same
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *TRAIN[1:]]
    arguments = ["--config", str(config), "--output-dir", str(folder / "run"), "--resume", "auto"]
    return subprocess.Popen(
        [*launcher, *arguments, "--set", "checkpoint.every_steps=100000", *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_signal_to_one_rank_of_two_stops_both_after_the_same_step(tmp_path: Path):
    run = tmp_path / "run"
    for _ in range(SIGNALS):
        before = len(lines(run))
        with start_two_ranks(tmp_path) as launcher:
            wait_for(lambda now=before: len(lines(run)) > now + 2, launcher)
            os.kill(ranks_of(launcher)[1], signal.SIGTERM)
            output, _ = launcher.communicate(timeout=60)
        status = json.loads((run / "run_manifest.json").read_text())["status"]
        assert (status["state"], status["exit_code"]) == ("stopped", 75), output
        assert RunDir(run).checkpoint_steps()[-1] == len(lines(run))


def test_a_killed_rank_ends_the_whole_job_in_seconds_and_leaves_the_checkpoints_whole(tmp_path: Path):
    run = RunDir(tmp_path / "run")
    with start_two_ranks(tmp_path, "checkpoint.every_steps=2") as launcher:
        wait_for(lambda: len(lines(run.path)) > 6, launcher)
        killed = time.monotonic()
        os.kill(ranks_of(launcher)[1], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=60)
        assert time.monotonic() - killed < 15, "the target; a machine this slow needs a look"
    assert launcher.returncode != 0, output
    assert run.checkpoint_steps()
    assert all(fault_of(run, step) is None for step in run.checkpoint_steps())


def test_a_killed_loader_worker_ends_the_run_and_is_named(tmp_path: Path):
    import psutil

    with start(tmp_path, "run", "data.num_workers=1") as process:
        wait_for(lambda: len(lines(tmp_path / "run")) > 2, process)
        worker = psutil.Process(process.pid).children()[0].pid
        os.kill(worker, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"DataLoader worker (pid {worker}) is killed" in output or f"(pid(s) {worker}) exited" in output
    assert json.loads((tmp_path / "run" / "run_manifest.json").read_text())["status"]["state"] == "failed"
