"""run_manifest.json, env.json, config.resolved.yaml, records.jsonl: what the run is, from before its first step on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from pydantic import PrivateAttr

from trainer.checkpoint import sidecars
from trainer.data.fingerprint import Leaf
from trainer.hook import MainHook, RunView
from trainer.run.manifest import Manifest, changes, start_entry
from trainer.run.opening import write_opening_files
from trainer.run.records import write_records
from trainer.run.rundir import RunDir


class ManifestFile(MainHook):
    """Part of the run's truth: it tries again, and ends the run if it cannot be written."""

    essential: ClassVar[bool] = True
    saves: ClassVar[bool] = True  # the manifest lists the checkpoints

    facts: dict[str, Any]  # of this start, as run_facts makes them
    environment: dict[str, Any]  # for env.json
    resolved_config: str
    config_changes: dict[str, Any]
    checkpoint_every: int
    leaves: Callable[[], Iterator[Leaf] | None]  # what each record is, for records.jsonl; None: too many to list
    _manifest: Manifest | None = PrivateAttr(None)
    _listed: list[int] | None = PrivateAttr(None)  # the steps of the checkpoints in the manifest

    def due(self, step: int, last: bool) -> bool:
        return last or step % self.checkpoint_every == 0

    def on_start(self, view: RunView) -> None:
        run_dir = RunDir(view.folder)
        environment_changes = {}
        with contextlib.suppress(OSError, ValueError):  # none yet, or damaged: it is written anew
            environment_changes = changes(json.loads(run_dir.environment.read_bytes()), self.environment)
        write_opening_files(run_dir, self.environment, self.resolved_config)
        write_records(run_dir, self.facts["data"]["fingerprint"], self.leaves)
        self._manifest = Manifest(run_dir.manifest)
        start = start_entry(
            self.facts,
            view.step,
            environment_changes=environment_changes,
            config_changes=self.config_changes,
            torch_threads=self.environment.get("torch_threads"),
        )
        self._manifest.begin(self.facts, start, view.config)

    def on_metrics(self, view: RunView, lines: list[dict[str, Any]]) -> None:
        self._list_checkpoints(RunDir(view.folder))  # a save in the background may have ended at any moment

    def after_step(self, view: RunView, last: bool) -> None:
        self._list_checkpoints(RunDir(view.folder))

    def _list_checkpoints(self, run_dir: RunDir) -> None:
        """What is committed by now."""
        assert self._manifest is not None, "on_start comes first"
        steps = run_dir.checkpoint_steps()
        if steps == self._listed:
            return
        whole = sidecars(run_dir)
        for step, sidecar in whole.items():
            self._manifest.add_checkpoint(step, sidecar["file"], sidecar["sha256"], sidecar["bytes"])
        self._manifest.keep_checkpoints(whole)
        self._listed = steps

    def on_end(self, view: RunView, state: str, exit_code: int, reason: str) -> None:
        if self._manifest is not None:
            self._list_checkpoints(RunDir(view.folder))
            self._manifest.end(state, exit_code, reason)
