"""What the outside asks of a running job: by a signal, by the end of its launcher, or by a file in its folder."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from enum import IntEnum
from types import FrameType
from typing import Protocol

from trainer.files import remove_own_temp_files
from trainer.run.rundir import RunDir


class Asked(IntEnum):
    """What to do after the step that is under way; the ranks do what the most urgent of them was asked."""

    NOTHING = 0
    SAVE = 1
    STOP = 2  # and save


class Asks(Protocol):
    """What the loop asks after every step."""

    why: str  # it is asked to stop

    def asked(self) -> Asked:
        """What is asked now."""
        ...


SAME_REQUEST_SECONDS = 5.0  # a launcher passes on the signal that the terminal has already sent to all
POLL_SECONDS = 1.0  # between two looks for a file, which on a network file system takes milliseconds


class Control:
    """Listens from its construction to `close`. Every rank has one; only one with a `run_dir` looks for files."""

    # SIGUSR1 is what Slurm sends ahead of a time limit (sbatch --signal=USR1@120).
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, run_dir: RunDir | None = None, environment: Mapping[str, str] = os.environ):
        self.why = ""  # it is asked to stop
        self._run_dir = run_dir
        self._launched = "ACCELERATE_MIXED_PRECISION" in environment or "TORCHELASTIC_RUN_ID" in environment
        self._parent = os.getppid()
        self._first_signal_at: float | None = None
        self._looked_at = -POLL_SECONDS
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def asked(self) -> Asked:
        """What is asked now. A stop stays asked; a save is asked once."""
        if self._launched and not self.why and os.getppid() != self._parent:
            # `accelerate launch` dies of a SIGTERM without passing it on to the one process that it started.
            self.why = "the launcher has ended"
            _write(f"\n{self.why}: finishing this step, then saving\n")
        from_file = self._from_file()
        return Asked.STOP if self.why else from_file

    def _from_file(self) -> Asked:
        now = time.monotonic()
        if self._run_dir is None or now - self._looked_at < POLL_SECONDS:
            return Asked.NOTHING
        self._looked_at = now
        what = Asked.NOTHING
        for asked, path in ((Asked.SAVE, self._run_dir.save_request), (Asked.STOP, self._run_dir.stop_request)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                what = asked
        if what is Asked.STOP:
            self.why = "asked to by `difftrain stop`"
        return what

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), self._first_signal_at
        if first is not None:
            if self._launched and now - first < SAME_REQUEST_SECONDS:
                return
            if self._run_dir is not None:  # a checkpoint may be on its way to the disk
                remove_own_temp_files(self._run_dir.path)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        name = signal.Signals(number).name
        self._first_signal_at, self.why = now, f"stopped by {name}"
        _write(f"\n{name}: finishing this step, then saving; again to stop at once\n")

    def close(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _write(text: str) -> None:
    """Past Python's buffers: a handler may run in the middle of another print."""
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(2, text.encode())
