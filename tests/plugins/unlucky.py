"""What befalls one rank of several: FATE names it and the rank, as in `stops 1`."""

from __future__ import annotations

import itertools
import os
import signal
import time

from trainer.data.sources.shapes import ShapeRecords
from trainer.hooks import checkpointing
from trainer.objectives.flow import Flow

FATE, UNLUCKY_RANK = os.environ["FATE"].split()
SIGNALS = {"stops": signal.SIGSTOP, "is_killed": signal.SIGKILL, "leaves_others_stuck": signal.SIGKILL}
STICKY = ("leaves_others_stuck", "raises_beside_stuck_ones")
SLOW_SECONDS = 8  # longer than the least time-out of the ranks
CALLS = itertools.count(1)


class Unlucky(Flow):
    """Flow, until its sixth loss on the rank that FATE names; the file `when` has the time of it."""

    kind = "unlucky"

    def loss(self, pred, target):
        call, unlucky = next(CALLS), os.environ["RANK"] == UNLUCKY_RANK
        if call == 6 and FATE in STICKY and not unlucky:
            time.sleep(1000)  # as in a driver's call for a kernel that waits for the other rank
        if call == 6 and unlucky:
            with open("when", "w") as file:
                file.write(str(time.time()))
            if FATE.startswith("raises"):
                raise ValueError("no luck today")
            if FATE in SIGNALS:
                os.kill(os.getpid(), SIGNALS[FATE])
        return super().loss(pred, target)


def slowly(action):
    def slow(*arguments, **named):
        time.sleep(SLOW_SECONDS)
        return action(*arguments, **named)

    return slow


if FATE == "pictures_are_slow":
    ShapeRecords.looks = slowly(ShapeRecords.looks)
if FATE == "disk_is_slow":
    checkpointing.save_checkpoint = slowly(checkpointing.save_checkpoint)
