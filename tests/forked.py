"""`difftrain` in processes of its own that start in a fraction of a second.

A start of Python spends seconds on imports. Here one process for each test worker imports everything and runs nothing,
and each trainer is forked from it. A trainer is as real as any other: it has a process id and a session, handles
signals, can be killed, and ends with an exit code. Tests of launchers, installations and cold starts use real commands.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import TimeoutExpired
from types import TracebackType
from typing import IO, Self

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ROOT / "tests" / "plugins"
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a run imports, without computing anything: a process with threads of its own cannot be forked safely.
IMPORTS = (
    *("trainer.launch", "trainer.commands.train", "trainer.commands.cache", "trainer.hooks.standard"),
    *("accelerate", "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl"),
    *("transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip"),
    *("torch._dynamo", "torch._inductor.config", "torch.distributed.algorithms.join"),
)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(list(IMPORTS))
_STARTING = threading.Lock()
# An exit code is read once from a pipe, by whoever looks first; a start looks at all processes there are. Of two
# threads that read the same one, one would find the pipe at its end, which multiprocessing takes for exit code 255.
_READING = threading.Lock()
_started = False


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's variables; one thread a rank and the plug-ins of the tests."""
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{PLUGINS}"} | more


class Job:
    """`difftrain ARGUMENTS` on `ranks` ranks of this machine, with what tests use of a `subprocess.Popen`.

    All ranks write to one pipe. Signals, `pid` and `returncode` are those of rank 0.
    """

    def __init__(self, *arguments: str, cwd: Path, ranks: int = 1, **more: str):
        of_ranks: list[dict[str, str]] = [{}]
        if ranks > 1:
            together = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            of_ranks = [together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        _start_server()
        ours, theirs = CONTEXT.Pipe(duplex=False)
        base = environment(**more)
        self.processes = [
            CONTEXT.Process(target=_difftrain, args=(arguments, str(cwd), base | of_rank, theirs), daemon=False)
            for of_rank in of_ranks
        ]
        for process in self.processes:
            with _READING:
                process.start()
        theirs.close()
        self.stdout: IO[str] = os.fdopen(os.dup(ours.fileno()), encoding="utf-8", errors="replace")
        ours.close()

    @property
    def pid(self) -> int:
        pid = self.processes[0].pid
        assert pid is not None
        return pid

    @property
    def returncode(self) -> int | None:
        return _exit_code(self.processes[0])

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code of rank 0, once all ranks have ended; raises TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for process in self.processes:
            wait([process.sentinel], None if deadline is None else max(0.0, deadline - time.monotonic()))
            if _exit_code(process) is None:
                raise TimeoutExpired("difftrain", timeout or 0)
        code = self.returncode
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All that the ranks said, once they have ended; raises TimeoutExpired."""
        # What is said fits a pipe, save for a long run's: read while it goes on, and let a watchdog keep the time.
        with _Watchdog(self, timeout) as watchdog:
            said = self.stdout.read()
        if watchdog.barked:
            raise TimeoutExpired("difftrain", timeout or 0, said)
        self.wait(timeout)
        return said, None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End every rank at once."""
        for process in self.processes:
            assert process.pid is not None
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # with its loader workers
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)  # it may not have a session yet

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is not None or self.poll() is None:
                self.kill()
            self.wait(60)
        except TimeoutExpired:
            self.kill()  # another rank than 0: it would hold up the end of the tests
            raise
        self.stdout.close()


class _Watchdog:
    """Ends a job that outlives its time, whose output would else be waited for without end."""

    def __init__(self, job: Job, seconds: float | None):
        self.job, self.seconds, self.alarm, self.barked = job, seconds, None, False

    def __enter__(self) -> Self:
        if self.seconds is not None:
            self.alarm = threading.Timer(self.seconds, self._bark)
            self.alarm.start()
        return self

    def _bark(self) -> None:
        self.barked = True
        self.job.kill()

    def __exit__(self, *_: object) -> None:
        if self.alarm is not None:
            self.alarm.cancel()


def _exit_code(process: BaseProcess) -> int | None:
    with _READING:
        return process.exitcode


def difftrain(*arguments: str, cwd: Path, ranks: int = 1, **more: str) -> tuple[int, str]:
    """Run the command to its end: the exit code of rank 0, and all that the ranks said."""
    with Job(*arguments, cwd=cwd, ranks=ranks, **more) as job:
        said, _ = job.communicate(timeout=300)
        return job.wait(), said


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start_server() -> None:
    """Start the process that all are forked from, if it does not run: with one thread, and the package on its path."""
    global _started
    import pytest

    with _STARTING:  # tests start jobs from several threads, and the environment is one
        if _started:
            return
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(OPENBLAS_NUM_THREADS="1").items():
                patch.setenv(name, value)
            forkserver.ensure_running()
        _started = True


def _difftrain(arguments: tuple[str, ...], cwd: str, names: dict[str, str], output: Connection) -> None:
    """In the new process: become `difftrain ARGUMENTS`."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the default again, for loader workers
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(names)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["difftrain", *arguments]
    sys.path[:0] = filter(None, names["PYTHONPATH"].split(os.pathsep))

    from trainer.cli import main

    sys.exit(main(arguments))
