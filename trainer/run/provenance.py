"""Which version of the trainer ran: the facts of its git checkout, if it is one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.files import sha256_file
from trainer.run.redaction import redact

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 5.0

# One form whatever the user's git config says, so that equal changes have equal hashes on two machines.
DIFF_OPTIONS = (
    *("--binary", "--full-index", "--unified=3", "--diff-algorithm=myers", "--src-prefix=a/", "--dst-prefix=b/"),
    *("--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--no-indent-heuristic"),
)


def git_facts(folder: str | Path = PACKAGE_PARENT) -> dict[str, Any]:
    """`commit`, `branch` (null if detached), `dirty`, `untracked` (how many), `diff_sha256` (null if none), `remote`.

    All are null when no file of `folder` is tracked by git, as in site-packages, and what git does not say within
    its time is null. Never raises.

    `dirty` is what `git status` calls not clean, untracked files included; ignored files never count. `diff_sha256`
    hashes `git diff HEAD`, which holds every tracked change and no untracked file.
    """
    facts: dict[str, Any] = dict.fromkeys(("commit", "branch", "dirty", "untracked", "diff_sha256", "remote"))
    if _git(folder, "ls-files", "--error-unmatch", "--", ".") is None:
        return facts
    facts["remote"] = _remote(folder)
    status = _git(folder, "status", "--porcelain=v2", "--branch", "--", ".")
    if status is None:
        return facts
    lines = status.decode(errors="replace").splitlines()
    about = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# branch.") and " " in line[2:])
    commit, branch = about.get("branch.oid"), about.get("branch.head")
    changes = [line for line in lines if not line.startswith("#")]
    facts["commit"] = None if commit == "(initial)" else commit
    facts["branch"] = None if branch == "(detached)" else branch
    facts["dirty"] = bool(changes)
    facts["untracked"] = sum(line.startswith("? ") for line in changes)
    if len(changes) > facts["untracked"]:
        diff = _git(folder, "diff", "HEAD", *DIFF_OPTIONS, "--", ".")
        facts["diff_sha256"] = hashlib.sha256(diff).hexdigest() if diff else None
    return facts


def module_hashes(names: Sequence[str]) -> dict[str, str | None]:
    """The sha256 of the file of each imported module, by its name; None for one that has no file."""
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return {name: sha256_file(file) if file else None for name, file in files.items()}


def _remote(folder: str | Path) -> str | None:
    """The URL of `origin`, or of the first remote, without user and password."""
    listed = _git(folder, "config", "--get-regexp", r"^remote\..*\.url$")
    if not listed:
        return None
    urls = dict(line.split(" ", 1) for line in listed.decode(errors="replace").splitlines() if " " in line)
    return redact(urls.get("remote.origin.url") or next(iter(urls.values()), "")) or None


def _git(folder: str | Path, *arguments: str) -> bytes | None:
    """What git printed, or None if it is missing, failed or took too long.

    The checkout may belong to another user (a mounted folder in a container): its Python is already running here, so
    asking git about it adds no trust. A git hook that started us exports GIT_DIR and its kin: they name another place.
    """
    command = ["git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false", "-c", "core.quotePath=true", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_SECONDS
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
