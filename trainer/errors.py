"""The ends of a run that are meant for people and schedulers, each with its exit code."""

from __future__ import annotations


class RunEnd(Exception):
    """An end of the process that the user is told about in one line, without a traceback."""

    exit_code = 1
    state = "failed"  # as written to run_manifest.json
    of_one_rank = False  # no other rank met it: this one has to say it
    traceback: str | None = None  # for the terminal, below the one line
    at_once = False  # leave by os._exit: the end of the interpreter would wait for ranks that no longer answer


class UserError(RunEnd):
    """Something the user can mend: what was seen, where it stands, and the fix. Do not retry."""

    exit_code = 2
    state = "refused"

    def __init__(self, what: str, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        super().__init__("\n  ".join(part for part in (what, where and f"in {where}", fix) if part))


class StorageFailed(RunEnd):
    """The run's own files could not be written, although it was tried again."""

    exit_code = 74
    state = "storage_failed"


class Stopped(RunEnd):
    """A stop was asked for; the state was saved, and `--resume auto` goes on."""

    exit_code = 75
    state = "stopped"


class Diverged(RunEnd):
    """The gradients stayed non-finite; starting again from here would only do it again."""

    exit_code = 76
    state = "diverged"
