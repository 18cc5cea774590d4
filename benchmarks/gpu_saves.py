"""How long the steps wait for a save: copied and written in the background, or written while they wait."""

from __future__ import annotations

import statistics
from pathlib import Path

from gpu_device import Marks
from gpu_loops import OurLoop
from gpu_step import Data
from row_file import Row

from trainer.checkpoint import Retention
from trainer.hooks.checkpointing import Checkpointing


class TwoSaves(Checkpointing):
    """Saves in the warm-up, which takes the memory of copies, and once more; not at the end, in the foreground."""

    def due(self, step: int, last: bool) -> bool:
        return step in (1, self.every_steps)


def save_stall(data: Data, folder: Path, background: bool) -> Row:
    """Milliseconds that the longest step took beyond a usual one, in a run whose second save is looked at."""
    at = data.step.warm + 2
    hook = TwoSaves(every_steps=at, retention=Retention(2, None, 0), background=background, sidecar_facts={})
    loop = OurLoop(data, folder, {}, hooks=[hook])
    marks = Marks(data.device)
    try:
        loop.run(marks)
        gaps = marks.gaps()[1][data.step.warm - 1 :]  # the host's, for a device may work on while the host writes
        saved = max(path.stat().st_size for path in folder.rglob("checkpoint-*.pt"))
    finally:
        loop.close()
    usual, longest = statistics.median(gaps), max(gaps)
    return {
        "ms": round(usual, 3),
        "longest_ms": round(longest, 3),
        "stall_ms": round(longest - usual, 3),
        "checkpoint_gb": round(saved / 1e9, 3),
    }
