"""Plug-ins: modules beside the config, or on the path, that define kinds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import PLUGINS, difftrain

from trainer.cli import main

PLUGGED = """
plugins: [my_losses]
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 16}
train: {max_steps: 3, global_batch_size: 2, log_every: 1}
objective: {kind: shifted}
weighting: {kind: halves, share: 0.25}
lr: {peak: 1e-4}
hooks: [{kind: diary, name: seen.txt}]
"""

Write = Callable[[str], Path]


def test_a_module_in_the_working_directory_adds_kinds(tmp_path: Path, write_config: Write):
    shutil.copy(PLUGINS / "my_losses.py", tmp_path)
    words = ["--config", str(write_config(PLUGGED)), "--output-dir"]
    code, said = difftrain("train", *words, "run", cwd=tmp_path, PYTHONPATH="")
    assert code == 0, said
    assert "shifted, halves weighting" in said
    assert (tmp_path / "run" / "seen.txt").read_text().split() == ["1", "2", "3"]
    resolved = (tmp_path / "run" / "config.resolved.yaml").read_text()
    assert "my_losses" in resolved
    assert "share: 0.25" in resolved
    assert "name: seen.txt" in resolved
    words = ["--config", "run/config.resolved.yaml", "--output-dir", "other"]
    code, said = difftrain("validate", *words, cwd=tmp_path, PYTHONPATH="")
    assert code == 0, said
    other = (tmp_path / "other" / "config.resolved.yaml").read_text()
    assert other == resolved.replace("output_dir: run", "output_dir: other")


@pytest.mark.usefixtures("plugins")
def test_a_kind_that_exists_already_is_refused(tmp_path: Path, tiny_config: Path, capsys):
    words = ["--config", str(tiny_config), "--output-dir", str(tmp_path / "run")]
    assert main(["validate", *words, "--set", "plugins=[second_epsilon]"]) == 2
    said = capsys.readouterr().err
    assert "objective kind 'epsilon' is defined twice" in said
    assert "second_epsilon" in said
    assert "trainer.objectives.epsilon" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_plugin_that_is_not_there_is_refused_with_its_line(tmp_path: Path, write_config: Write, capsys):
    config = write_config(PLUGGED)
    assert main(["validate", "--config", str(config), "--output-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "my_losses" in said
    assert f"{config}:2" in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("plugins")
def test_temporary_kinds_are_forgotten_and_others_stay():
    from trainer.objectives.base import Objective
    from trainer.registry import temporary_kinds

    before = Objective.kinds()
    for _ in range(2):  # the second time its module is imported anew
        with temporary_kinds():
            __import__("my_losses")
            assert "shifted" in Objective.kinds()
        assert Objective.kinds() == before
