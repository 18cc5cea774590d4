"""What is saved, when it is safe, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import Retention, find_newest, save_checkpoint
from trainer.cli import main
from trainer.hooks.checkpointing import copied, tensors
from trainer.run.rundir import RunDir

CONFIG = """\
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 16, validation_fraction: 0.2}
train: {seed: 7, max_steps: 6, global_batch_size: 4, log_every: 10, deterministic: true}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-3, warmup_steps: 0}
ema: {decay: 0.9}
checkpoint: {every_steps: 2, keep_last: 2}
"""


def train(folder: Path, *options: str) -> int:
    config = folder.parent / "config.yaml"
    config.write_text(CONFIG)
    return main(["train", "--config", str(config), "--output-dir", str(folder), *options])


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(keep_last=2), {7, 8}),
        (Retention(keep_last=2, keep_every_steps=3), {3, 6, 7, 8}),
        (Retention(keep_last=2, keep_best=2), {2, 4, 7, 8}),
        (Retention(keep_last=20), set(range(1, 9))),
    ],
)
def test_the_newest_the_round_and_the_best_checkpoints_are_kept(retention: Retention, kept: set[int]):
    losses = {1: 0.9, 2: 0.3, 3: None, 4: 0.2, 5: 0.3, 6: 0.8, 7: 0.7, 8: None}
    assert retention.kept(losses) == kept


def test_the_best_checkpoint_of_a_run_stays_beside_the_newest_two(tmp_path: Path):
    run = tmp_path / "run"
    more = ["validation={every_steps: 1, max_records: 4}", "checkpoint.every_steps=1", "checkpoint.keep_best=1"]
    away = ["lr.peak=1.0", "ema.decay=0.99", "ema.warmup=false"]  # the average leaves its good start step by step
    assert train(run, "--set", *more, *away, "train.max_steps=5") == 0
    losses = {step: line["validation_loss"] for step, line in enumerate(lines(run), start=1)}
    best = min(losses, key=lambda step: losses[step])
    assert best < 4
    assert RunDir(run).checkpoint_steps() == sorted({best, 4, 5})
    assert json.loads(RunDir(run).sidecar(best).read_text())["validation_loss"] == losses[best]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_checkpoint_saved_in_the_background_is_the_one_that_the_steps_would_have_waited_for(tmp_path: Path):
    beside, waited = tmp_path / "beside", tmp_path / "waited"
    assert train(beside) == 0
    assert train(waited, "--set", "checkpoint.background=false") == 0
    for step in (4, 6):
        ours, theirs = (torch.load(RunDir(run).checkpoint(step), weights_only=True) for run in (beside, waited))
        assert ours["step"] == theirs["step"] == step
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            assert torch.equal(a, b)


def test_a_copy_of_the_state_does_not_follow_it():
    state = {"a": torch.ones(2), "groups": [{"b": torch.ones(2)}], "pair": (torch.ones(2), 3), "step": 1}
    copy = copied(state)
    for tensor in tensors(state):
        tensor.zero_()
    assert all(tensor.eq(1).all() for tensor in tensors(copy))
    assert len(tensors(copy)) == 3
    assert copy["pair"][1] == 3


def test_a_save_that_fails_costs_one_checkpoint_and_the_next_is_tried_again(tmp_path: Path, capsys):
    run = tmp_path / "run"
    RunDir(run).checkpoint(2).mkdir(parents=True)  # in its place: the rename onto it fails
    assert train(run) == 0
    assert "warning: checkpoint-2 was not saved, older ones are kept" in capsys.readouterr().out
    assert RunDir(run).checkpoint_steps() == [4, 6]
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("background", ["true", "false"])
def test_three_saves_in_a_row_that_fail_end_the_run_with_74(tmp_path: Path, background: str):
    run = tmp_path / "run"
    for step in (4, 6, 8):
        RunDir(run).checkpoint(step).mkdir(parents=True)
    assert train(run, "--set", "train.max_steps=20", f"checkpoint.background={background}") == 74
    status = json.loads((run / "run_manifest.json").read_text())["status"]
    assert (status["state"], status["exit_code"]) == ("storage_failed", 74)
    assert RunDir(run).checkpoint_steps() == [2]


def test_a_last_save_that_fails_ends_the_run_with_74(tmp_path: Path):
    run = tmp_path / "run"
    RunDir(run).checkpoint(6).mkdir(parents=True)
    assert train(run) == 74


def flipped(path: Path, position: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        save_checkpoint(run_dir, {"step": step, "modules": {"m": {"w": torch.randn(2000, generator=generator)}}}, {})
    return run_dir


def test_a_flipped_bit_is_found_at_each_of_200_positions_and_the_checkpoint_before_is_used(two_checkpoints: RunDir):
    newest = two_checkpoints.checkpoint(2)
    size, found = newest.stat().st_size, 0
    for trial in range(200):
        position, bit = trial * size // 200, trial % 8
        flipped(newest, position, bit)
        heard: list[str] = []
        start = find_newest(two_checkpoints, heard.append)
        found += start is not None and start.path == two_checkpoints.checkpoint(1) and "sha256" in heard[0]
        flipped(newest, position, bit)
    assert found == 200
    start = find_newest(two_checkpoints, print)
    assert start is not None
    assert start.path == newest, "all bits are back"


@pytest.mark.parametrize("left", [0.01, 0.5, 0.99, None])
def test_a_truncated_checkpoint_is_passed_over(two_checkpoints: RunDir, left: float | None):
    newest = two_checkpoints.checkpoint(2)
    size = newest.stat().st_size
    with open(newest, "r+b") as file:
        file.truncate(1 if left is None else int(left * size))
    heard: list[str] = []
    start = find_newest(two_checkpoints, heard.append)
    assert start is not None
    assert start.path == two_checkpoints.checkpoint(1)
    assert "checkpoint-2" in heard[0]
    assert "checkpoint-1" in heard[0]
