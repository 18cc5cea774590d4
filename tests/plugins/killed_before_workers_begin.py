"""A trainer that dies before its workers have come to anything of ours. They print their process ids."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch

from trainer.data.loader import read_ahead


class Small:
    def __getitem__(self, item):
        return torch.zeros(1)


def late():
    print(os.getpid(), flush=True)
    time.sleep(4)


os.register_at_fork(after_in_child=late)
threading.Timer(2, os.kill, (os.getpid(), signal.SIGKILL)).start()
next(read_ahead(Small(), [[0], [1]], workers=2))
