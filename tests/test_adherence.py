"""The hook `adherence` measures a run on its own prompts and leaves adherence.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.adherence import WORDS
from trainer.cli import main

CONFIG = """\
model: {kind: tiny, vae: builtin, train_text_encoder: true}
data: {kind: shapes, image_size: 64, num_workers: 0, num_images: 32}
train: {max_steps: 4, global_batch_size: 4, log_every: 2}
objective: {kind: flow}
lr: {peak: 1e-3}
ema: {decay: 0.9}
hooks: [{kind: adherence, prompts: 6, sampler_steps: 2, every_steps: 2}]
"""

Write = Callable[[str], Path]


def train(config: Path, run: Path, *options: str) -> int:
    return main(["train", "--config", str(config), "--output-dir", str(run), *options])


def test_a_run_ends_with_the_shares_for_seen_and_held_out_combinations(write_config: Write, tmp_path: Path, capsys):
    run = tmp_path / "run"
    assert train(write_config(CONFIG), run) == 0
    report = json.loads((run / "adherence.json").read_text())
    assert report["step"] == 4
    for part in ("seen", "held_out", "untrained"):
        assert report[part].keys() == {*WORDS, "all", "n"}
        assert report[part]["n"] == 6
        assert all(0 <= report[part][word] <= 1 for word in WORDS)
    assert report["chance"]["colour"] == 1 / 8
    wrong = [each["place"] for each in report["mistakes"]]
    assert len(wrong) == 12 - round(6 * report["seen"]["all"]) - round(6 * report["held_out"]["all"])
    assert "before the first step" in capsys.readouterr().out
    measured = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    assert [line["step"] for line in measured if "adherence_seen_shape" in line] == [2, 4]
    assert measured[-1]["adherence_held_out_background"] == report["held_out"]["background"]


@pytest.mark.slow
def test_the_shares_of_an_interrupted_run_are_those_of_the_unbroken_one(write_config: Write, tmp_path: Path):
    config = write_config(CONFIG)
    assert train(config, tmp_path / "whole") == 0
    assert train(config, tmp_path / "broken", "--set", "train.max_steps=2", "hooks=[]") == 0
    assert train(config, tmp_path / "broken", "--resume", "auto") == 0
    assert (tmp_path / "whole" / "adherence.json").read_bytes() == (tmp_path / "broken" / "adherence.json").read_bytes()


def test_without_held_out_combinations_none_are_reported(write_config: Write, tmp_path: Path):
    options = ["data.held_out_fraction=0", "train.max_steps=1"]
    assert train(write_config(CONFIG), tmp_path / "run", "--set", *options) == 0
    assert json.loads((tmp_path / "run" / "adherence.json").read_text())["held_out"] is None


def test_pictures_of_another_source_are_refused_at_the_start(write_config, tmp_path, capsys):
    options = ["data.kind=imagefolder", f"data.data_root={tmp_path}"]
    assert train(write_config(CONFIG), tmp_path / "run", "--set", *options) == 2
    assert "adherence" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
