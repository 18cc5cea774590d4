"""Where a start goes on: the same run to the bit, another one refused, and nothing lost that was there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from runs import CONFIG, checkpoint, files, manifest, metrics, same, same_run, train

from trainer.checkpoint import find_newest, sealed
from trainer.errors import UserError
from trainer.launch import prepare_folder
from trainer.run.lock import RunLock
from trainer.run.rundir import RunDir


def pictures(folder: Path, count: int) -> str:
    from trainer.data.dummy import write_dummy_imagefolder

    write_dummy_imagefolder(folder, num_images=count, image_size=32)
    return f"data.data_root={folder}"


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(config, begun, runs_to_copy):
    broken = begun(2)
    assert train(config, broken, "--resume", "auto", "--set", "train.max_steps=4", "data.num_workers=2") == 0
    assert train(config, broken, "--resume", "latest") == 0
    assert same_run(broken, runs_to_copy[6], 6)


@pytest.mark.slow
def test_training_a_text_encoder_in_bf16_resumes_exactly_too(config, tmp_path):
    options = ["--set", "model.train_text_encoder=true", "train.precision=bf16", "objective.kind=flow"]
    assert train(config, tmp_path / "whole", *options) == 0
    assert train(config, tmp_path / "broken", *options, "train.max_steps=3") == 0
    assert train(config, tmp_path / "broken", *options, "--resume", "auto") == 0
    whole, broken = checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "broken", 6)
    assert same(whole["modules"], broken["modules"])
    assert whole["modules"].keys() == {"unet", "text_encoder"}
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(config, begun, capsys):
    run = begun(6)
    newest = run / "checkpoint-6.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert train(config, run, "--resume", "auto") == 0
    said = capsys.readouterr().out
    assert "checkpoint-6 is passed over: its sha256" in said
    assert "at step 4" in said
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_a_run_without_any_whole_checkpoint_is_refused(config, begun, capsys):
    run = begun(6)
    (run / "checkpoint-4.pt").write_bytes(b"")
    (run / "checkpoint-6.pt").write_bytes((run / "checkpoint-6.pt").read_bytes()[:-1])
    before = files(run)
    assert train(config, run, "--resume", "auto") == 2
    said = capsys.readouterr().err
    assert "checkpoint-4: it has 0 bytes instead of" in said
    assert "checkpoint-6: it has " in said
    assert files(run) == before


def test_a_second_run_into_a_folder_leaves_the_first_untouched(config, begun, capsys):
    run = begun(6)
    before = files(run)
    assert train(config, run) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert files(run) == before


def test_a_resume_with_another_objective_has_to_be_allowed(config, begun, capsys):
    run = begun(2)
    assert train(config, run, "--resume", "auto", "--set", "objective.kind=v_prediction") == 2
    assert "objective.kind: 'epsilon' -> 'v_prediction'" in capsys.readouterr().err
    allowed = ["--allow-change", "objective.kind"]
    assert train(config, run, "--resume", "auto", "--set", "objective.kind=v_prediction", *allowed) == 0


def test_resume_latest_needs_a_checkpoint_and_auto_starts_without_one(config, tmp_path, capsys):
    assert train(config, tmp_path / "run", "--resume", "latest") == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train(config, tmp_path / "run", "--resume", "auto", "--set", "train.max_steps=1") == 0
    assert "starting at step 0" in capsys.readouterr().out


def test_a_branch_from_a_checkpoint_carries_its_history(config, tmp_path, runs_to_copy):
    branch = tmp_path / "branch"
    assert train(config, branch, "--resume", str(runs_to_copy[6] / "checkpoint-4.pt")) == 0
    assert same_run(branch, runs_to_copy[6], 6)


def test_a_resume_on_other_data_has_to_be_allowed(config, tmp_path, capsys):
    config.write_text(
        CONFIG.replace(
            "{kind: shapes, image_size: 32, num_workers: 0, num_images: 10,",
            "{kind: imagefolder, image_size: 32, num_workers: 0, data_root: x,",
        )
    )
    options = ["--set", pictures(tmp_path / "pictures", 6), "train.max_steps=2"]
    assert train(config, tmp_path / "run", *options) == 0
    metadata = tmp_path / "pictures" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a ", "the ", 1))
    more = ["--resume", "auto", *options[:-1], "train.max_steps=4"]
    assert train(config, tmp_path / "run", *more) == 2
    said = capsys.readouterr().err
    assert "the data changed since the checkpoint" in said
    assert "; 1 record: '000000.png' captions changed\n" in said
    assert train(config, tmp_path / "run", *more, "--allow-change", "data") == 0
    again = [*options[:-1], "train.max_steps=6", "--resume", "auto"]
    with open(tmp_path / "pictures" / "000003.png", "ab") as file:
        file.write(b"!")
    assert train(config, tmp_path / "run", *again) == 2
    said = capsys.readouterr().err
    assert "; 1 record: '000003.png' picture changed\n" in said, "compared with the data that was allowed"


def test_an_allowed_change_of_the_optimizer_takes_effect(config, begun):
    run = begun(4)
    more = ["--resume", "auto", "--set", "optimizer.weight_decay=0.5", "--allow-change", "optimizer.weight_decay"]
    assert train(config, run, *more) == 0
    assert checkpoint(run, 6)["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_an_average_switched_on_later_starts_at_the_loaded_weights(config, tmp_path):
    config.write_text(CONFIG.replace("ema: {decay: 0.9}\n", ""))
    assert train(config, tmp_path / "run", "--set", "train.max_steps=2") == 0
    before = checkpoint(tmp_path / "run", 2)["modules"]["unet"]
    more = ["--resume", "auto", "--set", "ema.decay=0.99999", "ema.warmup=false", "train.max_steps=4"]
    assert train(config, tmp_path / "run", *more, "--allow-change", "ema") == 0
    average = checkpoint(tmp_path / "run", 4)["ema"]
    assert all(torch.allclose(average[f"unet.{name}"], before[name], atol=1e-6) for name in before)


def test_an_unknown_name_to_allow_is_refused(config, begun, capsys):
    assert train(config, begun(2), "--resume", "auto", "--allow-change", "train.sed") == 2
    assert "there is no such key" in capsys.readouterr().err


def replace_checkpoint(run: Path, step: int, content: object) -> None:
    """Put another content in the place of a checkpoint, under a sidecar that matches it."""
    torch.save(content, run / f"checkpoint-{step}.pt")
    data, sidecar = (run / f"checkpoint-{step}.pt").read_bytes(), run / f"checkpoint-{step}.json"
    facts = json.loads(sidecar.read_text()) | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sidecar.write_text(json.dumps(sealed(facts)))


def test_a_field_newer_than_the_checkpoint_does_not_stop_a_resume(config, begun):
    run = begun(2)
    content = checkpoint(run, 2)
    del content["config"]["model"]["unet_head_width"], content["config"]["train"]["max_bad_steps"]
    replace_checkpoint(run, 2, content)
    assert train(config, run, "--resume", "auto", "--set", "train.max_steps=3") == 0


def test_a_hostile_checkpoint_with_a_matching_sidecar_runs_nothing(config, begun, tmp_path, capsys):
    run = begun(2)

    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "it ran"), "w")

    replace_checkpoint(run, 2, {"format": 1, "step": 2, "config": Hostile()})
    assert train(config, run, "--resume", "auto") == 2
    assert "this is not a checkpoint of difftrain" in capsys.readouterr().err
    assert not (tmp_path / "it ran").exists()


def test_a_branch_that_ends_early_goes_on_from_its_branch_point(config, tmp_path, runs_to_copy):
    start = str(runs_to_copy[6] / "checkpoint-4.pt")
    assert train(config, tmp_path / "branch", "--resume", start, "--set", "train.max_steps=4") == 0
    assert train(config, tmp_path / "branch", "--resume", "auto") == 0
    assert metrics(tmp_path / "branch") == metrics(runs_to_copy[6])


def test_damaged_checkpoints_do_not_push_out_good_ones(config, begun):
    run = begun(6)
    (run / "checkpoint-6.json").rename(run / "checkpoint-400.json")
    assert train(config, run, "--resume", "auto", "--set", "train.max_steps=8") == 0
    assert sorted(path.name for path in run.glob("checkpoint-*.json")) == ["checkpoint-6.json", "checkpoint-8.json"]
    assert [entry["step"] for entry in manifest(run)["checkpoints"]] == [6, 8]


def test_a_start_that_cannot_load_its_weights_leaves_no_folder(config, tmp_path, capsys):
    empty = tmp_path / "model"
    (empty / "unet").mkdir(parents=True)
    (empty / "unet" / "config.json").write_text("{}")
    assert train(config, tmp_path / "run", "--set", "model.kind=sd", f"model.pretrained={empty}") == 2
    assert train(config, tmp_path / "run", "--set", f"model.init_from={tmp_path / 'nowhere'}") == 2
    assert "there is no such checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_harmless_keys_that_changed_are_said_and_kept_in_the_manifest(config, begun, capsys):
    run = begun(4)
    changed = ["train.micro_batch_size=2", "checkpoint.every_steps=5"]
    assert train(config, run, "--resume", "auto", "--set", *changed) == 0
    said = capsys.readouterr().out
    for key, was, now in (
        ("train.micro_batch_size", 4, 2),
        ("checkpoint.every_steps", 2, 5),
        ("train.max_steps", 4, 6),
    ):
        assert f"changed since the checkpoint: {key}: {was} -> {now}" in said
        first, second = manifest(run)["starts"]
        assert second["config_changes"][key] == {"was": was, "now": now}
        assert first["config_changes"] == {}


def test_a_start_that_lost_the_race_for_a_folder_changes_nothing_in_it(config, begun):
    run = RunDir(begun(4))
    seen, start = run.checkpoint_steps(), find_newest(run, print)  # here one start chooses, and then another one trains
    assert train(config, run.path, "--resume", "auto") == 0
    before = files(run.path)
    lock = RunLock(run.path)
    try:
        with pytest.raises(UserError, match="another run has just written this folder"):
            prepare_folder(run, lock, seen, start, print)
    finally:
        lock.release()
    assert files(run.path) | {"run.lock": b""} == before | {"run.lock": b""}


@pytest.mark.parametrize(
    ("name", "told"),
    [("metrics.jsonl", "line 2 should be step 2"), ("run_manifest.json", "the run manifest cannot be read")],
)
def test_a_resume_that_is_refused_for_a_damaged_file_writes_nothing(config, begun, capsys, name, told):
    run = begun(4)
    damaged = run / name
    damaged.write_text(damaged.read_text().replace('"step": 2', '"step" 2', 1))
    before = files(run)
    assert train(config, run, "--resume", "auto") == 2
    assert told in capsys.readouterr().err
    assert files(run) == before


def test_a_damaged_environment_file_is_written_anew(config, begun):
    run = begun(4)
    (run / "env.json").write_text("{")
    assert train(config, run, "--resume", "auto") == 0
    assert json.loads((run / "env.json").read_text())["packages"]["torch"]


@pytest.mark.usefixtures("plugins")
def test_a_resume_that_fails_before_its_first_step_is_the_end_on_record(config, begun):
    run = begun(2)
    more = ["--resume", "auto", "--set", "plugins=[failing]", "hooks=[{kind: no_luck}]"]
    assert train(config, run, *more) == 1
    assert manifest(run)["status"] == {"state": "failed", "exit_code": 1, "reason": "RuntimeError: no luck"}
