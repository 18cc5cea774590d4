"""The files that stand in a run directory before the first step."""

from __future__ import annotations

from typing import Any

from trainer.files import retrying, write_atomic, write_json
from trainer.run.rundir import RunDir


def write_opening_files(run_dir: RunDir, environment: dict[str, Any], resolved_config: str) -> None:
    """env.json and config.resolved.yaml; raises StorageFailed if they cannot be written."""
    retrying(lambda: write_json(run_dir.environment, environment), what=str(run_dir.environment))
    retrying(lambda: write_atomic(run_dir.resolved_config, resolved_config), what=str(run_dir.resolved_config))
