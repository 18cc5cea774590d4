"""What the tests of whole runs share: one small config, and plug-ins that are forgotten with their test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from runs import CONFIG

from trainer.hook import Hook
from trainer.models.base import ModelFamily
from trainer.objectives.base import Objective


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The path of a config that trains the tiny networks for six steps of four pictures, saving every second one."""
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Write the module NAME of the test's plug-ins; this process can import it until the test is over."""
    monkeypatch.syspath_prepend(tmp_path)
    written: list[str] = []

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(dedent(source))
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)
    for family in (Objective, ModelFamily, Hook):
        for kind, part in list(family._kinds.items()):
            if part.__module__ in written:
                del family._kinds[kind]
