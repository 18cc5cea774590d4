"""What goes wrong within a run of one process, and what it says."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from runs import checkpoint, metrics, train


def test_a_non_finite_gradient_changes_nothing_and_ends_the_run_after_max_bad_steps(config, tmp_path, capsys, plug_in):
    plug_in(
        "broken_loss",
        """\
        from trainer.objectives.flow import Flow
        class Broken(Flow):
            kind = 'broken'
            def loss(self, pred, target):
                return super().loss(pred, target) * float('nan')
        """,
    )
    options = ["plugins=[broken_loss]", "objective.kind=broken", "train.max_bad_steps=3", "train.log_every=1"]
    assert train(config, tmp_path / "run", "--set", *options) == 76
    said = capsys.readouterr().err
    assert "not finite in 3 steps in a row" in said
    assert "it was fed, by slot: 8 shapes/0/" in said
    assert f"`difftrain replay {tmp_path / 'run'} --step 3`" in said
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [True, True, True]
    assert lines[0]["loss"] is None
    manifest = json.loads((tmp_path / "run" / "run_manifest.json").read_text())
    assert (manifest["status"]["state"], manifest["status"]["exit_code"]) == ("diverged", 76)
    saved = checkpoint(tmp_path / "run", 2)
    assert all(torch.isfinite(weight).all() for weight in saved["modules"]["unet"].values())
    assert all(float(entry["step"]) == 0 for entry in saved["optimizer"]["state"].values())


def test_a_full_disk_for_the_samples_costs_one_warning_and_not_the_run(config, tmp_path, capsys):
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


def test_running_out_of_memory_names_what_to_lower_and_to_what_and_exits_2(config, tmp_path, capsys, plug_in):
    plug_in(
        "hungry",
        """\
        import torch
        from trainer.objectives.flow import Flow
        class Hungry(Flow):
            kind = 'hungry'
            def loss(self, pred, target):
                return torch.empty(2**50)
        """,
    )
    options = ["--set", "plugins=[hungry]", "objective.kind=hungry"]
    assert train(config, tmp_path / "run", *options) == 2
    said = capsys.readouterr().err
    assert "out of memory with 4 images at a time (asked for 4503599627370496 bytes)\n" in said
    assert "set train.micro_batch_size=2 (2 x accumulation instead of 1; the run stays the same)" in said
    assert "Traceback" not in said
    assert train(config, tmp_path / "dry", *options, "train.micro_batch_size=1", "--dry-run") == 2
    assert "set train.gradient_checkpointing=true, or train.precision=bf16" in capsys.readouterr().err


def test_an_unforeseen_error_is_told_in_one_line_above_its_traceback_which_is_kept(config, tmp_path, capsys, plug_in):
    plug_in(
        "faulty",
        """\
        from trainer.objectives.flow import Flow
        class Faulty(Flow):
            kind = 'faulty'
            def loss(self, pred, target):
                raise ValueError('the loss is lost at https://me:hunter2pass@tracker.example')
        """,
    )
    assert train(config, tmp_path / "run", "--set", "plugins=[faulty]", "objective.kind=faulty") == 1
    told = capsys.readouterr().err
    assert told.startswith("failed: ValueError: the loss is lost at https://")
    assert "hunter2pass" not in told
    kept = (tmp_path / "run" / "traceback-rank-0.txt").read_text()
    assert kept in told
    assert "faulty.py" in kept
    written = (tmp_path / "run" / "run_manifest.json").read_text() + kept
    assert "hunter2pass" not in written
    status = json.loads((tmp_path / "run" / "run_manifest.json").read_text())["status"]
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"].startswith("ValueError: the loss is lost at https://")


def test_too_many_bad_steps_in_a_row_end_the_run_although_good_ones_follow_before_they_are_written(
    config, tmp_path, capsys, plug_in
):
    plug_in(
        "relapsing",
        """\
        from typing import ClassVar
        from trainer.objectives.flow import Flow
        class Relapsing(Flow):
            kind = 'relapsing'
            losses: ClassVar[int] = 0
            def loss(self, pred, target):
                Relapsing.losses += 1
                return super().loss(pred, target) * (float('nan') if Relapsing.losses in (2, 3, 4) else 1)
        """,
    )
    options = ["plugins=[relapsing]", "objective.kind=relapsing", "train.max_bad_steps=3", "train.log_every=6"]
    assert train(config, tmp_path / "run", "--set", *options, "checkpoint.every_steps=6") == 76
    assert "not finite in 3 steps in a row, the last is step 4\n" in capsys.readouterr().err


def test_a_hook_of_rank_0_that_fails_costs_one_warning_and_not_the_run(config, tmp_path, capsys, plug_in):
    plug_in(
        "unreachable",
        """\
        from trainer.hook import MainHook
        class Unreachable(MainHook):
            kind = 'unreachable'
            def on_metrics(self, view, lines):
                raise ConnectionError('no route to the tracker')
        """,
    )
    options = ["--set", "plugins=[unreachable]", "hooks=[{kind: unreachable}]", "train.log_every=1"]
    assert train(config, tmp_path / "run", *options) == 0
    said = capsys.readouterr().out
    assert said.count("Unreachable failed and is switched off: ConnectionError: no route to the tracker") == 1
    assert len(metrics(tmp_path / "run")) == 6
