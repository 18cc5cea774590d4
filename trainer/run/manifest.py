"""run_manifest.json: what a run was made of, every start it had, its checkpoints, and how it ended."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.files import retrying, write_json
from trainer.run.environment import utc_time
from trainer.run.redaction import redact_argv, redact_tree

SCHEMA_VERSION = 1

# How a start ended, with `running` while it has not; the errors of trainer.errors name the others.
STATES = ("validated", "running", "done", "stopped", "refused", "failed", "diverged", "storage_failed")

# What `facts` must hold, and the fields of each that readers rely on; all may hold more.
FACTS: dict[str, tuple[str, ...]] = {
    "config": ("source", "source_sha256", "resolved_sha256"),
    "git": ("commit", "branch", "dirty", "diff_sha256", "remote"),
    "model": ("kind", "source", "revision", "files"),
    "topology": ("world_size", "micro_batch_size", "accumulation", "num_machines"),
    "data": ("records", "fingerprint"),
}


def run_facts(
    *,
    command: Sequence[str],
    config: Mapping[str, Any],
    git: Mapping[str, Any],
    seed: int,
    deterministic: bool,
    model: Mapping[str, Any],
    topology: Mapping[str, Any],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """What one start is made of, for `begin` and `validated`; secrets in `command` are hidden. Unknown values are None.

    `config` comes from `config_facts`, `git` from provenance.git_facts. `data` may add counts to its records.
    """
    groups = {"config": config, "git": git, "model": model, "topology": topology, "data": data}
    for name, fields in FACTS.items():
        missing = [field for field in fields if field not in groups[name]]
        assert not missing, f"manifest: {name} lacks {', '.join(missing)}"
    return {
        "command": redact_argv(command),
        "config": dict(config),
        "git": dict(git),
        "seed": seed,
        "deterministic": deterministic,
        "model": dict(model),
        "topology": dict(topology),
        "data": dict(data),
    }


def config_facts(source: str | Path, source_text: bytes | str, resolved_text: bytes | str) -> dict[str, Any]:
    """Where the config was read and the sha256 of what was written there and of config.resolved.yaml."""
    hashes = [
        hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()
        for text in (source_text, resolved_text)
    ]
    return {"source": str(source), "source_sha256": hashes[0], "resolved_sha256": hashes[1]}


def start_entry(
    facts: Mapping[str, Any],
    from_step: int,
    *,
    environment_changes: Mapping[str, Any] | None = None,
    config_changes: Mapping[str, Any] | None = None,
    torch_threads: int | None = None,
    time: str | None = None,
) -> dict[str, Any]:
    """One entry of `starts`: who started, when, from which step, with what, and what changed since the last start."""
    return {
        "time": time or utc_time(),
        "from_step": from_step,
        "command": facts["command"],
        "topology": facts["topology"],
        "resolved_sha256": facts["config"]["resolved_sha256"],
        "data_fingerprint": facts["data"]["fingerprint"],
        "torch_threads": torch_threads,
        "git_commit": facts["git"]["commit"],
        "git_diff_sha256": facts["git"]["diff_sha256"],
        "config_changes": dict(config_changes or {}),
        "environment_changes": dict(environment_changes or {}),
        "pid": os.getpid(),
        "hostname": socket.gethostname(),
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any], ignored: Iterable[str] = ("time",)) -> dict[str, Any]:
    """What differs, as {"packages.torch": {"was": "2.12.0", "now": "2.13.0"}}; absent counts as null."""
    was, now = flat(before), flat(after)
    return {
        name: {"was": was.get(name), "now": now.get(name)}
        for name in sorted(was.keys() | now.keys())
        if name.split(".")[0] not in ignored and was.get(name) != now.get(name)
    }


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest; raises UserError if there is none, if it is damaged, or if a newer difftrain wrote it."""
    try:
        contents = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no run manifest at '{path}'", fix="is this the folder of a run?") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"the run manifest cannot be read: {error}", str(path), "put back the one the run wrote"
        ) from None
    version = contents.get("schema_version") if isinstance(contents, dict) else None
    if not isinstance(version, int) or not all(
        isinstance(contents.get(key), list) for key in ("starts", "checkpoints")
    ):
        raise UserError("this is not the manifest of a run", str(path), "put back the one the run wrote")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"the manifest has schema {version}, newer than {SCHEMA_VERSION}", str(path), "update difftrain"
        )
    return contents


class Manifest:
    """The one writer of a run's manifest: rank 0. Every change is on disk when it returns.

    Each raises StorageFailed if the file could not be written, and takes part in the next write all the same.
    """

    def __init__(self, path: str | Path, attempts: int = 6, sleep: Callable[[float], None] = time.sleep):
        self.path = Path(path)
        self._attempts, self._sleep = attempts, sleep
        self.contents: dict[str, Any] = {}

    def validated(self, facts: Mapping[str, Any]) -> None:
        """A manifest without a start; raises UserError if the one there has starts, which must not be lost."""
        self.load()
        if self.contents["starts"]:
            raise UserError("this folder holds a run, whose manifest is not replaced", str(self.path), "choose another")
        self._set(**facts, status=_status("validated", 0, "the config is valid"))

    def begin(self, facts: Mapping[str, Any], start: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """The facts of this start, with `start` after the earlier ones and the known checkpoints kept.

        `config` is every value of it; each config that a start had is kept once, by its hash.
        """
        self.load()
        configs = {**self.contents.get("configs", {}), start["resolved_sha256"]: dict(config)}
        self._set(
            **facts,
            configs=configs,
            starts=[*self.contents["starts"], dict(start)],
            status=_status("running", None, ""),
        )

    def add_checkpoint(self, step: int, file: str, sha256: str, size_bytes: int) -> None:
        """Lists a committed checkpoint, in place of an earlier one of the same step."""
        entry = {"step": step, "file": file, "sha256": sha256, "bytes": size_bytes}
        others = [known for known in self.contents["checkpoints"] if known["step"] != step]
        self._set_checkpoints(sorted([*others, entry], key=lambda known: known["step"]))

    def keep_checkpoints(self, steps: Iterable[int]) -> None:
        """Drops from the list every checkpoint of another step: those that were pruned or found damaged."""
        kept = set(steps)
        self._set_checkpoints([known for known in self.contents["checkpoints"] if known["step"] in kept])

    def end(self, state: str, exit_code: int, reason: str) -> None:
        """How this start ended; launchers that turn every exit code into 1 read it here."""
        self._set(status=_status(state, exit_code, reason))

    def _set_checkpoints(self, checkpoints: list[dict[str, Any]]) -> None:
        if checkpoints != self.contents["checkpoints"]:
            self._set(checkpoints=checkpoints)

    def load(self) -> None:
        """Read what the file holds."""
        fresh = {"schema_version": SCHEMA_VERSION, "starts": [], "checkpoints": []}
        self.contents = read_manifest(self.path) if self.path.exists() else fresh

    def _set(self, **changed: Any) -> None:
        assert self.contents, "begin or validated comes first"
        merged = self.contents | redact_tree(changed)
        history = {key: merged.pop(key) for key in ("configs", "starts", "checkpoints", "status") if key in merged}
        self.contents = merged | history  # what grows stands last
        retrying(lambda: write_json(self.path, self.contents), self._attempts, what=str(self.path), sleep=self._sleep)


def record_end(path: str | Path, state: str, exit_code: int, reason: str) -> None:
    """The end of a start that came to no `begin`, in the manifest of the run that it would have gone on with."""
    manifest = Manifest(path)
    manifest.load()
    manifest.end(state, exit_code, reason)


def _status(state: str, exit_code: int | None, reason: str) -> dict[str, Any]:
    assert state in STATES, f"no such state: {state}"
    return {"state": state, "exit_code": exit_code, "reason": reason}


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by dotted name."""
    values: dict[str, Any] = {}
    for key, item in value.items():
        values |= flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return values
