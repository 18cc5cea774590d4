"""What goes wrong within a run of one process, and what it says."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from runs import checkpoint, manifest, metrics, train

pytestmark = pytest.mark.usefixtures("plugins")


def test_non_finite_gradients_change_nothing_and_end_the_run(config, tmp_path, capsys):
    options = ["plugins=[failing]", "objective.kind=broken", "train.max_bad_steps=3", "train.log_every=1"]
    assert train(config, tmp_path / "run", "--set", *options) == 76
    said = capsys.readouterr().err
    assert "not finite in 3 steps in a row" in said
    assert "it was fed, by slot: 8 shapes/0/" in said
    assert f"`difftrain replay {tmp_path / 'run'} --step 3`" in said
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [True, True, True]
    assert lines[0]["loss"] is None
    status = manifest(tmp_path / "run")["status"]
    assert (status["state"], status["exit_code"]) == ("diverged", 76)
    saved = checkpoint(tmp_path / "run", 2)
    assert all(torch.isfinite(weight).all() for weight in saved["modules"]["unet"].values())
    assert all(float(entry["step"]) == 0 for entry in saved["optimizer"]["state"].values())


def test_a_full_disk_for_the_samples_costs_one_warning(config, tmp_path, capsys):
    samples = tmp_path / "run" / "samples"
    samples.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(samples)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        grid = ["validation.prompts=[a red circle]", "validation.every_steps=2", "validation.sampler_steps=1"]
        assert train(config, tmp_path / "run", "--set", *grid) == 0
        assert capsys.readouterr().out.count("warning: the samples of step") == 1, "four grids had no room"
        assert list(samples.iterdir()) == []
    finally:
        subprocess.run(["umount", samples], check=True)


def test_running_out_of_memory_names_what_to_lower_and_to_what(config, tmp_path, capsys):
    options = ["--set", "plugins=[failing]", "objective.kind=hungry"]
    assert train(config, tmp_path / "run", *options) == 2
    said = capsys.readouterr().err
    assert "out of memory with 4 images at a time (asked for 4503599627370496 bytes)\n" in said
    assert "set train.micro_batch_size=2 (2 x accumulation instead of 1; the run stays the same)" in said
    assert "Traceback" not in said
    assert train(config, tmp_path / "dry", *options, "train.micro_batch_size=1", "--dry-run") == 2
    assert "set train.gradient_checkpointing=true, or train.precision=bf16" in capsys.readouterr().err


def test_an_unforeseen_error_is_one_line_above_its_traceback(config, tmp_path, capsys):
    assert train(config, tmp_path / "run", "--set", "plugins=[failing]", "objective.kind=faulty") == 1
    told = capsys.readouterr().err
    assert told.startswith("failed: ValueError: the loss is lost at https://")
    assert "hunter2pass" not in told
    kept = (tmp_path / "run" / "traceback-rank-0.txt").read_text()
    assert kept in told
    assert "failing.py" in kept
    written = (tmp_path / "run" / "run_manifest.json").read_text() + kept
    assert "hunter2pass" not in written
    status = manifest(tmp_path / "run")["status"]
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"].startswith("ValueError: the loss is lost at https://")


def test_bad_steps_in_a_row_end_the_run_although_good_ones_follow(config, tmp_path, capsys):
    options = ["plugins=[failing]", "objective.kind=relapsing", "train.max_bad_steps=3", "train.log_every=6"]
    assert train(config, tmp_path / "run", "--set", *options, "checkpoint.every_steps=6") == 76
    assert "not finite in 3 steps in a row, the last is step 4\n" in capsys.readouterr().err


def test_a_hook_of_rank_0_that_fails_costs_one_warning(config, tmp_path, capsys):
    options = ["--set", "plugins=[failing]", "hooks=[{kind: unreachable}]", "train.log_every=1"]
    assert train(config, tmp_path / "run", *options) == 0
    said = capsys.readouterr().out
    assert said.count("Unreachable failed and is switched off: ConnectionError: no route to the tracker") == 1
    assert len(metrics(tmp_path / "run")) == 6
