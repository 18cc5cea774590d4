"""One rank of several fails or falls silent: the job ends soon, and the reason names that rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
from runs import end_all_of, ended, launch, manifest, metrics, saved, torchrun, whole

pytestmark = [pytest.mark.slow, pytest.mark.fault]
nightly = pytest.mark.nightly

CONFIG = """\
plugins: [unlucky]
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 1, num_images: 10}
train: {seed: 7, max_steps: 1000, global_batch_size: 4, micro_batch_size: 2, log_every: 1}
objective: {kind: unlucky}
lr: {kind: constant, peak: 1e-3, warmup_steps: 0}
checkpoint: {every_steps: 2}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@contextmanager
def met(folder: Path, fate: str, *overrides: str, ranks: int = 2) -> Iterator[tuple[Popen[str], Callable[[], float]]]:
    """The launcher of a run that meets this fate, and a clock of the seconds since then."""
    with torchrun(folder, "run", *overrides, ranks=ranks, FATE=fate) as launcher:
        yield launcher, lambda: time.time() - float((folder / "when").read_text())


def said_until(launcher: Popen[str], words: str) -> bool:
    """Whether the ranks say these words, read as soon as they do; the launcher waits 30 s for a stopped rank.

    Ranks that say nothing for two minutes are ended, so that a regression here costs no more.
    """
    assert launcher.stdout is not None
    alarm = threading.Timer(120, end_all_of, [launcher])
    alarm.start()
    try:
        return any(words in line for line in launcher.stdout)
    finally:
        alarm.cancel()


def assert_checkpoints_are_whole(run: Path) -> None:
    assert saved(run)
    assert all(whole(run, step) for step in saved(run))


def test_the_error_of_one_rank_stands_on_top_and_ends_the_job(folder: Path):
    with met(folder, "raises 1") as (launcher, seconds):
        said, _ = launcher.communicate(timeout=120)
        assert seconds() < 15
    assert launcher.returncode == 1, said
    cause = "rank 1: ValueError: no luck today\n  in "
    assert cause in said
    assert said.index(cause) < said.index("Traceback"), "the launcher's own comes after it"
    assert "gloo" not in said
    status = manifest(folder / "run")["status"]
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"] == "rank 1 failed after step 5: ValueError: no luck today"
    assert "unlucky.py" in (folder / "run" / "traceback-rank-1.txt").read_text()
    assert_checkpoints_are_whole(folder / "run")


def test_a_stopped_rank_is_named_within_the_time_out(folder: Path):
    with met(folder, "stops 1", "train.collective_timeout_seconds=10") as (launcher, seconds):
        assert said_until(launcher, "failed: rank 1 silent since step 5\n")
        assert seconds() < 10 + 10, "10 for what the ranks still look up, and a busy machine"
    assert manifest(folder / "run")["status"]["reason"] == "rank 1 silent since step 5"
    assert len(metrics(folder / "run")) == 5
    assert_checkpoints_are_whole(folder / "run")


@pytest.mark.parametrize(
    ("fate", "said_by"), [("stops 1", "failed: rank 1"), pytest.param("stops 0", "rank 1: rank 0", marks=nightly)]
)
def test_a_job_with_a_stopped_rank_ends_within_30_more_seconds(folder: Path, fate: str, said_by: str):
    with met(folder, fate, "train.collective_timeout_seconds=5") as (launcher, seconds):
        said, _ = launcher.communicate(timeout=120)
        assert seconds() < 5 + 30 + 20, "20 for the launcher's own end and a busy machine"
    assert launcher.returncode == 1, said
    assert f"{said_by} silent since step 5\n" in said


def test_rank_0_that_stops_is_named_by_another_one(folder: Path):
    with met(folder, "stops 0", "train.collective_timeout_seconds=5") as (launcher, _):
        assert said_until(launcher, "rank 1: rank 0 silent since step 5\n")
    assert_checkpoints_are_whole(folder / "run")


def test_of_three_ranks_the_one_that_was_killed_is_named(folder: Path):
    more = ["train.global_batch_size=6", "train.collective_timeout_seconds=20"]
    with met(folder, "is_killed 2", *more, ranks=3) as (launcher, seconds):
        said, _ = launcher.communicate(timeout=60)
        assert seconds() < 15
    assert launcher.returncode == 1, said
    assert "failed: rank 2 gone after step 5\n" in said
    assert manifest(folder / "run")["status"]["reason"] == "rank 2 gone after step 5"


def test_a_rank_that_is_stuck_ends_once_another_is_silent(folder: Path):
    more = ["train.collective_timeout_seconds=5"]
    with launch(folder, "run", *more, ranks=2, FATE="leaves_others_stuck 1") as job:
        said, _ = job.communicate(timeout=120)
        assert time.time() - float((folder / "when").read_text()) < 5 + 5 + 10, "its grace, and a busy machine"
    assert job.returncode == 1
    assert "failed: rank 1 silent since step 5\n" in said
    assert manifest(folder / "run")["status"]["reason"] == "rank 1 silent since step 5"
    assert_checkpoints_are_whole(folder / "run")


def test_a_rank_that_is_stuck_learns_why_another_failed(folder: Path):
    with launch(folder, "run", ranks=2, FATE="raises_beside_stuck_ones 1") as job:
        job.communicate(timeout=120)
        assert time.time() - float((folder / "when").read_text()) < 60, "long before the time-out of ten minutes"
    assert job.returncode == 1
    assert manifest(folder / "run")["status"]["reason"] == "rank 1 failed after step 5: ValueError: no luck today"


def test_ranks_wait_for_a_rank_0_that_saves_for_long(folder: Path):
    more = ["train.collective_timeout_seconds=5", "train.max_steps=4"]
    code, said = ended(folder, "run", *more, ranks=2, FATE="disk_is_slow 0")
    assert code == 0, said
    assert saved(folder / "run") == [2, 4], "one saved in the background, one at the end"
    assert manifest(folder / "run")["status"]["state"] == "done"


def test_ranks_wait_for_a_rank_0_that_reads_pictures_for_long(folder: Path):
    more = ["train.collective_timeout_seconds=5", "train.max_steps=2"]
    code, said = ended(folder, "run", *more, ranks=2, FATE="pictures_are_slow 0")
    assert code == 0, said
    assert manifest(folder / "run")["status"]["state"] == "done"
