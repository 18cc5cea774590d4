"""Whole runs of one process: what they leave, and what does not depend on how they are made."""

from __future__ import annotations

import json

import pytest
import torch
from runs import checkpoint, manifest, metrics, steps, train

from trainer.cli import main
from trainer.run.rundir import RunDir


def test_accumulation_changes_nothing_but_float_rounding(config, tmp_path, runs_to_copy):
    assert train(config, tmp_path / "cut", "--set", "train.micro_batch_size=1") == 0
    for one, other in zip(metrics(runs_to_copy[6]), metrics(tmp_path / "cut"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_metrics_hold_every_step_once_whatever_log_every_is(runs_to_copy):
    lines = metrics(runs_to_copy[6])  # which logs every fourth of its six steps
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["images_seen"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert [line["lr"] for line in lines][:4] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])


def test_only_the_newest_checkpoints_are_kept_and_listed(runs_to_copy):
    run = runs_to_copy[6]
    assert sorted(path.name for path in run.glob("checkpoint-*.pt")) == ["checkpoint-4.pt", "checkpoint-6.pt"]
    assert [entry["step"] for entry in manifest(run)["checkpoints"]] == [4, 6]


def test_the_manifest_has_the_topology_and_the_number_of_records(runs_to_copy):
    facts = manifest(runs_to_copy[6])
    assert facts["topology"] == {"world_size": 1, "micro_batch_size": 4, "accumulation": 1, "num_machines": 1}
    assert facts["data"]["records"] == 10


def test_init_from_starts_from_the_averaged_weights_of_another_run(config, tmp_path, runs_to_copy):
    source = f"model.init_from={runs_to_copy[6]}@4"
    assert train(config, tmp_path / "second", "--set", source, "train.max_steps=1", "lr.peak=1e-12") == 0
    averaged, started = checkpoint(runs_to_copy[6], 4)["ema"], checkpoint(tmp_path / "second", 1)["modules"]["unet"]
    assert all(torch.allclose(started[name.removeprefix("unet.")], average) for name, average in averaged.items())
    assert metrics(tmp_path / "second")[0]["images_seen"] == 4


def test_the_held_out_loss_does_not_depend_on_the_micro_batch(config, tmp_path):
    options = ["--set", "data.validation_fraction=0.4", "validation.every_steps=3", "data.num_images=30"]
    assert train(config, tmp_path / "a", *options) == 0
    assert train(config, tmp_path / "b", *options, "train.micro_batch_size=2") == 0
    a, b = ([line.get("validation_loss") for line in metrics(tmp_path / run)] for run in ("a", "b"))
    assert [value is not None for value in a] == [False, False, True, False, False, True]
    assert a[5] == pytest.approx(b[5], rel=1e-5)


def test_pictures_are_drawn_at_step_0_at_the_end_and_on_command(config, tmp_path):
    from PIL import Image

    run = tmp_path / "run"
    options = [
        "--set",
        "validation.prompts=[a red circle, a blue square]",
        "validation.every_steps=5",
        "validation.sampler_steps=2",
    ]
    assert train(config, run, *options) == 0
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert names == ["step-000000.png", "step-000005.png", "step-000006.png"]
    grid = Image.open(run / "samples" / "step-000006.png")
    assert grid.width > 2 * 128
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    for output in (first, again):
        command = ["sample", "--run", str(run), "--prompt", "a red circle", "--steps", "2", "--output", str(output)]
        assert main(command) == 0
    assert first.read_bytes() == again.read_bytes()
    assert Image.open(first).size == (32, 32)


def test_a_dry_run_names_the_memory_by_part_and_leaves_nothing(config, tmp_path, capsys):
    assert train(config, tmp_path / "run", "--dry-run") == 0
    said = capsys.readouterr().out
    for part in ("trained weights", "gradients", "optimizer (adamw)", "EMA", "VAE", "peak of rank 0"):
        assert part in said, part
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_eight_pictures_are_learnt_by_heart(config, tmp_path):
    options = ["data.num_images=8", "data.caption_dropout=0", "data.random_flip=false", "data.center_crop=true"]
    options += ["train.global_batch_size=8", "train.micro_batch_size=8", "train.max_steps=250", "lr.peak=3e-3"]
    options += ["objective.kind=flow", "checkpoint.every_steps=1000", "train.deterministic=false", "lr.warmup_steps=20"]
    assert train(config, tmp_path / "run", "--set", *options) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-20:]) / 20 < 0.5 * sum(losses[:5]) / 5


def test_the_loss_curve_of_twenty_steps_is_the_golden_one(config, tmp_path):
    # Any change of a draw, of the order of records, of the maths or of an initial weight moves it.
    golden = [1.1125, 0.8563, 1.1156, 0.9941, 0.8555, 0.8232, 0.8746, 0.9585, 0.8312, 0.7264]
    golden += [0.7232, 0.7897, 0.7028, 0.6898, 0.6236, 0.6873, 0.7180, 0.6722, 0.6684, 0.6728]
    assert train(config, tmp_path / "run", "--set", "train.max_steps=20", "checkpoint.every_steps=20") == 0
    assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx(golden, rel=1e-3)


def test_a_run_lists_its_records_by_name(runs_to_copy):
    run = runs_to_copy[2]
    header, *records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert header == {"fingerprint": manifest(run)["data"]["fingerprint"]}
    assert [record["key"] for record in records] == [f"shapes/0/{index}" for index in range(10)]


def test_modes_do_not_depend_on_whether_a_grid_was_drawn(config, tmp_path):
    from trainer.config_file import load_config
    from trainer.hooks.sample_grid import SampleGrid
    from trainer.preflight import preflight
    from trainer.runtime import Runtime
    from trainer.training import assemble

    for trains_text in ("true", "false"):
        runtime = Runtime("fp32", deterministic=False)
        try:
            loaded = load_config(config, [f"model.train_text_encoder={trains_text}"])
            training = assemble(preflight(loaded, 0, 1), runtime, RunDir(tmp_path), None)
            modes = [module.training for module in training.model.modules()]
            assert training.components.unet.training
            assert training.components.text_encoder.training == (trains_text == "true")
            grid = SampleGrid(prompts=("x",), every_steps=1, max_steps=9, seed=0, sampler_steps=1, guidance=1.0)
            grid.after_step(training, last=False)
            assert [module.training for module in training.model.modules()] == modes
        finally:
            runtime.close()


def test_gradients_are_freed_while_pictures_are_drawn(config, tmp_path):
    from trainer.config_file import load_config
    from trainer.preflight import preflight
    from trainer.runtime import Runtime
    from trainer.step import train_step
    from trainer.training import assemble

    runtime = Runtime("fp32", deterministic=False)
    try:
        training = assemble(preflight(load_config(config), 0, 1), runtime, RunDir(tmp_path), None)
        train_step(training, training.batches(0, 1))
        assert all(weight.grad is not None for weight in training.state.weights().values())
        with training.evaluating():
            assert all(weight.grad is None for weight in training.state.weights().values())
    finally:
        runtime.close()


def test_lines_are_written_while_the_device_works_on_the_next_step(config, tmp_path, begun, monkeypatch):
    """Where steps are queued. Their content, and what a save finds written, is the same."""
    from trainer import loop
    from trainer.runtime import Runtime
    from trainer.step import train_step

    written: list[int] = []

    def counted(training, batches):
        result = train_step(training, batches)
        written.append(steps(tmp_path / "run"))
        return result

    monkeypatch.setattr(loop, "train_step", counted)
    monkeypatch.setattr(Runtime, "queues_steps", True)
    often = ["--set", "train.log_every=1", "checkpoint.every_steps=3"]
    assert train(config, tmp_path / "run", *often) == 0
    assert written == [0, 0, 1, 3, 3, 4], "lines when each step is queued: one behind, but for the save after step 3"
    assert metrics(tmp_path / "run") == metrics(begun(6, "plain"))


def test_lines_that_were_put_off_are_written_if_the_next_step_fails(config, tmp_path, monkeypatch):
    from trainer import loop
    from trainer.runtime import Runtime
    from trainer.step import train_step

    def failing(training, batches):
        if training.state.step == 2:
            raise ValueError("no luck")
        return train_step(training, batches)

    monkeypatch.setattr(loop, "train_step", failing)
    monkeypatch.setattr(Runtime, "queues_steps", True)
    often = ["--set", "train.log_every=1", "checkpoint.every_steps=100"]
    assert train(config, tmp_path / "run", *often) == 1
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
