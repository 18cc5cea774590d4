"""One run at a time in a run directory, on whichever machine."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from trainer.errors import UserError
from trainer.run.environment import utc_time


class RunLock:
    """The file `run.lock`, locked by the process that writes the run; whoever finds it locked learns by whom.

    A POSIX record lock: the kernel drops it with the process however that ends, so no lock is ever stale, and forked
    loader workers, which may outlive a killed run for seconds, do not inherit it.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "run.lock"
        self._descriptor: int | None = None

    def refuse_if_held(self) -> None:
        """Raise UserError, naming the holder, if another process holds the lock; writes nothing."""
        if holder := self.holder():
            raise UserError(
                f"another run is writing this folder: {holder}",
                str(self.path.parent),
                "wait for it, stop it, or give another --output-dir",
            )

    def may_write(self) -> bool:
        """Whether no other process holds the lock."""
        return self._descriptor is not None or self.holder() is None

    def holder(self) -> str | None:
        """Who holds the lock, or None if nobody does. Not for the process that holds it: asking would drop it."""
        assert self._descriptor is None, "closing any descriptor of the file would drop our own lock"
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return None if _locked(descriptor) else _named(descriptor)
        finally:
            os.close(descriptor)

    def take(self) -> None:
        """Hold the lock until `release` or the end of the process; raises UserError if another process does."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        for _ in range(10):  # who only asks for the holder has the lock for a moment
            if _locked(descriptor):
                break
            time.sleep(0.05)
        else:
            os.close(descriptor)
            self.refuse_if_held()
            raise UserError("another run has just left this folder", str(self.path.parent), "look, and start again")
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        facts = {"pid": os.getpid(), "hostname": socket.gethostname(), "since": utc_time()}
        os.write(descriptor, json.dumps(facts).encode() + b"\n")

    def release(self) -> None:
        """Let the next run in. The file stays: removing it could take it from under one that has just opened it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def _named(descriptor: int) -> str:
    with contextlib.suppress(ValueError, KeyError):  # it may be just about to write its name
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {facts['pid']} on {facts['hostname']} since {facts['since']}"
    return "a process that has just started"
