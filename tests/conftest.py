"""What all tests share: the switches of the slow lanes, a switched-off model hub, and one complete small config.

Torch is imported by the tests that need it, never by collecting them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ON = ("1", "true", "yes", "on")
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
LANES = {"slow": "--run-slow", "integration": "--run-integration", "nightly": "--run-nightly"}
PLUGINS = Path(__file__).parent / "plugins"

# What the user asked for, before the fixture below switches the hub off for the tests that do not need it.
SWITCHED_OFF = [name for name in OFFLINE_SWITCHES if os.environ.get(name, "").strip().lower() in ON]

# The networks of the tests are too small for a second thread to pay, sums must not depend on the machine's cores, and
# several workers share them.
os.environ["OMP_NUM_THREADS"] = "1"

TINY = """\
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 64}
train: {seed: 7, max_steps: 2, precision: fp32, global_batch_size: 4, micro_batch_size: 4, log_every: 1}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-4, warmup_steps: 0}
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    for lane, flag in LANES.items():
        parser.addoption(flag, action="store_true", default=False, help=f"run the tests marked {lane}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for lane, flag in LANES.items():
        if item.get_closest_marker(lane) and not item.config.getoption(flag):
            pytest.skip(f"a test marked {lane} needs {flag}")
    if item.get_closest_marker("integration") and SWITCHED_OFF:
        name = SWITCHED_OFF[0]
        pytest.skip(f"this test needs the model hub, and {name}={os.environ[name]} switches it off")
    if item.get_closest_marker("alone") and int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        pytest.skip("a test marked alone needs -n 0")
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("this test needs a CUDA device")


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, nor a process it starts, writes into the user's cache; the model hub's downloads stay where they are."""
    shared = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", os.environ.get("HF_HOME") or os.path.join(shared, "huggingface"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        arrow_files = str(tmp_path_factory.mktemp("datasets"))
        patch.setenv("HF_DATASETS_CACHE", arrow_files)
        if settings := sys.modules.get("datasets.config"):  # read once, when it is imported
            patch.setattr(settings, "HF_DATASETS_CACHE", Path(arrow_files))
        yield


@pytest.fixture(autouse=True)
def hub_only_for_integration(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mark `integration` a test, and every process it starts, finds the model hub switched off."""
    offline = request.node.get_closest_marker("integration") is None
    if offline:
        for name in OFFLINE_SWITCHES:
            monkeypatch.setenv(name, "1")
    # huggingface_hub reads the variable once, when it is imported, which may have been in another kind of test.
    if constants := sys.modules.get("huggingface_hub.constants"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)


@pytest.fixture(autouse=True)
def no_runtime_is_left_open() -> Iterator[None]:
    """A runtime that a test did not close would decide the precision of the next test's run."""
    yield
    if state := sys.modules.get("accelerate.state"):
        left = bool(state.AcceleratorState._shared_state)
        state.AcceleratorState._reset_state(reset_partial_state=True)
        assert not left, "close the Runtime that this test made"


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[str], Path]:
    """Write the text of a config and return its path."""

    def write(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def tiny_config(write_config: Callable[[str], Path]) -> Path:
    """A config that trains the tiny networks on built-in pictures for two steps; nothing is downloaded."""
    return write_config(TINY)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The path of a config that trains the tiny networks for six steps of four pictures, saving every second one."""
    from runs import CONFIG

    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def runs_to_copy(tmp_path_factory: pytest.TempPathFactory, cache_of_its_own: None) -> dict[int, Path]:
    """Runs of `config` that ended after 2, 4 and 6 steps, for tests that begin with one; each takes a copy."""
    from runs import CONFIG, train

    folder = tmp_path_factory.mktemp("runs")
    (folder / "run.yaml").write_text(CONFIG)
    of_steps = {steps: folder / f"run-{steps}" for steps in (2, 4, 6)}
    with pytest.MonkeyPatch.context() as patch:
        for name in OFFLINE_SWITCHES:
            patch.setenv(name, "1")  # as for every test: a resume would name the change
        for steps, run in of_steps.items():
            assert train(folder / "run.yaml", run, "--set", f"train.max_steps={steps}") == 0
    return of_steps


@pytest.fixture
def begun(runs_to_copy: dict[int, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copy a run of `config` that ended after 2, 4 or 6 steps to `run`, or to another name, and return its path."""
    from runs import copy_of

    def begin(steps: int, name: str = "run") -> Path:
        return copy_of(runs_to_copy[steps], tmp_path / name)

    return begin


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process can import the plug-ins of the tests, and forgets the kinds that they define with the test."""
    from trainer.registry import temporary_kinds

    monkeypatch.syspath_prepend(PLUGINS)
    with temporary_kinds():
        yield


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Build a kind of a part, with what it requires beyond the given values."""
    from part_cases import maker

    return maker(tmp_path_factory)
