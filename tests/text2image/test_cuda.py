"""What a GPU has to show; where the CPU can show it too, the same test runs on it."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from runs import checkpoint, same, same_run, train

from trainer.config_file import load_config
from trainer.preflight import preflight
from trainer.run.rundir import RunDir

if TYPE_CHECKING:
    from trainer.training import Training

pytestmark = pytest.mark.text2image
needs_cuda = [pytest.mark.cuda, pytest.mark.slow]
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
# Kinds of operations that wait for a device until it has a number for the host.
WAITS = ("_local_scalar_dense", "nonzero", "equal.default", "masked_select", "unique")
BUSY = ["train.micro_batch_size=2", "train.gradient_checkpointing=true", "ema.decay=0.9", "train.max_steps=5"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """The device that runs take here; skips the CPU where there is a GPU, for they would take that."""
    import torch

    if request.param == "cpu" and torch.accelerator.is_available():
        pytest.skip("runs take the accelerator of this machine")
    return request.param


@pytest.fixture
def assembled(tiny_config: Path, tmp_path: Path) -> Iterator[Any]:
    """Assemble a run of the tiny model with these overrides; its runtime is closed with the test."""
    from trainer.runtime import Runtime
    from trainer.training import assemble

    runtimes = []

    def build(*overrides: str, precision: str = "fp32") -> Training:
        loaded = load_config(tiny_config, [*overrides, f"train.precision={precision}"])
        runtimes.append(Runtime(loaded.config.train.precision, deterministic=False))
        return assemble(preflight(loaded, rank=0, world_size=1), runtimes[-1], RunDir(tmp_path), None)

    yield build
    for runtime in runtimes:
        runtime.close()


def test_a_resumed_run_with_muon_equals_the_unbroken_one(config: Path, tmp_path: Path, device: str):
    options = ["--set", "optimizer.kind=muon", f"train.precision={PRECISION[device]}"]
    assert train(config, tmp_path / "whole", *options, "train.max_steps=4") == 0
    assert train(config, tmp_path / "broken", *options, "train.max_steps=2") == 0
    assert train(config, tmp_path / "broken", *options, "train.max_steps=4", "--resume", "auto") == 0
    assert same_run(tmp_path / "whole", tmp_path / "broken", 4)


def test_four_steps_are_four_steps_and_two_and_two_to_the_bit(config: Path, tmp_path: Path, device: str):
    options = ["--set", f"train.precision={PRECISION[device]}"]
    for name in ("one", "other"):
        assert train(config, tmp_path / name, *options, "train.max_steps=4") == 0
    assert train(config, tmp_path / "broken", *options, "train.max_steps=2") == 0
    assert train(config, tmp_path / "broken", *options, "train.max_steps=4", "--resume", "auto") == 0
    assert same_run(tmp_path / "one", tmp_path / "other", 4)
    assert same_run(tmp_path / "one", tmp_path / "broken", 4)


def test_a_save_beside_the_steps_is_the_state_of_its_step(config: Path, tmp_path: Path, device: str):
    """Also of one that averages are swapped in right after, for its pictures."""
    often = ["checkpoint.every_steps=1", "checkpoint.keep_last=6", "validation={every_steps: 1, prompts: [a dog]}"]
    options = ["--set", f"train.precision={PRECISION[device]}", *often, "validation.sampler_steps=1"]
    for name, background in (("beside", "true"), ("waiting", "false")):
        assert train(config, tmp_path / name, *options, f"checkpoint.background={background}") == 0
    for step in range(1, 7):
        assert same(checkpoint(tmp_path / "beside", step)["modules"], checkpoint(tmp_path / "waiting", step)["modules"])
        assert same(checkpoint(tmp_path / "beside", step)["ema"], checkpoint(tmp_path / "waiting", step)["ema"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_whose_gradient_is_no_number_changes_no_bit(assembled, device: str, optimizer: str):
    import torch

    from trainer.step import train_step

    overrides = ["ema.decay=0.9", "train.max_steps=3", f"optimizer.kind={optimizer}"]
    training = assembled(*overrides, precision=PRECISION[device])
    batches = training.batches(0, 3)
    train_step(training, batches)  # builds the optimizer's state
    before = copy.deepcopy(training.state.state_dict())
    batch = next(batches)
    result = train_step(training, iter([dataclasses.replace(batch, eps=torch.full_like(batch.eps, torch.nan))]))
    after = training.state.state_dict()
    assert result.skipped.item() == 1
    assert all(same(before[part], after[part]) for part in ("modules", "optimizer", "ema"))
    assert train_step(training, batches).skipped.item() == 0
    assert not same(before["modules"], training.state.state_dict()["modules"])


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "overrides"),
    [
        ("fp16", ["ema.decay=0.9", "train.max_steps=5"]),
        ("bf16", BUSY),
        ("bf16", [*BUSY, "optimizer.kind=muon"]),
    ],
)
def test_a_step_never_waits_for_the_gpu(assembled, precision: str, overrides: list[str]):
    import torch

    from trainer.step import train_step

    training = assembled(*overrides, precision=precision)
    batches = training.batches(0, 5)
    train_step(training, batches)  # the first step builds optimizer state and picks kernels
    ready = iter(list(batches))
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            train_step(training, ready)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_asks_its_device_for_one_number_at_most(assembled, device: str, optimizer: str):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from trainer.step import train_step

    class Waits(TorchDispatchMode):
        """Counts the operations within it that would wait."""

        def __init__(self) -> None:
            super().__init__()
            self.counts: collections.Counter[str] = collections.Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.counts[str(func)] += any(kind in str(func) for kind in WAITS)
            return func(*args, **(kwargs or {}))

    training = assembled(*BUSY, f"optimizer.kind={optimizer}")
    batches = training.batches(0, 5)
    train_step(training, batches)
    ready = iter(list(batches))
    with Waits() as waits:
        train_step(training, ready)
    assert sum(waits.counts.values()) > 0 or torch.accelerator.is_available(), "on a CPU it branches on `skipped`"
    assert +waits.counts <= collections.Counter({"aten._local_scalar_dense.default": 1}), waits.counts
