"""A running job is stopped, or saves, by signals, by the end of its launcher, and by commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from trainer.checkpoint import fault_of
from trainer.control import Asked, Control
from trainer.run.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "trainer" / "train.py")
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
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
    (tmp_path / "endless.yaml").write_text(ENDLESS)
    return tmp_path / "run"


def arguments(run: Path) -> list[str]:
    return [TRAIN, "--config", str(run.parent / "endless.yaml"), "--output-dir", str(run)]


@contextmanager
def job(command: list[str], run: Path) -> Iterator[subprocess.Popen[str]]:
    """A job of `command`, in a session of its own, that has done three steps."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            wait_for(lambda: steps(run) >= 3, process)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, process: subprocess.Popen[str] | None = None, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        assert process is None or process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.02)


def steps(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def status(run: Path) -> dict[str, object]:
    return json.loads((run / "run_manifest.json").read_text())["status"]


def difftrain(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "trainer", *words], cwd=ROOT, capture_output=True, text=True)


def saved(run: Path) -> list[int]:
    return RunDir(run).checkpoint_steps()


def test_stop_ends_a_job_after_its_step_with_everything_saved_and_exit_75(run: Path):
    with job([sys.executable, *arguments(run)], run) as process:
        asked = difftrain("stop", str(run))
        assert asked.returncode == 0, asked.stderr
        assert f"asked process {process.pid} on " in asked.stdout
        assert process.wait(timeout=30) == 75
    assert saved(run) == [steps(run)]
    assert status(run)["state"] == "stopped"
    assert "difftrain stop" in str(status(run)["reason"])
    assert not list(run.glob("*.request"))


@pytest.mark.slow
def test_save_makes_a_checkpoint_and_the_job_goes_on(run: Path):
    with job([sys.executable, *arguments(run)], run) as process:
        assert difftrain("save", str(run)).returncode == 0
        wait_for(lambda: saved(run), process)
        after = steps(run)
        wait_for(lambda: steps(run) > after + 3, process)
        assert len(saved(run)) == 1
        assert fault_of(RunDir(run), saved(run)[0]) is None


@pytest.mark.parametrize("command", ["stop", "save"])
def test_a_folder_without_a_job_is_refused(tmp_path: Path, command: str):
    asked = difftrain(command, str(tmp_path))
    assert asked.returncode == 2
    assert "no job is training in this folder" in asked.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_second_run_into_the_folder_of_a_running_one_is_refused_and_told_by_whom(run: Path):
    with job([sys.executable, *arguments(run)], run) as process:
        for more in (["--resume", "auto"], []):
            second = subprocess.run([sys.executable, *arguments(run), *more], capture_output=True, text=True)
            assert second.returncode == 2
            assert "Traceback" not in second.stderr
        second = subprocess.run([sys.executable, *arguments(run), "--resume", "auto"], capture_output=True, text=True)
        assert f"another run is writing this folder: process {process.pid} on " in second.stderr
        process.kill()
        process.wait()
    third = subprocess.run(
        [sys.executable, *arguments(run), "--resume", "auto", "--set", "train.max_steps=2"],
        capture_output=True,
        text=True,
    )
    assert third.returncode == 0, third.stderr  # no checkpoint was saved: it starts again at step 0
    assert steps(run) == 2


@pytest.mark.slow
def test_usr1_saves_and_ends_as_sigterm_does(run: Path):
    with job([sys.executable, *arguments(run)], run) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == 75
    assert saved(run) == [steps(run)]


@pytest.mark.slow
def test_a_job_whose_output_nobody_reads_any_more_trains_on_and_stops_as_asked(run: Path):
    with job([sys.executable, *arguments(run)], run) as process:
        assert process.stdout is not None
        process.stdout.close()  # as when Ctrl-C ends the `tee` behind a pipe
        after = steps(run)
        wait_for(lambda: steps(run) > after + 5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 75
    assert saved(run) == [steps(run)]


@pytest.mark.slow
@pytest.mark.parametrize("amid_a_save", [False, True])
def test_a_second_signal_ends_it_at_once_and_leaves_no_partial_file(run: Path, amid_a_save: bool):
    big = ["--set", "checkpoint.every_steps=4", "model.unet_channels=[256,256]"]  # 0.1 s or more for a save
    with job([sys.executable, *arguments(run), *(big if amid_a_save else [])], run) as process:
        if amid_a_save:
            wait_for(lambda: list(run.glob(".checkpoint-*.pt.*")), process)
        process.send_signal(signal.SIGSTOP)  # both are then delivered before another step can end
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=30) < 0
    assert not list(run.glob(".*"))
    assert all(fault_of(RunDir(run), step) is None for step in saved(run))


@pytest.mark.slow
def test_a_trainer_whose_launcher_is_terminated_saves_and_ends(run: Path):
    launch = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    with job([*LAUNCHER, *launch, *arguments(run)], run) as launcher:
        manifest = json.loads((run / "run_manifest.json").read_text())
        trainer = manifest["starts"][-1]["pid"]
        assert trainer != launcher.pid
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=30)
        wait_for(lambda: status(run)["state"] == "stopped")
        assert status(run)["reason"] == f"the launcher has ended: step {steps(run)} is done and saved"
    assert saved(run) == [steps(run)]


@pytest.mark.slow
def test_a_trainer_whose_shell_ends_trains_on(run: Path):
    command = " ".join([sys.executable, *arguments(run), ">", str(run.parent / "log"), "2>&1", "& echo $!"])
    shell = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    trainer = int(re.findall(r"\d+", shell.stdout)[0])
    try:
        wait_for(lambda: steps(run) >= 3)
        before = steps(run)
        wait_for(lambda: steps(run) >= before + 5)
    finally:
        os.kill(trainer, signal.SIGKILL)


@pytest.mark.slow
def test_a_request_left_for_the_run_before_does_not_stop_the_next(run: Path):
    run.mkdir()
    (run / "stop.request").touch()
    short = [*arguments(run), "--set", "train.max_steps=3"]
    assert subprocess.run([sys.executable, *short], stdout=subprocess.DEVNULL).returncode == 0
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
