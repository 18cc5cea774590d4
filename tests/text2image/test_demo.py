"""The demo's config, cut short: killed half-way and resumed, it ends with the same pictures and the same report."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from forked import Job, difftrain
from runs import steps, wait_for

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


def arguments(run: Path, *more: str) -> list[str]:
    return ["train", "--config", str(CONFIG), "--output-dir", str(run), *more, "--set", *SHORT]


@pytest.mark.slow
def test_the_demo_killed_half_way_ends_with_the_same_grid(tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, said = difftrain(*arguments(whole), cwd=tmp_path)
    assert code == 0, said
    with Job(*arguments(broken), cwd=tmp_path) as job:
        wait_for(lambda: steps(broken) >= 6, job)
        job.send_signal(signal.SIGKILL)
        assert job.wait(60) == -signal.SIGKILL
    assert not (broken / LEFT[0]).exists(), "it was killed before its end"
    code, said = difftrain(*arguments(broken, "--resume", "auto"), cwd=tmp_path)
    assert code == 0, said
    for name in LEFT:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("demo") / "run"
    short = [*SHORT, "train.max_steps=1", "validation=null", "hooks=[]"]
    assert main(["train", "--config", str(CONFIG), "--output-dir", str(run), "--set", *short]) == 0
    return run


@pytest.mark.parametrize(
    "prompt", ["circle red a background white large a on", "ein großer zinnoberroter Kreis 🟥", ""]
)
def test_any_prompt_gives_a_picture(one_step: Path, tmp_path: Path, prompt: str):
    output = tmp_path / "picture.png"
    assert main(["sample", "--run", str(one_step), "--prompt", prompt, "--steps", "2", "--output", str(output)]) == 0
    assert output.is_file()


def test_the_demo_is_a_config_that_only_its_command_knows():
    load_config(CONFIG)
    package = CONFIG.parent.parent / "trainer"
    knowing = {path.name for path in package.rglob("*.py") if "demo.yaml" in path.read_text(encoding="utf-8")}
    assert knowing == {"demo.py"}
