"""bad_samples.jsonl: every record that is not trained on, and every one that became unreadable, with the reason."""

from __future__ import annotations

import json
from typing import Any

from pydantic import PrivateAttr

from trainer.files import open_atomic
from trainer.hook import MainHook, RunView
from trainer.run.rundir import RunDir


class BadSamples(MainHook):
    """The file is there if there is something to say; the records left out at the start come first."""

    left_out: tuple[tuple[str, str], ...]  # key and reason
    _lines: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    def on_start(self, view: RunView) -> None:
        path = RunDir(view.folder).bad_samples
        before = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        late = [line for line in before if line.get("step", view.step + 1) <= view.step]
        self._lines = [{"key": key, "reason": reason, "action": "left out"} for key, reason in self.left_out] + late
        if self._lines != before:
            self._write(view)

    def on_metrics(self, view: RunView, lines: list[dict[str, Any]]) -> None:
        late = [
            {"step": line["step"], **substitute, "action": "replaced"}
            for line in lines
            for substitute in line.get("substitutes", ())
        ]
        for line in late:
            print(f"warning: step {line['step']} read {line['instead']} in place of {line['reason']}", flush=True)
        if late:
            self._lines += late
            self._write(view)

    def _write(self, view: RunView) -> None:
        with open_atomic(RunDir(view.folder).bad_samples) as file:
            for line in self._lines:
                file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
