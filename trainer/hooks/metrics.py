"""metrics.jsonl: one line per optimizer step, none missing, none twice."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import PrivateAttr

from trainer.hook import MainHook, RunView
from trainer.run.metrics import MetricsLog
from trainer.run.rundir import RunDir


class Metrics(MainHook):
    """Writes every line and makes it durable at once: a checkpoint that follows never outlives its metrics."""

    essential: ClassVar[bool] = True

    _log: MetricsLog | None = PrivateAttr(None)

    def on_start(self, view: RunView) -> None:
        self._log = MetricsLog(RunDir(view.folder).metrics)
        self._log.rewind(view.step)

    def on_metrics(self, view: RunView, lines: list[dict[str, Any]]) -> None:
        assert self._log is not None, "on_start comes first"
        self._log.append(lines)
        self._log.sync()
