"""Plug-ins: a module beside the config, in a process of its own, since a kind once defined stays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PLUGIN = '''
from trainer.hook import MainHook
from trainer.objectives.base import Objective
from trainer.weighting import Weighting


class Shifted(Objective):
    """A straight path whose target is the noise."""

    kind = "shifted"

    def alpha_sigma(self, t):
        return 1 - t, t

    def model_time(self, t):
        return 1000 * t

    def target(self, x0, eps, t):
        return eps

    def x0(self, x_t, pred, t):
        return (x_t - t.view(-1, 1, 1, 1) * pred) / (1 - t).view(-1, 1, 1, 1)

    def x0_factor(self, t):
        return ((1 - t) / t).square()


class Halves(Weighting):
    """Half of everything."""

    kind = "halves"

    share: float = 0.5

    def weight(self, snr, x0_factor):
        return self.share * snr.new_ones(snr.shape)


class Diary(MainHook):
    """Writes the step of every line."""

    kind = "diary"

    name: str = "diary.txt"

    def on_metrics(self, view, lines):
        with open(view.folder / self.name, "a") as file:
            file.writelines(f"{line['step']}\\n" for line in lines)
'''

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


def difftrain(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_module_beside_the_config_adds_an_objective_a_weighting_and_a_hook(
    tmp_path: Path, write_config: Callable[[str], Path]
):
    (tmp_path / "my_losses.py").write_text(PLUGIN)
    done = difftrain(tmp_path, "train", "--config", str(write_config(PLUGGED)), "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "shifted, halves weighting" in done.stdout
    assert (tmp_path / "run" / "seen.txt").read_text().split() == ["1", "2", "3"]
    resolved = (tmp_path / "run" / "config.resolved.yaml").read_text()
    assert "my_losses" in resolved
    assert "share: 0.25" in resolved
    assert "name: seen.txt" in resolved
    again = difftrain(tmp_path, "validate", "--config", "run/config.resolved.yaml", "--output-dir", "other")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "other" / "config.resolved.yaml").read_text() == resolved.replace(
        "output_dir: run", "output_dir: other"
    )


def test_a_kind_that_exists_already_is_refused(tmp_path: Path, write_config: Callable[[str], Path]):
    (tmp_path / "my_losses.py").write_text(PLUGIN.replace('"shifted"', '"epsilon"'))
    done = difftrain(
        tmp_path,
        "validate",
        "--config",
        str(write_config(PLUGGED.replace("shifted", "epsilon"))),
        "--output-dir",
        "run",
    )
    assert done.returncode == 2
    assert "objective kind 'epsilon' is defined twice" in done.stderr
    assert "my_losses" in done.stderr
    assert "trainer.objectives.epsilon" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_plugin_that_is_not_there_is_refused_with_its_line(tmp_path: Path, write_config: Callable[[str], Path]):
    config = write_config(PLUGGED)
    done = difftrain(tmp_path, "validate", "--config", str(config), "--output-dir", "run")
    assert done.returncode == 2
    assert "my_losses" in done.stderr
    assert f"{config}:2" in done.stderr
    assert "Traceback" not in done.stderr
