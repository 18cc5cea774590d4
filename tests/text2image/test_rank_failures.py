"""One rank of several fails or falls silent: the job ends soon, and the reason names that rank."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from runs import manifest, metrics, start

from trainer.checkpoint import fault_of
from trainer.run.rundir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.fault]

CONFIG = """\
plugins: [unlucky]
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 1, num_images: 10}
train: {seed: 7, max_steps: 1000, global_batch_size: 4, micro_batch_size: 2, log_every: 1}
objective: {kind: unlucky}
lr: {kind: constant, peak: 1e-3, warmup_steps: 0}
checkpoint: {every_steps: 2}
"""
PLUGIN = """\
import os, signal, time
from trainer.data.sources.shapes import ShapeRecords
from trainer.hooks import checkpointing
from trainer.objectives.flow import Flow

class Unlucky(Flow):
    '''Flow, until its sixth loss on the rank that FATE names.'''
    kind = "unlucky"

    def loss(self, pred, target):
        fate, rank = os.environ["FATE"].split()
        Unlucky.losses = getattr(Unlucky, "losses", 0) + 1
        if Unlucky.losses == 6 and os.environ["RANK"] == rank:
            with open("when", "w") as file:
                file.write(str(time.time()))
            if fate == "raises":
                raise ValueError("no luck today")
            if fate in ("disk_is_slow", "pictures_are_slow"):
                return super().loss(pred, target)
            os.kill(os.getpid(), {"stops": signal.SIGSTOP, "is_killed": signal.SIGKILL}[fate])
        return super().loss(pred, target)

if os.environ["FATE"].startswith("pictures_are_slow"):
    looks = ShapeRecords.looks
    ShapeRecords.looks = lambda self, *all, **more: (time.sleep(9), looks(self, *all, **more))[1]
if os.environ["FATE"].startswith("disk_is_slow"):
    save = checkpointing.save_checkpoint
    checkpointing.save_checkpoint = lambda *all: (time.sleep(9), save(*all))[1]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "unlucky.py").write_text(PLUGIN)
    return tmp_path


def meet(folder: Path, fate: str, *overrides: str, ranks: int = 2) -> tuple[str, float]:
    """What the ranks of a run said whose fate this was, and the seconds from then to the end of the job."""
    code, said = start(folder, "run", *overrides, ranks=ranks, FATE=fate)
    assert code == 1, said
    return said, time.time() - float((folder / "when").read_text())


def assert_checkpoints_are_whole(run: Path) -> None:
    steps = RunDir(run).checkpoint_steps()
    assert steps
    assert all(fault_of(RunDir(run), step) is None for step in steps)


def test_the_error_of_one_rank_stands_on_top_and_in_the_manifest_and_ends_the_job_within_15_seconds(folder: Path):
    said, seconds = meet(folder, "raises 1")
    assert seconds < 15
    cause = "rank 1: ValueError: no luck today\n  in "
    assert cause in said
    assert said.index(cause) < said.index("Traceback"), "the launcher's own comes after it"
    assert "gloo" not in said
    status = manifest(folder / "run")["status"]
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"] == "rank 1 failed after step 5: ValueError: no luck today"
    assert "unlucky.py" in (folder / "run" / "traceback-rank-1.txt").read_text()
    assert_checkpoints_are_whole(folder / "run")


def test_a_stopped_rank_is_named_and_the_job_ends_within_the_time_out_and_the_launchers_30_seconds(folder: Path):
    said, seconds = meet(folder, "stops 1", "train.collective_timeout_seconds=20")
    assert seconds < 20 + 30 + 10, "10 for the launcher's own end and a busy machine"
    assert "failed: rank 1 silent since step 5\n" in said
    assert manifest(folder / "run")["status"]["reason"] == "rank 1 silent since step 5"
    assert len(metrics(folder / "run")) == 5
    assert_checkpoints_are_whole(folder / "run")


def test_rank_0_that_stops_is_named_by_another_one(folder: Path):
    said, _ = meet(folder, "stops 0", "train.collective_timeout_seconds=5")
    assert "rank 1: rank 0 silent since step 5\n" in said
    assert_checkpoints_are_whole(folder / "run")


def test_of_three_ranks_the_one_that_was_killed_is_named(folder: Path):
    said, seconds = meet(
        folder, "is_killed 2", "train.global_batch_size=6", "train.collective_timeout_seconds=20", ranks=3
    )
    assert seconds < 15
    assert "failed: rank 2 gone after step 5\n" in said
    assert manifest(folder / "run")["status"]["reason"] == "rank 2 gone after step 5"


def test_ranks_wait_for_a_rank_0_that_saves_longer_than_the_time_out(folder: Path):
    more = ["train.collective_timeout_seconds=5", "train.max_steps=4"]
    code, said = start(folder, "run", *more, ranks=2, FATE="disk_is_slow 0")
    assert code == 0, said
    assert RunDir(folder / "run").checkpoint_steps() == [2, 4], "one saved in the background, one at the end"
    assert manifest(folder / "run")["status"]["state"] == "done"


def test_ranks_wait_for_a_rank_0_that_looks_at_pictures_longer_than_the_time_out(folder: Path):
    more = ["train.collective_timeout_seconds=5", "train.max_steps=2"]
    code, said = start(folder, "run", *more, ranks=2, FATE="pictures_are_slow 0")
    assert code == 0, said
    assert manifest(folder / "run")["status"]["state"] == "done"
