"""Real processes, really killed: what a run is worth after it was not asked."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runs import finish, launch, manifest, metrics, same_run, saved, steps, torchrun, wait_for, whole

pytestmark = [pytest.mark.slow, pytest.mark.fault]

CONFIG = """\
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 10, caption_dropout: 0.2, random_flip: true}
train: {seed: 7, max_steps: 1000000, global_batch_size: 4, micro_batch_size: 2, log_every: 1}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-3, warmup_steps: 3}
ema: {decay: 0.9}
checkpoint: {every_steps: 1, keep_last: 3}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.nightly)])
def test_killed_at_random_moments_it_ends_as_the_unbroken_run(tmp_path: Path, kills: int):
    halves = kills // 2, kills - kills // 2
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.yaml").write_text(CONFIG)
    with ThreadPoolExecutor() as both:
        list(both.map(killed_again_and_again, folders, (1, 2), halves))


def killed_again_and_again(folder: Path, seed: int, kills: int) -> None:
    chance, run = random.Random(seed), folder / "killed"
    lost = []
    for _ in range(kills):
        before, newest = steps(run), max(saved(run), default=0)
        with launch(folder, "killed") as job:
            # It has gone on from its checkpoint, and past it: the kill lands inside the loop.
            wanted = newest + chance.randint(1, 4)
            wait_for(lambda now=before, wanted=wanted: wanted <= steps(run) != now, job)
            time.sleep(chance.uniform(0, 0.08))
            job.send_signal(signal.SIGKILL)
            assert job.wait(60) == -signal.SIGKILL
        done = [line["step"] for line in metrics(run)]
        assert done == list(range(1, len(done) + 1))
        lost.append(len(done) - max((step for step in saved(run) if whole(run, step)), default=0))
    assert max(lost) <= 1, f"intervals lost at each kill: {lost}"
    last = len(metrics(run)) + 2
    finish(folder, "killed", f"train.max_steps={last}")
    finish(folder, "whole", f"train.max_steps={last}")
    assert same_run(run, folder / "whole", last)
    assert not list(run.glob(".*")), "what the kills left half-written was swept away"
    assert len(manifest(run)["starts"]) == kills + 1


def test_a_kill_between_checkpoint_and_sidecar_leaves_the_one_before(folder: Path):
    with launch(folder, "killed", "train.max_steps=6", DIFFTRAIN_KILL_AT="checkpoint-4.pt renamed") as job:
        assert job.wait(120) == -signal.SIGKILL
    killed = folder / "killed"
    assert (killed / "checkpoint-4.pt").is_file()
    assert saved(killed)[-1] == 3
    assert "at step 3" in finish(folder, "killed", "train.max_steps=6")
    finish(folder, "whole", "train.max_steps=6")
    assert same_run(killed, folder / "whole", 6)


def test_a_full_disk_costs_saves_until_three_in_a_row_fail(folder: Path):
    disk = folder / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        finish(folder, "disk/run", "train.max_steps=2")
        filler = disk / "filler"
        with open(filler, "wb") as file:  # leaves some room: metrics and manifest still fit, a checkpoint does not
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            file.write(b"0" * (free - 200_000))
        with launch(folder, "disk/run", "train.max_steps=30") as job:
            said, _ = job.communicate(timeout=120)
            assert job.wait() == 74, said
        assert said.count("was not saved, older ones are kept: [Errno 28] No space left on device") == 3, said
        assert saved(disk / "run") == [1, 2]
        assert not list((disk / "run").glob(".*"))
        filler.unlink()
        finish(folder, "disk/run", "train.max_steps=8")
        finish(folder, "whole", "train.max_steps=8")
        assert same_run(disk / "run", folder / "whole", 8)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_resumes_in_mid_accumulation_end_as_the_unbroken_run_in_bf16(folder: Path):
    more = ("train.precision=bf16", "model.train_text_encoder=true", "data.num_images=100")
    for last in (2, 5, 6, 8):
        finish(folder, "broken", *more, f"train.max_steps={last}", f"data.num_workers={last % 2 * 2}")
    finish(folder, "whole", *more, "train.max_steps=8")
    assert same_run(folder / "broken", folder / "whole", 8)


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


@pytest.mark.parametrize("signals", [2, pytest.param(20, marks=pytest.mark.nightly)])
def test_a_signal_to_one_rank_of_two_stops_both_after_the_same_step(folder: Path, signals: int):
    run = folder / "run"
    for _ in range(signals):
        before = steps(run)
        with torchrun(folder, "run", "checkpoint.every_steps=100000") as launcher:
            wait_for(lambda now=before: steps(run) > now + 2, launcher)
            os.kill(ranks_of(launcher)[1], signal.SIGTERM)
            output, _ = launcher.communicate(timeout=60)
        status = manifest(run)["status"]
        assert (status["state"], status["exit_code"]) == ("stopped", 75), output
        assert saved(run)[-1] == len(metrics(run))


def test_a_killed_rank_ends_the_job_and_leaves_whole_checkpoints(folder: Path):
    run = folder / "run"
    with torchrun(folder, "run", "checkpoint.every_steps=2") as launcher:
        wait_for(lambda: steps(run) > 6, launcher)
        killed = time.monotonic()
        os.kill(ranks_of(launcher)[1], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=60)
        assert time.monotonic() - killed < 15, "the target; a machine this slow needs a look"
    assert launcher.returncode != 0, output
    assert saved(run)
    assert all(whole(run, step) for step in saved(run))


def test_a_killed_loader_worker_ends_the_run_and_is_named(folder: Path):
    import psutil

    with launch(folder, "run", "data.num_workers=1") as job:
        wait_for(lambda: steps(folder / "run") > 2, job)
        worker = psutil.Process(job.pid).children()[0].pid
        os.kill(worker, signal.SIGKILL)
        said, _ = job.communicate(timeout=60)
        assert job.wait() == 1
    assert f"DataLoader worker (pid {worker}) is killed" in said or f"(pid(s) {worker}) exited" in said
    assert manifest(folder / "run")["status"]["state"] == "failed"
