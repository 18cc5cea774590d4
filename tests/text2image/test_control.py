"""A running job is stopped, or saves, by signals, by the end of its launcher, and by commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import Job, difftrain
from runs import TRAIN, command, ended, launch, manifest, saved, steps, train_arguments, wait_for, whole

from trainer.cli import main
from trainer.control import Asked, Control

ENDLESS = """\
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 16}
train: {seed: 1, max_steps: 1000000, global_batch_size: 2, log_every: 1}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-4, warmup_steps: 0}
checkpoint: {every_steps: 1000000}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(ENDLESS)
    return tmp_path / "run"


@contextmanager
def job(run: Path, *overrides: str) -> Iterator[Job]:
    """A job that has done three steps."""
    with launch(run.parent, run.name, *overrides) as process:
        wait_for(lambda: steps(run) >= 3, process)
        yield process


def test_stop_ends_a_job_with_its_step_saved_and_exit_75(run: Path, capsys):
    with job(run) as process:
        assert main(["stop", str(run)]) == 0
        assert f"asked process {process.pid} on " in capsys.readouterr().out
        assert process.wait(timeout=30) == 75
    assert saved(run) == [steps(run)]
    status = manifest(run)["status"]
    assert status["state"] == "stopped"
    assert "difftrain stop" in status["reason"]
    assert not list(run.glob("*.request"))


def test_save_makes_a_checkpoint_and_the_job_goes_on(run: Path):
    with job(run) as process:
        assert main(["save", str(run)]) == 0
        wait_for(lambda: saved(run), process)
        after = steps(run)
        wait_for(lambda: steps(run) > after + 3, process)
        assert len(saved(run)) == 1
        assert whole(run, saved(run)[0])


@pytest.mark.parametrize("command", ["stop", "save"])
def test_a_folder_without_a_job_is_refused(tmp_path: Path, command: str, capsys):
    assert main([command, str(tmp_path)]) == 2
    assert "no job is training in this folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_second_run_into_the_folder_of_a_running_one_is_refused(run: Path):
    with job(run) as process:
        code, said = ended(run.parent, run.name)
        assert code == 2
        assert f"another run is writing this folder: process {process.pid} on " in said
        assert "Traceback" not in said
        words = ["--config", str(run.parent / "config.yaml"), "--output-dir", str(run)]
        code, said = difftrain("train", *words, cwd=run.parent)  # without --resume
        assert code == 2
        assert "Traceback" not in said
        process.kill()
        process.wait(60)
    code, said = ended(run.parent, run.name, "train.max_steps=2")
    assert code == 0, said  # no checkpoint was saved: it starts again at step 0
    assert steps(run) == 2


def test_usr1_saves_and_ends_as_sigterm_does(run: Path):
    with job(run) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == 75
    assert saved(run) == [steps(run)]


@pytest.mark.slow
def test_a_job_whose_output_nobody_reads_stops_as_asked(run: Path):
    # A real command: how an interpreter ends that cannot flush its output is part of the claim.
    with command("python", TRAIN, *train_arguments(run.parent, run.name), cwd=run.parent) as process:
        wait_for(lambda: steps(run) >= 3, process)
        assert process.stdout is not None
        process.stdout.close()  # as when Ctrl-C ends the `tee` behind a pipe
        after = steps(run)
        wait_for(lambda: steps(run) > after + 5, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 75
    assert saved(run) == [steps(run)]


@pytest.mark.parametrize("amid_a_save", [False, True])
def test_a_second_signal_ends_it_at_once_without_a_partial_file(run: Path, amid_a_save: bool):
    big = ["checkpoint.every_steps=4", "model.unet_channels=[256,256]"]  # 0.1 s or more for a save
    with job(run, *(big if amid_a_save else [])) as process:
        if amid_a_save:
            wait_for(lambda: list(run.glob(".checkpoint-*.pt.*")), process)
        process.send_signal(signal.SIGSTOP)  # both are then delivered before another step can end
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=30) < 0
    assert not list(run.glob(".*"))
    assert all(whole(run, step) for step in saved(run))


@pytest.mark.slow
def test_a_trainer_whose_launcher_is_terminated_saves_and_ends(run: Path):
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate = ["python", "-m", "accelerate.commands.launch", *options, TRAIN]
    with command(*accelerate, *train_arguments(run.parent, run.name), cwd=run.parent) as launcher:
        wait_for(lambda: steps(run) >= 3, launcher)
        trainer = manifest(run)["starts"][-1]["pid"]
        assert trainer != launcher.pid
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=30)
        wait_for(lambda: manifest(run)["status"]["state"] == "stopped")
        reason = f"the launcher has ended: step {steps(run)} is done and saved"
        assert manifest(run)["status"]["reason"] == reason
    assert saved(run) == [steps(run)]


@pytest.mark.slow
def test_a_trainer_whose_shell_ends_trains_on(run: Path):
    words = [sys.executable, TRAIN, *train_arguments(run.parent, run.name), ">", str(run.parent / "log"), "2>&1"]
    shell = subprocess.run(["bash", "-c", " ".join([*words, "& echo $!"])], capture_output=True, text=True, check=True)
    trainer = int(re.findall(r"\d+", shell.stdout)[0])
    try:
        wait_for(lambda: steps(run) >= 3)
        before = steps(run)
        wait_for(lambda: steps(run) >= before + 5)
    finally:
        os.kill(trainer, signal.SIGKILL)


def test_a_request_left_for_the_run_before_does_not_stop_the_next(run: Path):
    run.mkdir()
    (run / "stop.request").touch()
    code, said = ended(run.parent, run.name, "train.max_steps=3")
    assert code == 0, said
    assert steps(run) == 3


def test_a_launchers_echo_of_the_first_signal_is_not_a_second_one():
    control = Control(environment={"TORCHELASTIC_RUN_ID": "x"})
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert control.asked() is Asked.STOP
        assert control.why == "stopped by SIGINT"
    finally:
        control.close()
