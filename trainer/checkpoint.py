"""Checkpoints that are whole or absent.

`checkpoint-N.pt` is written to a temporary file, hashed on the way, made durable and renamed; then `checkpoint-N.json`
with its size and hash follows in the same way. The sidecar commits: without a matching one the checkpoint does not
exist. Which one is the newest is read from the files and their hashes, never from a pointer or a clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainer.errors import UserError
from trainer.files import fault_point, open_atomic, sha256_file, write_json
from trainer.run.rundir import RunDir

FORMAT = 2
UNSEALED_FORMAT = 1  # its sidecars have no hash of their own
SIDECAR_FACTS = {"step", "file", "sha256", "bytes"}

Migrated = Callable[[dict[str, Any]], dict[str, Any]]


class Migration(NamedTuple):
    """How a checkpoint of one format becomes one of the next; the files stay as they are."""

    content: Migrated
    sidecar: Migrated
    lost: str  # what the next format cannot know of it, as a line for people


# By the format that it leaves behind.
MIGRATIONS = {
    1: Migration(
        content=lambda content: content,
        # A hash of keys, captions and file sizes: it says nothing of the hash of contents that is compared now.
        sidecar=lambda sidecar: sidecar | {"data_fingerprint": None},
        lost="whether the data are still the same cannot be told",
    )
}


def save_checkpoint(run_dir: RunDir, content: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the checkpoint of `content["step"]` and its sidecar; raises OSError if storage fails.

    `facts` join the sidecar: images seen, hashes of config and data, versions.
    """
    import torch

    step = content["step"]
    path = run_dir.checkpoint(step)
    with open_atomic(path) as file:
        try:
            torch.save({"format": FORMAT, **content}, file)  # pyright: ignore[reportArgumentType]
        except RuntimeError as error:  # torch reports a full disk as a RuntimeError about positions in the file
            raise file.problem or OSError(f"writing {path.name} failed: {error}") from error
    fault_point(f"{path.name} renamed")
    sidecar = {"format": FORMAT, "step": step, "file": path.name, "bytes": file.size_bytes, "sha256": file.sha256()}
    write_json(run_dir.sidecar(step), sealed(sidecar | facts))


def sealed(sidecar: dict[str, Any]) -> dict[str, Any]:
    """The sidecar with the sha256 of all that it says, so that it can be trusted as the file beside it can."""
    said = {name: value for name, value in sidecar.items() if name != "seal"}
    text = json.dumps(said, sort_keys=True, allow_nan=False)
    return said | {"seal": hashlib.sha256(text.encode()).hexdigest()}


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest, those of round steps, and those with the lowest held-out loss."""

    keep_last: int
    keep_every_steps: int | None = None
    keep_best: int = 0

    def kept(self, losses: dict[int, float | None]) -> set[int]:
        """The steps that stay, of those that are keys of `losses`; the values are held-out losses, None for unknown."""
        steps = sorted(losses)
        kept = set(steps[-self.keep_last :])
        if self.keep_every_steps is not None:
            kept |= {step for step in steps if step % self.keep_every_steps == 0}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return kept | set(sorted(known, key=lambda step: (known[step], step))[: self.keep_best])


def prune_checkpoints(run_dir: RunDir, retention: Retention) -> list[int]:
    """Remove the checkpoints that `retention` does not keep and return the steps that are left, oldest first.

    The sidecar goes first, so that a kill in between leaves a file without a sidecar: no checkpoint.
    """
    whole = {step: sidecar for step, sidecar in sidecars(run_dir).items() if run_dir.checkpoint(step).is_file()}
    losses = {step: sidecar.get("validation_loss") for step, sidecar in whole.items()}
    kept = retention.kept(losses)
    for step in losses.keys() - kept:
        os.unlink(run_dir.sidecar(step))
        run_dir.checkpoint(step).unlink(missing_ok=True)
    return sorted(kept)


def sidecars(run_dir: RunDir) -> dict[int, dict[str, Any]]:
    """What the sidecars hold that can be read, by step, ascending: one may be damaged, or just being pruned."""
    found: dict[int, dict[str, Any]] = {}
    for step in run_dir.checkpoint_steps():
        with contextlib.suppress(OSError, ValueError):
            sidecar = _read(run_dir, step)
            if set(sidecar) >= SIDECAR_FACTS:
                found[step] = sidecar
    return found


@dataclass(frozen=True)
class Found:
    """A checkpoint whose content is what its sidecar says."""

    path: Path
    sidecar: dict[str, Any]  # in today's format
    format: int = FORMAT  # in which it was written

    def lost(self) -> list[str]:
        """What a checkpoint of an older format does not say."""
        return [MIGRATIONS[version].lost for version in range(self.format, FORMAT)]

    def load(self) -> dict[str, Any]:
        """The content, tensors on the CPU; raises UserError if it is of another format."""
        import torch

        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            return _in_todays_format(content, "content", self.path)
        except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"this is not a checkpoint of difftrain: {first}", str(self.path)) from None


def _in_todays_format(document: dict[str, Any], part: Literal["content", "sidecar"], path: Path) -> dict[str, Any]:
    """A content or sidecar of any format up to ours; raises UserError for a newer one, KeyError for an unknown one."""
    if document["format"] > FORMAT:
        raise UserError(
            f"the checkpoint is of format {document['format']}, this version reads up to {FORMAT}",
            str(path),
            "update difftrain",
        )
    while (version := document["format"]) != FORMAT:
        document = getattr(MIGRATIONS[version], part)(document) | {"format": version + 1}
    return document


def fault_of(run_dir: RunDir, step: int) -> str | None:
    """Why the checkpoint of `step` cannot be used, or None; reads and hashes all of it.

    Raises UserError if a newer difftrain wrote it: it is whole perhaps, and must not be passed over for an older one.
    """
    path = run_dir.checkpoint(step)
    try:
        sidecar = _sidecar(run_dir, step)
        expected, size = sidecar["sha256"], sidecar["bytes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its sidecar cannot be read ({error})"
    if not path.is_file():
        return "the file is missing"
    if path.stat().st_size != size:
        return f"it has {path.stat().st_size} bytes instead of {size}"
    if sha256_file(path) != expected:
        return "its sha256 is not the recorded one"
    return None


def find(run_dir: RunDir, step: int) -> Found:
    """The checkpoint of `step`; raises UserError if there is none, it is damaged, or a newer difftrain wrote it."""
    if not run_dir.sidecar(step).is_file():
        there = ", ".join(map(str, run_dir.checkpoint_steps())) or "none"
        raise UserError(f"there is no checkpoint of step {step}", str(run_dir.path), f"there are: {there}")
    if fault := fault_of(run_dir, step):
        raise UserError(f"checkpoint-{step} is damaged: {fault}", str(run_dir.path), "resume from another one")
    return _found(run_dir, step)


def _found(run_dir: RunDir, step: int) -> Found:
    return Found(run_dir.checkpoint(step), _sidecar(run_dir, step), _read(run_dir, step)["format"])


def _sidecar(run_dir: RunDir, step: int) -> dict[str, Any]:
    return _in_todays_format(_read(run_dir, step), "sidecar", run_dir.sidecar(step))


def _read(run_dir: RunDir, step: int) -> dict[str, Any]:
    """The sidecar as it was written; raises OSError, or ValueError if it is damaged or of another step."""
    sidecar = json.loads(run_dir.sidecar(step).read_text(encoding="utf-8"))
    if not isinstance(sidecar, dict):
        raise ValueError("it is no JSON object")
    if sidecar.get("format") != UNSEALED_FORMAT and sealed(sidecar) != sidecar:
        raise ValueError("its seal is broken: something in it was changed")
    if sidecar.get("step") != step:
        raise ValueError(f"it is of step {sidecar.get('step')}")
    return sidecar


def find_newest(run_dir: RunDir, say: Callable[[str], None]) -> Found | None:
    """The newest checkpoint that verifies, or None if there is no sidecar at all; `say` hears what was passed over.

    Raises UserError, naming each, if there are checkpoints and none verifies: starting again at step 0 in silence would
    throw the run away. Raises it as well if a newer difftrain wrote the newest.
    """
    faults: dict[int, str] = {}
    for step in reversed(run_dir.checkpoint_steps()):
        fault = fault_of(run_dir, step)
        if fault is None:
            for bad, why in faults.items():
                say(f"checkpoint-{bad} is passed over: {why}; checkpoint-{step} is used")
            return _found(run_dir, step)
        faults[step] = fault
    if faults:
        reasons = "; ".join(f"checkpoint-{step}: {fault}" for step, fault in faults.items())
        raise UserError(f"no checkpoint verifies: {reasons}", str(run_dir.path), "start again in another --output-dir")
    return None


def set_aside_after(run_dir: RunDir, step: int) -> list[str]:
    """The names of the sidecars newer than `step`, now renamed to NAME.damaged, so that they count for nothing.

    Only for checkpoints that were found damaged: pruning would else keep them in place of good ones.
    """
    newer = [run_dir.sidecar(other) for other in run_dir.checkpoint_steps() if other > step]
    for sidecar in newer:
        sidecar.rename(sidecar.with_name(f"{sidecar.name}.damaged"))
    return [sidecar.name for sidecar in newer]


def named_run(run: str) -> tuple[RunDir, int | None]:
    """The run directory and the step that FOLDER or FOLDER@STEP names."""
    folder, at, step = run.rpartition("@")
    if Path(run).is_dir() or not at or not step.isdecimal():
        return RunDir(run), None
    return RunDir(folder), int(step)


def require_checkpoint(run: str, where: str) -> None:
    """Raise UserError if FOLDER or FOLDER@STEP names no checkpoint; looks at names only."""
    run_dir, step = named_run(run)
    steps = run_dir.checkpoint_steps()
    if not steps or (step is not None and step not in steps):
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"there is no such checkpoint: {run}", where, f"checkpoints in {run_dir.path}: {there}")
