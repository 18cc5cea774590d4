"""Hooks: what happens around the steps, told apart by type so that a deadlock cannot be written by accident.

A `MainHook` runs on rank 0 alone and is given a `RunView`, which has no collectives to call. A `CollectiveHook` runs
on every rank and is given the `Training` itself, so whatever it gathers or waits for, all ranks do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.registry import Part

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.training import Training


@dataclass(frozen=True)
class RunView:
    """What rank 0 may know of a run without talking to the other ranks."""

    folder: Path
    step: int  # optimizer steps done
    max_steps: int
    config: dict[str, Any]  # every value of the run, as in config.resolved.yaml


class Hook(Part, home="trainer.hooks"):
    """Something that happens around the steps."""

    saves: ClassVar[bool] = False  # acts also after a step at which someone asked for a checkpoint
    repeatable: ClassVar[bool] = False  # `difftrain reproduce` measures it again: a function of config and step

    def check(self, config: Config) -> None:
        """Raise UserError if this hook cannot do its work in a run of `config`: before anything slow."""

    def due(self, step: int, last: bool) -> bool:
        """Whether this hook acts after optimizer step `step` (1-based); `last` if this process ends after it."""
        return False


class MainHook(Hook):
    """Rank 0 only. If it fails, it is disabled with one warning, unless `essential`."""

    essential: ClassVar[bool] = False

    def on_start(self, view: RunView) -> None:
        """Before the first step of this start, new or resumed."""

    def on_metrics(self, view: RunView, lines: list[dict[str, Any]]) -> None:
        """The metrics lines of the steps since the last call, oldest first; at least every `train.log_every` steps."""

    def after_step(self, view: RunView, last: bool) -> None:
        """After each step that `due` names, once its metrics were handed out."""

    def on_end(self, view: RunView, state: str, exit_code: int, reason: str) -> None:
        """After the last step, or after the error or signal that ended the run."""


class CollectiveHook(Hook):
    """All ranks. A failure ends the run: the ranks would no longer agree."""

    def on_start(self, training: Training) -> None:
        """Before the first step of this start, new or resumed."""

    def measure(self, training: Training) -> dict[str, Any]:
        """What joins the metrics line of a step that `due` names."""
        return {}

    def after_step(self, training: Training, last: bool) -> None:
        """After each step that `due` names, once its metrics were handed out."""

    def on_end(self, training: Training) -> None:
        """After the run, however it ended, on this rank alone: for what is still going on beside it. No collectives."""
