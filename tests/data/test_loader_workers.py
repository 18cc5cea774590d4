"""Batches come through a pipe, one message each, and neither side waits for ever for the other's half of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest
import torch

from trainer.data.loader import read_ahead

MEGABYTES = 2**18  # of float32

# A trainer that dies while its workers write: no handler runs, and nobody reads the rest.
KILLED = f"""
import multiprocessing, os, torch
from trainer.data.loader import read_ahead

class Large:
    def __getitem__(self, item): return torch.zeros({2 * MEGABYTES})

batches = read_ahead(Large(), [[number] for number in range(100)], workers=2)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), 9)
"""


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
def test_workers_end_with_a_trainer_that_was_killed_while_they_wrote():
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert trainer.wait() == -signal.SIGKILL
    workers = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(workers, timeout=30)
    for worker in alive:
        worker.kill()
    assert not alive
