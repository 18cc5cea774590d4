"""What only real processes show: several ranks, launchers, signals, an uninstalled checkout, refused starts."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from forked import ROOT
from runs import TRAIN, checkpoint, command, finish, launch, manifest, metrics, saved, steps, train_arguments, wait_for

ACCELERATE = ("python", "-m", "accelerate.commands.launch")
# Port 0: a free one, so that launchers can run side by side.
TWO_RANKS = (*ACCELERATE, "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), "--main_process_port", "0")

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
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def run(*words: str, cwd: Path, **more: str) -> tuple[int, str]:
    """The exit code of a command, and all that it said."""
    with command(*words, cwd=cwd, **more) as process:
        said, _ = process.communicate(timeout=240)
    return process.returncode, said


def test_two_ranks_of_accelerate_launch_train_the_run_of_one(folder):
    import torch

    code, said = run(*TWO_RANKS, TRAIN, *train_arguments(folder, "two"), cwd=folder)
    assert code == 0, said
    assert "batch  4 images = 2 images x 2 ranks x 1 accumulation" in said
    said = finish(folder, "one")
    assert "batch  4 images = 2 images x 1 rank x 2 accumulation" in said

    two = manifest(folder / "two")
    assert two["topology"] == {"world_size": 2, "micro_batch_size": 2, "accumulation": 1, "num_machines": 1}
    for a, b in zip(metrics(folder / "one"), metrics(folder / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    states = [checkpoint(folder / name, 6) for name in ("one", "two")]
    for name, weight in states[0]["modules"]["unet"].items():
        assert torch.allclose(weight, states[1]["modules"]["unet"][name], atol=1e-4), name
    grids = [(folder / name / "samples" / "step-000000.png").read_bytes() for name in ("one", "two")]
    assert grids[0] == grids[1], "the ranks share the prompts, and each picture is its own function"


def test_a_launcher_whose_ranks_do_not_see_each_other_is_refused(folder):
    alone = (*ACCELERATE, "--cpu", "--num_processes", "2", "--main_process_port", "0", TRAIN)
    code, said = run(*alone, *train_arguments(folder, "run"), cwd=folder)
    assert code == 1, "launchers turn every exit code into 1"
    assert "asked for several processes without a GPU, but starts only one" in said
    assert not (folder / "run").exists()


def test_a_refusal_is_said_once_by_two_ranks(folder):
    code, said = run(*TWO_RANKS, TRAIN, *train_arguments(folder, "run", "train.max_stepss=3"), cwd=folder)
    assert code == 1, "launchers turn every exit code into 1"
    assert said.count("did you mean `max_steps`?") == 1
    assert not (folder / "run").exists()


def test_an_uninstalled_checkout_trains_through_accelerate_launch(folder):
    # A copy of the package elsewhere: neither installed nor next to the working directory.
    copy = folder / "checkout" / "trainer"
    shutil.copytree(ROOT / "trainer", copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "rng.py").write_text((copy / "rng.py").read_text() + '\nprint("the copy was imported")\n')
    one = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    words = [*ACCELERATE, *one, "checkout/trainer/train.py", *train_arguments(folder, "run")]
    code, said = run(*words, cwd=folder, PYTHONPATH="")
    assert code == 0, said
    assert "the copy was imported" in said
    assert len(metrics(folder / "run")) == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75_and_the_run_goes_on(folder, number):
    more = ("checkpoint.every_steps=100000", "train.log_every=1", "data.num_workers=1", "validation=null")
    with launch(folder, "run", *more, "train.max_steps=100000") as job:
        wait_for(lambda: steps(folder / "run") >= 3, job)
        os.killpg(job.pid, number)  # as a terminal or a scheduler does: the loader's workers get it too
        assert job.wait(60) == 75
    status = manifest(folder / "run")["status"]
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    numbers = [line["step"] for line in metrics(folder / "run")]
    assert saved(folder / "run") == [numbers[-1]]
    finish(folder, "run", *more, f"train.max_steps={numbers[-1] + 2}")
    assert [line["step"] for line in metrics(folder / "run")] == list(range(1, numbers[-1] + 3))


# The stack, of which a refusal needs nothing: it would take seconds.
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "datasets")
BAD_INPUT = {
    "did you mean `max_steps`": ["--config", "bad.yaml"],
    "cannot read the config": ["--config", "missing.yaml"],
    "not 'many'": ["--set", "train.max_steps=many"],
    "data_root: required": ["--set", "data.kind=imagefolder"],
    "empty": ["--set", "data.kind=imagefolder", "data.data_root=empty"],
    "nowhere": ["--set", "data.kind=imagefolder", "data.data_root=nowhere"],
    "nearest that fit: 4, 6": ["--set", "train.global_batch_size=5"],
    "cannot be written": ["--output-dir", "file/run"],
    "no-such-model": ["--set", "model.kind=sd", "model.pretrained=./no-such-model"],
}


def bad_input(folder: Path) -> None:
    (folder / "bad.yaml").write_text(CONFIG.replace("max_steps", "max_step"))
    (folder / "empty").mkdir()
    (folder / "file").write_text("not a folder")


@pytest.mark.parametrize("expected", BAD_INPUT)
def test_bad_input_is_said_in_a_few_words_and_exit_2(folder, expected, capsys, monkeypatch):
    from trainer.cli import main

    bad_input(folder)
    monkeypatch.chdir(folder)
    assert main(["train", "--config", "config.yaml", *BAD_INPUT[expected]]) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) <= 4, "cause, place, fix; of a key, the line that it stands in"
    assert "Traceback" not in said.out + said.err
    assert not (folder / "runs").exists()


def test_bad_input_is_refused_before_anything_heavy_is_imported(folder):
    # One process for all: in this one torch is long there.
    bad_input(folder)
    cases = [["train", "--config", "config.yaml", *words] for words in BAD_INPUT.values()]
    seen = f"print([main(c) for c in {cases!r}], [name for name in {HEAVY!r} if name in sys.modules])"
    code, said = run("python", "-c", f"import sys; from trainer.cli import main; {seen}", cwd=folder)
    assert code == 0, said
    assert said.endswith(f"{[2] * len(cases)} []\n")


def test_a_refusal_is_the_exit_code_of_the_process(folder):
    code, said = run("python", "-m", "trainer", "train", "--config", "missing.yaml", cwd=folder)
    assert code == 2
    assert said.startswith("error: cannot read the config")
