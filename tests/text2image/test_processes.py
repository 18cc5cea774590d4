"""What only real processes show: several ranks, launchers, signals, an uninstalled checkout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "trainer" / "train.py"
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
TWO_RANKS = [*LAUNCHER, "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]

CONFIG = """\
model: {kind: tiny, train_text_encoder: true}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 10, caption_dropout: 0.2, random_flip: true}
train: {seed: 7, max_steps: 6, global_batch_size: 4, micro_batch_size: 2, log_every: 2}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-3, warmup_steps: 3}
ema: {decay: 0.9}
validation: {prompts: [a red circle, a blue square, a pink star], every_steps: 3, sampler_steps: 2}
checkpoint: {every_steps: 3}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, at one thread per rank."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return kept | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | more


def run(command: list[str], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=240)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_gloo_ranks_train_the_same_run_as_one(config, tmp_path):
    import torch

    arguments = ["--config", str(config), "--output-dir"]
    two = run([*TWO_RANKS, str(TRAIN), *arguments, "two"], tmp_path)
    assert two.returncode == 0, two.stdout + two.stderr
    assert "batch  4 images = 2 images x 2 ranks x 1 accumulation" in two.stdout
    one = run([sys.executable, str(TRAIN), *arguments, "one"], tmp_path)
    assert one.returncode == 0, one.stdout + one.stderr
    assert "batch  4 images = 2 images x 1 rank x 2 accumulation" in one.stdout

    manifest = json.loads((tmp_path / "two" / "run_manifest.json").read_text())
    assert manifest["topology"] == {"world_size": 2, "micro_batch_size": 2, "accumulation": 1, "num_machines": 1}
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    states = [torch.load(tmp_path / name / "checkpoint-6.pt", weights_only=True) for name in ("one", "two")]
    for name, weight in states[0]["modules"]["unet"].items():
        assert torch.allclose(weight, states[1]["modules"]["unet"][name], atol=1e-4), name
    grids = [(tmp_path / name / "samples" / "step-000000.png").read_bytes() for name in ("one", "two")]
    assert grids[0] == grids[1], "the ranks share the prompts, and each picture is its own function"


def test_a_launcher_whose_ranks_do_not_see_each_other_is_refused(config, tmp_path):
    command = [*LAUNCHER, "--cpu", "--num_processes", "2", str(TRAIN), "--config", str(config), "--output-dir", "run"]
    alone = run(command, tmp_path)
    assert alone.returncode == 1, "launchers turn every exit code into 1"
    assert "asked for several processes without a GPU, but starts only one" in alone.stderr
    assert not (tmp_path / "run").exists()


def test_a_refusal_is_said_once_by_two_ranks(config, tmp_path):
    command = [*TWO_RANKS, str(TRAIN), "--config", str(config), "--output-dir", "run"]
    refused = run([*command, "--set", "train.max_stepss=3"], tmp_path)
    assert refused.returncode == 1, "launchers turn every exit code into 1"
    assert refused.stderr.count("did you mean `max_steps`?") == 1
    assert not (tmp_path / "run").exists()


def test_an_uninstalled_checkout_trains_through_accelerate_launch(config, tmp_path):
    # A copy of the package elsewhere: neither installed nor next to the working directory.
    shutil.copytree(ROOT / "trainer", tmp_path / "checkout" / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    marker = tmp_path / "checkout" / "trainer" / "rng.py"
    marker.write_text(marker.read_text() + '\nprint("the copy was imported")\n')
    command = [
        *LAUNCHER,
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    done = run([*command, "checkout/trainer/train.py", "--config", str(config), "--output-dir", "run"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the copy was imported" in done.stdout
    assert len(metrics(tmp_path / "run")) == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_saves_and_exits_75_and_auto_goes_on(config, tmp_path, number):
    command = [sys.executable, str(TRAIN), "--config", str(config), "--output-dir", "run", "--resume", "auto"]
    more = ["--set", "checkpoint.every_steps=100000", "train.log_every=1", "data.num_workers=1"]
    process = subprocess.Popen(
        [*command, *more, "train.max_steps=100000"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    os.killpg(process.pid, number)  # as a terminal or a scheduler does: the loader's workers get it too
    process.communicate(timeout=60)
    assert process.returncode == 75
    status = json.loads((tmp_path / "run" / "run_manifest.json").read_text())["status"]
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert (tmp_path / "run" / f"checkpoint-{steps[-1]}.json").is_file()
    done = run([*command, *more, f"train.max_steps={steps[-1] + 2}"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, steps[-1] + 3))


def test_bad_input_is_one_line_and_exit_2_in_under_two_seconds(tmp_path):
    good = tmp_path / "good.yaml"
    good.write_text(CONFIG)
    bad = tmp_path / "bad.yaml"
    bad.write_text(CONFIG.replace("max_steps", "max_step"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    folder = ["--set", "data.kind=imagefolder"]
    cases = {
        "did you mean `max_steps`": ["--config", str(bad)],
        "cannot read the config": ["--config", "missing.yaml"],
        "not 'many'": ["--config", str(good), "--set", "train.max_steps=many"],
        "data_root: required": ["--config", str(good), *folder],
        "empty": ["--config", str(good), *folder, "data.data_root=empty"],
        "nowhere": ["--config", str(good), *folder, "data.data_root=nowhere"],
        "nearest that fit: 4, 6": ["--config", str(good), "--set", "train.global_batch_size=5"],
        "cannot be written": ["--config", str(good), "--output-dir", "file/run"],
        "no-such-model": ["--config", str(good), "--set", "model.kind=sd", "model.pretrained=./no-such-model"],
    }
    for expected, arguments in cases.items():
        started = time.monotonic()
        refused = run([sys.executable, "-m", "trainer", "train", *arguments], tmp_path, PYTHONPATH=str(ROOT))
        seconds = time.monotonic() - started
        assert refused.returncode == 2, (expected, refused.stderr)
        assert expected in refused.stderr
        assert "Traceback" not in refused.stderr
        assert seconds < 2 * slowness(), f"{expected}: {seconds:.1f} s"
    assert not (tmp_path / "runs").exists()


def slowness() -> float:
    """How much slower than usual this machine starts a Python now, at least 1: a shared core must not fail a test."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import json, argparse, pydantic"], check=True, timeout=60)
    return max(1.0, (time.monotonic() - started) / 0.25)
