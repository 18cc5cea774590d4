"""Batches come through a pipe, one message each, and neither side waits for ever for the other's half of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from forked import PLUGINS, environment

from trainer.data.loader import read_ahead

MEGABYTES = 2**18  # of float32


class Drawn:
    def __getitem__(self, item: list[int]) -> torch.Tensor:
        return torch.full((MEGABYTES,), float(item[0]))


def test_batches_come_without_shared_memory():
    seen = list(read_ahead(Drawn(), [[number] for number in range(6)], workers=2))
    assert [tensor[-1].item() for tensor in seen] == [0, 1, 2, 3, 4, 5]
    assert not any(tensor.is_shared() for tensor in seen)


class Dying:
    """Its worker is killed soon after it has begun to write."""

    def __getitem__(self, item: list[int]) -> torch.Tensor:
        threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return torch.zeros(128 * MEGABYTES)


def test_a_worker_that_is_killed_within_a_message_is_an_error():
    with pytest.raises(RuntimeError, match=r"is killed by signal|exited unexpectedly"):
        next(read_ahead(Dying(), [[0]], workers=1))


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("script", ["killed_while_workers_write", "killed_before_workers_begin"])
def test_workers_end_with_a_trainer_that_was_killed(script: str):
    command = [sys.executable, str(PLUGINS / f"{script}.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as trainer:
        assert trainer.wait() == -signal.SIGKILL
        pids: list[int] = []
        while len(pids) < 2:  # not to the end of the pipe, which they hold
            assert trainer.stdout is not None
            line = trainer.stdout.readline()
            assert line, "the trainer ended before it had started two workers"
            pids += map(int, line.split())
    assert pids
    deadline = time.monotonic() + 30
    while alive := [pid for pid in pids if runs(pid)]:
        if time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            pytest.fail("the workers outlive their trainer")
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
