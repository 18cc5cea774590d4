"""Whether a run directory, its data and its model files are still what the manifest says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint import fault_of
from trainer.config import Config
from trainer.config_file import load_config
from trainer.data.fingerprint import FINGERPRINT_FORMAT, Digests, leaves, named
from trainer.data.record import silent
from trainer.errors import UserError
from trainer.files import sha256_file
from trainer.run.manifest import read_manifest
from trainer.run.metrics import read as read_metrics
from trainer.run.records import changes_since
from trainer.run.rundir import RunDir


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fault` is None if it is as recorded."""

    name: str
    fault: str | None = None


def verify(run_dir: RunDir, say: Callable[[str], None] = silent) -> Iterator[Finding]:
    """What the manifest and the sidecars name, each looked at and hashed; raises UserError if there is no manifest.

    `say` hears of hashing that takes long.
    """
    manifest = read_manifest(run_dir.manifest)
    recorded = manifest["config"]["resolved_sha256"]
    resolved = run_dir.resolved_config
    if not resolved.is_file():
        yield Finding(resolved.name, "it is missing")
        return
    yield Finding(resolved.name, _differs(sha256_file(resolved), recorded))
    listed = {entry["step"]: entry["sha256"] for entry in manifest["checkpoints"]}
    if manifest["status"]["state"] == "running":  # going on or killed: the newest prunings are not in the manifest
        listed = {step: sha256 for step, sha256 in listed.items() if _is_there(run_dir, step)}
    for step in sorted({*listed, *run_dir.checkpoint_steps()}):
        yield Finding(run_dir.checkpoint(step).name, _checkpoint_fault(run_dir, step, listed.get(step)))
    yield Finding(run_dir.metrics.name, _metrics_fault(run_dir))
    try:
        config = load_config(resolved).config
    except UserError as error:
        yield Finding("config", str(error))
        return
    yield _data(run_dir, config, manifest["data"], say)
    yield from _model_files(config, manifest["model"]["files"])


def _differs(found: str, recorded: str) -> str | None:
    return None if found == recorded else f"its sha256 is {found[:12]}..., recorded is {recorded[:12]}..."


def _is_there(run_dir: RunDir, step: int) -> bool:
    return run_dir.sidecar(step).exists() or run_dir.checkpoint(step).exists()


def _checkpoint_fault(run_dir: RunDir, step: int, listed: str | None) -> str | None:
    if not run_dir.sidecar(step).is_file():
        return "the manifest lists it, but its sidecar is missing"
    try:
        fault = fault_of(run_dir, step)
    except UserError as error:
        return error.what
    if fault is None and listed is not None:
        return _differs(sha256_file(run_dir.checkpoint(step)), listed)  # a sidecar that was replaced with the file
    return fault


def _metrics_fault(run_dir: RunDir) -> str | None:
    newest = max(run_dir.checkpoint_steps(), default=0)
    try:
        steps = [line.get("step") for line in read_metrics(run_dir.metrics)]
    except UserError as error:
        return str(error)
    for number, step in enumerate(steps, start=1):
        if step != number:
            return f"line {number} is of step {step}"
    return None if len(steps) >= newest else f"it ends at step {len(steps)}, a checkpoint is of step {newest}"


def _data(run_dir: RunDir, config: Config, recorded: dict[str, Any], say: Callable[[str], None]) -> Finding:
    """Every picture read again, whatever is remembered of it; those that changed by name, if the run lists them."""
    if recorded.get("fingerprint_format") != FINGERPRINT_FORMAT:
        return Finding("data (of another kind of fingerprint: not compared)")
    was = recorded["fingerprint"]
    try:
        records = config.data.open()
        contents = Digests(records.contents(fresh=True, say=say))
        found = records.fingerprint(contents)
        if found == was:
            return Finding("data")
        changed = changes_since(run_dir, was, leaves(records, contents))
    except UserError as error:
        return Finding("data", str(error))
    fault = f"its fingerprint is {found[:12]}..., recorded is {was[:12]}..."
    return Finding("data", f"{fault}; {named(changed)}" if changed else fault)


def _model_files(config: Config, recorded: dict[str, str] | None) -> Iterator[Finding]:
    if recorded is None:
        return
    try:
        config.model.check()
        now = config.model.provenance().files
    except UserError as error:
        yield Finding("model", str(error))
        return
    if now is None:
        yield Finding("model", "its files cannot be found without the network")
        return
    for name in sorted({*recorded, *now}):
        if name not in now or name not in recorded:
            yield Finding(
                f"model {name}", "it is missing" if name not in now else "it was not there when the run began"
            )
        else:
            yield Finding(f"model {name}", _differs(now[name], recorded[name]))
