"""A trainer that dies while its workers write: no handler runs, and nobody reads the rest. Prints their process ids."""

from __future__ import annotations

import multiprocessing
import os
import signal

import torch

from trainer.data.loader import read_ahead


class Large:
    def __getitem__(self, item):
        return torch.zeros(2 * 2**18)


batches = read_ahead(Large(), [[number] for number in range(100)], workers=2)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
