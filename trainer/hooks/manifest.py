"""run_manifest.json, env.json and config.resolved.yaml: what the run is, before its first step and after its last."""

from __future__ import annotations

import contextlib
import json
from typing import Any, ClassVar

from pydantic import PrivateAttr

from trainer.hook import MainHook, RunView
from trainer.run.manifest import Manifest, changes, start_entry
from trainer.run.opening import write_opening_files
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
    _manifest: Manifest | None = PrivateAttr(None)

    def due(self, step: int, last: bool) -> bool:
        return last or step % self.checkpoint_every == 0

    def on_start(self, view: RunView) -> None:
        run_dir = RunDir(view.folder)
        environment_changes = {}
        if run_dir.environment.is_file():
            environment_changes = changes(json.loads(run_dir.environment.read_bytes()), self.environment)
        write_opening_files(run_dir, self.environment, self.resolved_config)
        self._manifest = Manifest(run_dir.manifest)
        start = start_entry(
            self.facts, view.step, environment_changes=environment_changes, config_changes=self.config_changes
        )
        self._manifest.begin(self.facts, start)

    def after_step(self, view: RunView, last: bool) -> None:
        self._list_checkpoints(RunDir(view.folder))

    def _list_checkpoints(self, run_dir: RunDir) -> None:
        """What is committed by now: a save in the background joins at the next one, or at the end."""
        assert self._manifest is not None, "on_start comes first"
        sidecars = []
        for step in run_dir.checkpoint_steps():
            with contextlib.suppress(FileNotFoundError):  # the save in the background has just pruned it
                sidecars.append(json.loads(run_dir.sidecar(step).read_bytes()))  # damaged ones were set aside
        for sidecar in sidecars:
            self._manifest.add_checkpoint(sidecar["step"], sidecar["file"], sidecar["sha256"], sidecar["bytes"])
        self._manifest.keep_checkpoints(sidecar["step"] for sidecar in sidecars)

    def on_end(self, view: RunView, state: str, exit_code: int, reason: str) -> None:
        if self._manifest is not None:
            self._list_checkpoints(RunDir(view.folder))
            self._manifest.end(state, exit_code, reason)
