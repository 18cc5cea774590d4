"""What only a GPU can show."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config_file import load_config
from trainer.preflight import preflight
from trainer.run.rundir import RunDir

pytestmark = [pytest.mark.cuda, pytest.mark.slow, pytest.mark.text2image]


def test_a_step_never_waits_for_the_gpu(tiny_config, tmp_path: Path):
    import torch

    from trainer.runtime import Runtime
    from trainer.step import train_step
    from trainer.training import assemble

    overrides = ["ema.decay=0.9", "train.max_steps=4", "train.precision=fp16"]
    runtime = Runtime("fp16", deterministic=False)
    try:
        checked = preflight(load_config(tiny_config, overrides), rank=0, world_size=1)
        training = assemble(checked, runtime, RunDir(tmp_path), None)
        batches = training.batches(0, 4)
        train_step(training, batches)  # the first step builds optimizer state and picks kernels
        ready = iter([next(batches) for _ in range(3)])
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            train_step(training, ready)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        runtime.close()
