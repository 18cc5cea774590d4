"""What the runtime sets for a process, and what it measures of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from trainer.runtime import Runtime


@pytest.fixture(params=[False, True], ids=["normal", "deterministic"])
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    runtime = Runtime("fp32", deterministic=request.param)
    yield runtime
    runtime.close()


def test_new_memory_is_filled_in_no_mode(runtime: Runtime):
    assert not torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the peak of a process")
def test_a_peak_of_memory_is_that_since_it_was_forgotten(runtime: Runtime):
    large = np.ones(2**25)  # 256 MiB
    while_held = runtime.memory()["peak_memory_bytes"]
    del large
    runtime.forget_peak_memory()
    assert runtime.memory()["peak_memory_bytes"] < while_held - 200 * 2**20


def test_dropout_is_seeded_on_this_device_alone(runtime: Runtime, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("it seeds every backend"))
    runtime.seed_dropout(3)
    first = torch.rand(4)
    runtime.seed_dropout(3)
    assert torch.equal(torch.rand(4), first)


def test_fp32_is_fp32_and_recorded_as_such(runtime: Runtime):
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert runtime.device_facts()["fp32_products"] == "highest"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_grows_in_segments_unless_the_user_says_how(monkeypatch, name):
    from trainer.commands.train import set_torch_up

    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:128")
    set_torch_up()
    assert {each for each in os.environ if each.endswith("ALLOC_CONF")} == {name}
    monkeypatch.delenv(name)
    set_torch_up()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")


def test_memory_is_told_where_proc_leaves_its_peak_out(runtime: Runtime, monkeypatch):
    known = runtime.memory()["peak_memory_bytes"]
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_: "Name: python\n")
    assert runtime.memory()["peak_memory_bytes"] == pytest.approx(known, rel=0.5), "both in bytes"
