from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.run.lock import RunLock

HOLD = """
import os, sys, time
from trainer.run.lock import RunLock
RunLock(sys.argv[1]).take()
if sys.argv[2] == "with a worker":
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    print(worker, flush=True)
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def holding(folder: Path, how: str = "alone") -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Another process that holds the lock of `folder`, and the lines it printed."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        lines = []
        while "held" not in lines:
            lines.append(other.stdout.readline().strip())
            assert lines[-1], "it ended early"
        try:
            yield other, lines
        finally:
            other.kill()


def test_a_second_process_is_refused_with_who_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the pauses between its attempts to take the lock
    with holding(tmp_path) as (other, _):
        for attempt in (RunLock(tmp_path).refuse_if_held, RunLock(tmp_path).take):
            with pytest.raises(UserError, match=f"another run is writing this folder: process {other.pid} on "):
                attempt()


def test_a_killed_holder_leaves_nothing_to_wait_for(tmp_path: Path):
    with holding(tmp_path) as (other, _):
        other.kill()
        other.wait()
        lock = RunLock(tmp_path)
        assert lock.holder() is None
        lock.take()
        lock.release()


def test_a_worker_that_outlives_its_killed_run_does_not_hold_the_lock(tmp_path: Path):
    with holding(tmp_path, "with a worker") as (other, lines):
        worker = int(next(line for line in lines if line.isdecimal()))
        other.kill()
        other.wait()
        os.kill(worker, 0)  # it is alive
        RunLock(tmp_path).take()
        os.kill(worker, 9)


def test_asking_for_the_holder_writes_nothing(tmp_path: Path):
    assert RunLock(tmp_path).holder() is None
    assert list(tmp_path.iterdir()) == []


def test_a_released_lock_can_be_taken_again(tmp_path: Path):
    lock = RunLock(tmp_path)
    for _ in range(2):
        lock.take()
        lock.release()
    assert lock.holder() is None
