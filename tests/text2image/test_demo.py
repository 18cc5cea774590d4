"""The demo's config, cut short: killed half-way and resumed, it ends with the same pictures and the same report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.cli import main
from trainer.commands.demo import CONFIG
from trainer.config_file import load_config

SHORT = [
    *("train.max_steps=12", "train.log_every=1", "train.global_batch_size=8", "lr.warmup_steps=2"),
    *("data.num_images=64", "data.num_workers=0", "checkpoint.every_steps=4"),
    *("validation.every_steps=4", "validation.sampler_steps=3"),
    "hooks=[{kind: adherence, prompts: 8, sampler_steps: 3}]",
]
LEFT = ("samples/step-000012.png", "first_and_last.png", "progress.png", "adherence.json")


def command(run: Path, *more: str) -> list[str]:
    config = ["--config", str(CONFIG), "--output-dir", str(run)]
    return [sys.executable, "-m", "trainer", "train", *config, *more, "--set", *SHORT]


@pytest.mark.slow
def test_the_demo_killed_half_way_and_resumed_ends_with_the_same_grid_pixel_for_pixel(tmp_path: Path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(whole), check=True, env=environment, stdout=subprocess.DEVNULL, timeout=240)
    with subprocess.Popen(command(broken), env=environment, stdout=subprocess.DEVNULL) as killed:
        log, deadline = broken / "metrics.jsonl", time.monotonic() + 120
        while not (log.is_file() and log.read_bytes().count(b"\n") >= 6):
            assert killed.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "six steps take too long"
            time.sleep(0.005)
        killed.send_signal(signal.SIGKILL)
    assert not (broken / LEFT[0]).exists(), "it was killed before its end"
    subprocess.run(
        command(broken, "--resume", "auto"), check=True, env=environment, stdout=subprocess.DEVNULL, timeout=240
    )
    for name in LEFT:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


@pytest.mark.parametrize(
    "prompt", ["circle red a background white large a on", "ein großer zinnoberroter Kreis 🟥", ""]
)
def test_prompts_in_another_order_or_of_unknown_words_give_a_picture(tmp_path: Path, prompt: str):
    run = tmp_path / "run"
    assert main(["train", "--config", str(CONFIG), "--output-dir", str(run), "--set", *SHORT, "train.max_steps=1"]) == 0
    output = tmp_path / "picture.png"
    assert main(["sample", "--run", str(run), "--prompt", prompt, "--steps", "2", "--output", str(output)]) == 0
    assert output.is_file()


def test_the_demo_is_an_ordinary_config_and_only_the_command_demo_knows_it():
    load_config(CONFIG)
    package = CONFIG.parent.parent / "trainer"
    knowing = {path.name for path in package.rglob("*.py") if "demo.yaml" in path.read_text(encoding="utf-8")}
    assert knowing == {"demo.py"}
