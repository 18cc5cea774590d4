"""Reading every record, in processes of their own: a picture that crashes or hangs its decoder costs one worker.

Each worker tells of record after record, so what it was at when it died is known: that record's fault is the crash, and
a new worker goes on behind it.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from trainer.data.audit.picture import Seen, inspect
from trainer.data.looks import NOTHING

if TYPE_CHECKING:
    from trainer.data.record import Records

BLOCK = 16  # records handed out at once
STUCK_SECONDS = 300.0  # on one record


def read_all(records: Records, workers: int, stuck_seconds: float = STUCK_SECONDS) -> Iterator[tuple[int, Seen]]:
    """Each record's index and what it is, in any order; with 0 workers in this process, and so without its shelter."""
    if workers == 0:
        for index in range(len(records)):
            yield index, inspect(records, index)
        return
    blocks = deque(range(start, min(start + BLOCK, len(records))) for start in range(0, len(records), BLOCK))
    team = [_Worker(records) for _ in range(min(workers, len(blocks)))]
    try:
        for worker in team:
            worker.give(blocks)
        while busy := [worker for worker in team if worker.todo]:
            ready = wait([worker.pipe for worker in busy], timeout=min(1.0, stuck_seconds))
            for place, worker in enumerate(team):
                if worker.pipe in ready:
                    yield from worker.answers(blocks)
                if worker.todo and (why := worker.trouble(stuck_seconds)):
                    yield worker.todo[0], Seen(NOTHING, why)
                    team[place] = _Worker(records, deque(list(worker.todo)[1:]))
                    worker.end()
                    team[place].give(blocks)
    finally:
        for worker in team:
            worker.end()


@dataclass
class _Worker:
    """A process, and the records it was given and has not told of yet."""

    records: Records
    todo: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # no thread of ours can be caught halfway, as by a fork
        self.pipe, theirs = context.Pipe()
        self.process: Any = context.Process(target=_work, args=(theirs, self.records), daemon=True)
        self.process.start()
        theirs.close()
        self.gone = False
        if not self.pipe.poll(60) or not self._received():
            raise AssertionError("a process for reading pictures did not start")
        self.heard = time.monotonic()
        self._send(self.todo)

    def give(self, blocks: deque[range]) -> None:
        """Keep it at work: a block beyond the one that it is at."""
        while blocks and len(self.todo) <= BLOCK and not self.gone:
            block = blocks.popleft()
            self.todo.extend(block)
            self._send(block)

    def answers(self, blocks: deque[range]) -> Iterator[tuple[int, Seen]]:
        """What it has to tell by now."""
        while self.todo and self.pipe.poll() and (told := self._received()):
            self.heard = time.monotonic()
            index, seen = told
            assert index == self.todo.popleft(), "records are read in the order in which they were given"
            self.give(blocks)
            yield index, seen

    def trouble(self, stuck_seconds: float) -> str | None:
        """Why it will not tell of its next record."""
        if self.gone:
            self.process.join()
            return f"reading it ended the process that did so (exit code {self.process.exitcode})"
        if time.monotonic() - self.heard > stuck_seconds:
            return f"reading it took over {stuck_seconds:g} s"
        return None

    def _send(self, indices: Iterable[int]) -> None:
        try:
            self.pipe.send(list(indices))
        except OSError:
            self.gone = True

    def _received(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.gone = True
            return None

    def end(self) -> None:
        """Whatever it is at."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection, records: Records) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    try:
        pipe.send("ready")
        while True:
            for index in pipe.recv():
                pipe.send((index, inspect(records, index)))
    except (EOFError, BrokenPipeError):
        return
