"""Where a start begins: at step 0, or at a checkpoint whose config it may go on from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.checkpoint import Found, find, find_newest
from trainer.config import Config
from trainer.data.fingerprint import named
from trainer.errors import UserError
from trainer.run.rundir import RunDir

# Which kernels compute a step: they round in other ways.
KERNELS = ("train.compile", "train.norm_precision", "train.channels_last", "train.cudnn_benchmark")

# What may change between two starts of one run: none of it changes what a step computes, but for rounding.
FREE = (
    "train.output_dir",
    "train.micro_batch_size",
    "train.log_every",
    "train.collective_timeout_seconds",
    *KERNELS,
    "data.num_workers",
    "cache.dir",
    "checkpoint",
    "validation",
    "tracking",
    "hooks",
    "plugins",
)

# What a checkpoint's sidecar knows of its inputs, by the section of the config that names them.
FINGERPRINTS = {"data": "data_fingerprint", "model": "model_files"}


def choose_start(run_dir: RunDir, resume: str, say: Callable[[str], None]) -> Found | None:
    """The checkpoint that `--resume RESUME` means, or None for step 0; raises UserError if there is none to be had."""
    found = _chosen(run_dir, resume, say)
    if found is not None and (lost := found.lost()):
        say(f"note   {found.path.name} is of format {found.format}: {'; '.join(lost)}")
    return found


def _chosen(run_dir: RunDir, resume: str, say: Callable[[str], None]) -> Found | None:
    if resume == "none":
        refuse_second_run(run_dir)
        return None
    if resume in ("auto", "latest"):
        found = find_newest(run_dir, say)
        if found is None and resume == "latest":
            raise UserError(
                "--resume latest, but there is no checkpoint", str(run_dir.path), "--resume auto starts at step 0"
            )
        if found is None:
            say(f"no checkpoint in {run_dir.path}: starting at step 0")
        return found
    return _named(Path(resume), run_dir, say)


def refuse_second_run(run_dir: RunDir) -> None:
    """Raise UserError if the folder holds a run already: a new one would write over it."""
    if run_dir.holds_run():
        raise UserError(
            "this folder holds a run already",
            str(run_dir.path),
            "--resume auto goes on with it; or give another --output-dir",
        )


def _named(path: Path, run_dir: RunDir, say: Callable[[str], None]) -> Found:
    """The checkpoint at `path`: a run folder (its newest) or one checkpoint file."""
    if path.is_dir():
        found = find_newest(RunDir(path), say)
        if found is None:
            raise UserError(
                "there is no checkpoint in this folder", str(path), "--resume wants auto, latest, none or a path"
            )
    else:
        step = path.stem.removeprefix("checkpoint-")
        if not path.is_file() or not step.isdecimal():
            raise UserError(
                f"--resume {path}: there is no such run or checkpoint", fix="it wants auto, latest, none or a path"
            )
        found = find(RunDir(path.parent), int(step))
    same_folder = found.path.parent.resolve() == run_dir.path.resolve()
    if same_folder and (newer := [step for step in run_dir.checkpoint_steps() if step > found.sidecar["step"]]):
        raise UserError(
            f"--resume {path} names step {found.sidecar['step']}, but the run has gone on to step {newer[-1]}",
            str(run_dir.path),
            "branch off into another --output-dir",
        )
    if not same_folder and run_dir.holds_run():
        raise UserError(
            "this folder holds another run already", str(run_dir.path), "branch off into a new --output-dir"
        )
    return found


def refuse_changes(saved: dict[str, Any], config: Config, allowed: Sequence[str], say: Callable[[str], None]) -> None:
    """Raise UserError if `config` differs from the `saved` one in what a step computes, and say what else differs."""
    changes = differences_from(saved, config)
    known = {*_dotted(saved), *_dotted(config.model_dump(mode="json")), *FINGERPRINTS}
    if unknown := [name for name in allowed if name not in known]:
        raise UserError(f"--allow-change {' '.join(unknown)}: there is no such key in this config")
    free = (*free_keys(config), *allowed)
    refused = []
    for key, (old, new) in changes.items():
        line = f"{key}: {old!r} -> {new!r}"
        if among(key, KERNELS):
            say(f"changed since the checkpoint: {line} (same samples, other rounding)")
        elif among(key, free):
            say(f"changed since the checkpoint: {line}")
        else:
            refused.append(line)
    if refused:
        names = " ".join(line.partition(":")[0] for line in refused)
        raise UserError(
            "this config does not continue the checkpoint's run: " + "; ".join(refused),
            fix=f"change it back, start a new run, or allow it: --allow-change {names}",
        )


def free_keys(config: Config) -> tuple[str, ...]:
    """The keys and sections that may change between two starts of a run, for they change none of its steps."""
    return FREE if config.lr.depends_on_max_steps else (*FREE, "train.max_steps")


def among(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of `names` or stands in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def differences_from(saved: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """The dotted keys at which `config` differs from a saved one; a key that was unknown then has its default."""
    with contextlib.suppress(ValidationError):  # a value that is no longer allowed: the raw comparison names it
        saved = Config.model_validate(saved).model_dump(mode="json")
    return differences(saved, config.model_dump(mode="json"))


def refuse_other_inputs(
    sidecar: dict[str, Any],
    now: dict[str, Any],
    allowed: Sequence[str],
    changed_records: Callable[[], dict[str, str] | None],
    say: Callable[[str], None],
) -> None:
    """Raise UserError if the records or the model's files are not those of the checkpoint, or say so if it is allowed.

    `changed_records` says by key what became of the records, None if nobody knows.
    """
    for name, key in FINGERPRINTS.items():
        was, found = sidecar.get(key), now[key]
        if was is None or found is None or was == found:
            continue
        changed = changed_records() if name == "data" else None
        what = f"{key} was {_short(was)}, is {_short(found)}{'; ' + named(changed) if changed else ''}"
        if name not in allowed:
            raise UserError(
                f"the {name} changed since the checkpoint: {what}",
                fix=f"put it back, start a new run, or allow it: --allow-change {name}",
            )
        say(f"changed since the checkpoint: {what}")


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else ", ".join(f"{k} {v[:12]}" for k, v in value.items())


def _dotted(value: Any, path: str = "") -> set[str]:
    """Every dotted key of a nested config, sections included."""
    if not isinstance(value, dict):
        return {path}
    return {path} | {key for name, item in value.items() for key in _dotted(item, f"{path}.{name}" if path else name)}


def differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """The dotted keys at which two configs differ, each with both values; None where a key is absent."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(key for key in new if key not in old)]:
            found |= differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if old == new else {path: (old, new)}
