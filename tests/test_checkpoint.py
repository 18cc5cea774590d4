"""What is saved, when it is safe, and what is kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import copy_of, files, metrics

from trainer.checkpoint import FORMAT, Retention, fault_of, find_newest, save_checkpoint, sealed
from trainer.cli import main
from trainer.errors import UserError
from trainer.files import sha256_file
from trainer.hooks.checkpointing import copied, tensors
from trainer.run.manifest import read_manifest
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that no test changes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(run) == 0
    return run


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after four steps, to be copied."""
    run = tmp_path_factory.mktemp("four") / "run"
    assert train(run, "--set", "train.max_steps=4") == 0
    return run


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
    losses = {step: line["validation_loss"] for step, line in enumerate(metrics(run), start=1)}
    best = min(losses, key=lambda step: losses[step])
    assert best < 4
    assert RunDir(run).checkpoint_steps() == sorted({best, 4, 5})
    assert json.loads(RunDir(run).sidecar(best).read_text())["validation_loss"] == losses[best]


def test_a_checkpoint_saved_in_the_background_is_the_one_of_its_step(whole: Path, tmp_path: Path):
    waited = tmp_path / "waited"
    assert train(waited, "--set", "checkpoint.background=false") == 0
    for step in (4, 6):
        ours, theirs = (torch.load(RunDir(run).checkpoint(step), weights_only=True) for run in (whole, waited))
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


def test_the_next_copy_takes_the_memory_of_the_one_before_where_it_fits():
    copy = copied({"a": torch.ones(2), "b": torch.ones(3), "c": [torch.ones(4)]})
    state = {"a": torch.zeros(2), "b": torch.zeros(5), "c": [torch.zeros(4, dtype=torch.float64)], "d": torch.zeros(6)}
    again = copied(state, copy)
    assert again["a"].data_ptr() == copy["a"].data_ptr()
    for ours, theirs in zip(tensors(again), tensors(state), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


def test_a_save_that_fails_costs_one_checkpoint(tmp_path: Path, capsys):
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


def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(two_checkpoints: RunDir):
    newest = two_checkpoints.checkpoint(2)
    size, found, trials = newest.stat().st_size, 0, 200
    for trial in range(trials):
        position, bit = trial * size // trials, trial % 8
        flipped(newest, position, bit)
        heard: list[str] = []
        start = find_newest(two_checkpoints, heard.append)
        found += start is not None and start.path == two_checkpoints.checkpoint(1) and "sha256" in heard[0]
        flipped(newest, position, bit)
    assert found == trials
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


def rewritten(run_dir: RunDir, step: int, version: int, **facts: Any) -> None:
    """Make the checkpoint of `step` one of another format: a content and a sidecar that agree, of the same layout."""
    path = run_dir.checkpoint(step)
    torch.save(torch.load(path, weights_only=True) | {"format": version}, path)
    sidecar = json.loads(run_dir.sidecar(step).read_text()) | {"format": version, **facts}
    sidecar = sealed(sidecar | {"bytes": path.stat().st_size, "sha256": sha256_file(path)})
    if version == 1:
        del sidecar["seal"]
    run_dir.sidecar(step).write_text(json.dumps(sidecar))


def as_format_1_left_it(run_dir: RunDir, step: int) -> None:
    """Make a run what the version before FORMAT 2 wrote: a fingerprint of sizes, and no list of the records."""
    old = hashlib.sha256(b"keys, captions and sizes").hexdigest()
    rewritten(run_dir, step, 1, data_fingerprint=old)
    manifest = json.loads(run_dir.manifest.read_text())
    del manifest["data"]["fingerprint_format"]
    manifest["data"]["fingerprint"] = old
    manifest["checkpoints"] = [entry for entry in manifest["checkpoints"] if entry["step"] != step]
    run_dir.manifest.write_text(json.dumps(manifest))
    run_dir.records.unlink()


def test_a_checkpoint_of_format_1_ends_as_the_unbroken_run(whole: Path, tmp_path: Path, capsys):
    broken, branch = tmp_path / "broken", tmp_path / "branch"
    assert train(broken, "--set", "train.max_steps=2") == 0
    as_format_1_left_it(RunDir(broken), 2)
    assert fault_of(RunDir(broken), 2) is None
    assert main(["verify", str(broken)]) == 0
    assert "ok       data (of another kind of fingerprint: not compared)" in capsys.readouterr().out
    assert train(branch, "--resume", str(RunDir(broken).checkpoint(2)), "--set", "train.max_steps=4") == 0
    assert train(branch, "--resume", "auto") == 0
    capsys.readouterr()
    assert train(broken, "--resume", "auto") == 0
    said = capsys.readouterr().out
    assert "checkpoint-2.pt is of format 1: whether the data are still the same cannot be told\n" in said
    for run in (broken, branch):
        ours, theirs = (torch.load(RunDir(folder).checkpoint(6), weights_only=True) for folder in (run, whole))
        assert ours["format"] == FORMAT
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            assert torch.equal(a, b)
        assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(whole)]
    assert RunDir(broken).records.is_file()
    assert train(broken, "--resume", "auto", "--set", "train.max_steps=8") == 0
    assert "is of format" not in capsys.readouterr().out
    assert main(["verify", str(broken)]) == 0


def test_a_checkpoint_of_a_newer_format_is_refused_not_passed_over(four_steps: Path, tmp_path: Path, capsys):
    run = copy_of(four_steps, tmp_path / "run")
    rewritten(RunDir(run), 4, FORMAT + 1)
    sidecar = json.loads(RunDir(run).sidecar(4).read_text())
    del sidecar["sha256"]  # a newer format may call it by another name
    RunDir(run).sidecar(4).write_text(json.dumps(sealed(sidecar)))
    before = files(run)
    assert train(run, "--resume", "auto") == 2
    said = capsys.readouterr().err
    assert f"the checkpoint is of format {FORMAT + 1}, this version reads up to {FORMAT}\n" in said
    assert "checkpoint-4.json" in said
    assert files(run) == before
    assert main(["verify", str(run)]) == 1
    assert f"CHANGED  checkpoint-4.pt  the checkpoint is of format {FORMAT + 1}" in capsys.readouterr().out


def test_a_newer_content_under_todays_sidecar_is_refused(two_checkpoints: RunDir):
    rewritten(two_checkpoints, 2, FORMAT + 1)
    sidecar = json.loads(two_checkpoints.sidecar(2).read_text()) | {"format": FORMAT}
    two_checkpoints.sidecar(2).write_text(json.dumps(sealed(sidecar)))
    found = find_newest(two_checkpoints, print)
    assert found is not None
    with pytest.raises(
        UserError, match=rf"format {FORMAT + 1}, this version reads up to {FORMAT}\n  in .*checkpoint-2.pt"
    ):
        found.load()


@pytest.mark.parametrize("version", [0, -1, "2", None, 1.5])
def test_a_sidecar_of_no_format_is_damaged(two_checkpoints: RunDir, version: Any):
    rewritten(two_checkpoints, 2, version)
    heard: list[str] = []
    found = find_newest(two_checkpoints, heard.append)
    assert found is not None
    assert found.path == two_checkpoints.checkpoint(1)
    assert "checkpoint-2 is passed over: its sidecar cannot be read" in heard[0]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"step": 2}', "\x00"])
def test_a_damaged_sidecar_of_an_older_checkpoint_costs_that_one_alone(four_steps: Path, tmp_path: Path, content: str):
    run = copy_of(four_steps, tmp_path / "run")
    RunDir(run).sidecar(2).write_text(content)
    assert train(run, "--resume", "auto") == 0
    assert RunDir(run).checkpoint_steps() == [2, 4, 6]
    assert [entry["step"] for entry in read_manifest(RunDir(run).manifest)["checkpoints"]] == [4, 6]
    assert fault_of(RunDir(run), 4) is None, "the damaged one does not count as one to keep"


def test_any_flipped_bit_of_the_newest_sidecar_is_found(two_checkpoints: RunDir):
    sidecar = two_checkpoints.sidecar(2)
    whole = sidecar.read_bytes()
    unnoticed = []
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        sidecar.write_bytes(damaged)
        found = find_newest(two_checkpoints, lambda line: None)
        assert found is not None
        if found.path != two_checkpoints.checkpoint(1):
            unnoticed.append(bit)
            assert json.loads(damaged) == json.loads(whole)
    assert len(unnoticed) < 20, "white space that stays white space"
