"""Where a start goes on: the same run to the bit, another one refused, and nothing lost that was there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from runs import CONFIG, checkpoint, metrics, same, train

from trainer.checkpoint import find_newest, sealed
from trainer.errors import UserError
from trainer.launch import _prepare_folder
from trainer.run.lock import RunLock
from trainer.run.rundir import RunDir


def pictures(folder: Path, count: int) -> str:
    from trainer.data.dummy import write_dummy_imagefolder

    write_dummy_imagefolder(folder, num_images=count, image_size=32)
    return f"data.data_root={folder}"


def test_a_resumed_run_ends_with_the_weights_of_the_unbroken_one_bit_for_bit(config, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(config, whole) == 0
    assert train(config, broken, "--set", "train.max_steps=2") == 0
    assert train(config, broken, "--resume", "auto", "--set", "train.max_steps=4", "data.num_workers=2") == 0
    assert train(config, broken, "--resume", "latest") == 0
    for part in ("modules", "optimizer", "ema"):
        assert same(checkpoint(whole, 6)[part], checkpoint(broken, 6)[part]), part
    assert metrics(whole) == metrics(broken)


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


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(config, run) == 0
    newest = run / "checkpoint-6.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    assert train(config, run, "--resume", "auto") == 0
    said = capsys.readouterr().out
    assert "checkpoint-6 is passed over: its sha256" in said
    assert "at step 4" in said
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_with_each_named(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(config, run) == 0
    for path in run.glob("checkpoint-*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    before = (run / "metrics.jsonl").read_bytes()
    assert train(config, run, "--resume", "auto") == 2
    said = capsys.readouterr().err
    assert "checkpoint-4:" in said
    assert "checkpoint-6:" in said
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_second_run_into_the_same_folder_is_refused_and_the_first_is_untouched(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(config, run) == 0
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert train(config, run) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_resume_with_another_objective_is_refused_unless_that_key_is_allowed(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(config, run, "--set", "train.max_steps=2") == 0
    assert train(config, run, "--resume", "auto", "--set", "objective.kind=v_prediction") == 2
    assert "objective.kind: 'epsilon' -> 'v_prediction'" in capsys.readouterr().err
    allowed = ["--allow-change", "objective.kind"]
    assert train(config, run, "--resume", "auto", "--set", "objective.kind=v_prediction", *allowed) == 0


def test_resume_latest_needs_a_checkpoint_and_auto_starts_without_one(config, tmp_path, capsys):
    assert train(config, tmp_path / "run", "--resume", "latest") == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train(config, tmp_path / "run", "--resume", "auto") == 0
    assert "starting at step 0" in capsys.readouterr().out


def test_a_branch_from_a_checkpoint_carries_its_history(config, tmp_path):
    assert train(config, tmp_path / "run") == 0
    branch = tmp_path / "branch"
    assert train(config, branch, "--resume", str(tmp_path / "run" / "checkpoint-4.pt")) == 0
    assert metrics(branch) == metrics(tmp_path / "run")
    assert same(checkpoint(branch, 6)["modules"], checkpoint(tmp_path / "run", 6)["modules"])


def test_a_resume_on_other_data_is_refused_unless_that_is_allowed(config, tmp_path, capsys):
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


def test_an_allowed_change_of_the_optimizer_takes_effect(config, tmp_path):
    assert train(config, tmp_path / "run", "--set", "train.max_steps=2") == 0
    more = ["--resume", "auto", "--set", "optimizer.weight_decay=0.5", "--allow-change", "optimizer.weight_decay"]
    assert train(config, tmp_path / "run", *more) == 0
    assert checkpoint(tmp_path / "run", 6)["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_an_average_that_is_switched_on_later_starts_at_the_loaded_weights(config, tmp_path):
    config.write_text(CONFIG.replace("ema: {decay: 0.9}\n", ""))
    assert train(config, tmp_path / "run", "--set", "train.max_steps=2") == 0
    before = checkpoint(tmp_path / "run", 2)["modules"]["unet"]
    more = ["--resume", "auto", "--set", "ema.decay=0.99999", "ema.warmup=false", "train.max_steps=4"]
    assert train(config, tmp_path / "run", *more, "--allow-change", "ema") == 0
    average = checkpoint(tmp_path / "run", 4)["ema"]
    assert all(torch.allclose(average[f"unet.{name}"], before[name], atol=1e-6) for name in before)


def test_an_unknown_name_to_allow_is_refused(config, tmp_path, capsys):
    assert train(config, tmp_path / "run", "--set", "train.max_steps=2") == 0
    assert train(config, tmp_path / "run", "--resume", "auto", "--allow-change", "train.sed") == 2
    assert "there is no such key" in capsys.readouterr().err


def test_a_config_field_that_is_newer_than_the_checkpoint_does_not_stop_a_resume(config, tmp_path):
    run = tmp_path / "run"
    assert train(config, run, "--set", "train.max_steps=2") == 0
    content = checkpoint(run, 2)
    del content["config"]["model"]["unet_head_width"], content["config"]["train"]["max_bad_steps"]
    torch.save(content, run / "checkpoint-2.pt")
    sidecar = json.loads((run / "checkpoint-2.json").read_text())
    data = (run / "checkpoint-2.pt").read_bytes()
    sidecar |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (run / "checkpoint-2.json").write_text(json.dumps(sealed(sidecar)))
    assert train(config, run, "--resume", "auto") == 0


def test_a_hostile_checkpoint_with_a_matching_sidecar_is_refused_and_runs_nothing(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(config, run, "--set", "train.max_steps=2") == 0

    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "it ran"), "w")

    torch.save({"format": 1, "step": 2, "config": Hostile()}, run / "checkpoint-2.pt")
    data = (run / "checkpoint-2.pt").read_bytes()
    sidecar = json.loads((run / "checkpoint-2.json").read_text())
    sidecar |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (run / "checkpoint-2.json").write_text(json.dumps(sealed(sidecar)))
    assert train(config, run, "--resume", "auto") == 2
    assert "this is not a checkpoint of difftrain" in capsys.readouterr().err
    assert not (tmp_path / "it ran").exists()


def test_a_branch_that_is_killed_early_goes_on_from_its_branch_point(config, tmp_path):
    assert train(config, tmp_path / "run") == 0
    start = str(tmp_path / "run" / "checkpoint-4.pt")
    assert train(config, tmp_path / "branch", "--resume", start, "--set", "train.max_steps=4") == 0
    assert train(config, tmp_path / "branch", "--resume", "auto") == 0
    assert metrics(tmp_path / "branch") == metrics(tmp_path / "run")


def test_damaged_checkpoints_do_not_push_out_good_ones(config, tmp_path):
    run = tmp_path / "run"
    assert train(config, run) == 0
    (run / "checkpoint-6.json").rename(run / "checkpoint-400.json")
    assert train(config, run, "--resume", "auto", "--set", "train.max_steps=8") == 0
    assert sorted(path.name for path in run.glob("checkpoint-*.json")) == ["checkpoint-6.json", "checkpoint-8.json"]
    manifest = json.loads((run / "run_manifest.json").read_text())
    assert [entry["step"] for entry in manifest["checkpoints"]] == [6, 8]


def test_a_start_that_cannot_load_its_weights_leaves_no_folder(config, tmp_path, capsys):
    empty = tmp_path / "model"
    (empty / "unet").mkdir(parents=True)
    (empty / "unet" / "config.json").write_text("{}")
    assert train(config, tmp_path / "run", "--set", "model.kind=sd", f"model.pretrained={empty}") == 2
    assert train(config, tmp_path / "run", "--set", f"model.init_from={tmp_path / 'nowhere'}") == 2
    assert "there is no such checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_resume_says_what_harmless_keys_changed_and_the_manifest_keeps_it(config, tmp_path, capsys):
    assert train(config, tmp_path / "run", "--set", "train.max_steps=3") == 0
    capsys.readouterr()
    changed = ["train.micro_batch_size=2", "checkpoint.every_steps=5"]
    assert train(config, tmp_path / "run", "--resume", "auto", "--set", *changed) == 0
    said = capsys.readouterr().out
    for key, was, now in (
        ("train.micro_batch_size", 4, 2),
        ("checkpoint.every_steps", 2, 5),
        ("train.max_steps", 3, 6),
    ):
        assert f"changed since the checkpoint: {key}: {was} -> {now}" in said
        first, second = json.loads((tmp_path / "run" / "run_manifest.json").read_text())["starts"]
        assert second["config_changes"][key] == {"was": was, "now": now}
        assert first["config_changes"] == {}


def test_a_start_that_lost_the_race_for_the_folder_harms_nothing_of_the_run_that_won(config, tmp_path):

    run = RunDir(tmp_path / "run")
    assert train(config, run.path, "--set", "train.max_steps=4") == 0
    seen, start = run.checkpoint_steps(), find_newest(run, print)  # here one start chooses, and then another one trains
    assert train(config, run.path, "--resume", "auto") == 0
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file() and path.name != "run.lock"}
    lock = RunLock(run.path)
    try:
        with pytest.raises(UserError, match="another run has just written this folder"):
            _prepare_folder(run, lock, seen, start, print)
    finally:
        lock.release()
    after = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file() and path.name != "run.lock"}
    assert after == before


@pytest.mark.parametrize(
    ("name", "told"),
    [("metrics.jsonl", "line 2 should be step 2"), ("run_manifest.json", "the run manifest cannot be read")],
)
def test_a_resume_that_is_refused_for_a_damaged_file_writes_nothing(config, tmp_path, capsys, name, told):
    run = tmp_path / "run"
    assert train(config, run, "--set", "train.max_steps=4") == 0
    damaged = run / name
    damaged.write_text(damaged.read_text().replace('"step": 2', '"step" 2', 1))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert train(config, run, "--resume", "auto") == 2
    assert told in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_damaged_environment_file_is_written_anew(config, tmp_path):
    run = tmp_path / "run"
    assert train(config, run, "--set", "train.max_steps=4") == 0
    (run / "env.json").write_text("{")
    assert train(config, run, "--resume", "auto") == 0
    assert json.loads((run / "env.json").read_text())["packages"]["torch"]


def test_a_resume_that_fails_before_its_first_step_does_not_leave_the_end_of_the_start_before(
    config, tmp_path, plug_in
):
    plug_in(
        "no_hook",
        """\
        from trainer.hook import CollectiveHook
        class NoHook(CollectiveHook):
            kind = 'no_hook'
            def on_start(self, training):
                raise RuntimeError('no luck')
        """,
    )
    assert train(config, tmp_path / "run", "--set", "train.max_steps=2") == 0
    more = ["--resume", "auto", "--set", "plugins=[no_hook]", "hooks=[{kind: no_hook}]"]
    assert train(config, tmp_path / "run", *more) == 1
    status = json.loads((tmp_path / "run" / "run_manifest.json").read_text())["status"]
    assert status == {"state": "failed", "exit_code": 1, "reason": "RuntimeError: no luck"}
