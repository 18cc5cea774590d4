"""Builds that are killed and resumed, on whatever ranks, or run at once leave the files of a build in one go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from builds import (
    COUNT,
    SHARD,
    Alone,
    Encoder,
    answer,
    build_alone,
    build_on,
    die,
    entries,
    files,
    in_a_process,
    make_store,
)

from trainer.cached.lookup import Lookup, write_indexed
from trainer.cached.store import Store


def kill_at_chunk(number: int):
    def before(chunk: int) -> None:
        if chunk == number:
            die()

    return before, lambda: None


def kill_in_call(name: str, number: int):
    """Dies at the call of that number of a function of `os`, before it does anything."""

    def patch() -> None:
        real, calls = getattr(os, name), 0

        def dying(*arguments):
            nonlocal calls
            calls += 1
            if calls == number:
                die()
            return real(*arguments)

        setattr(os, name, dying)

    return lambda chunk: None, patch


DEATHS = {
    "at the first chunk": kill_at_chunk(0),
    "in the third shard": kill_at_chunk(5),
    "at the last chunk": kill_at_chunk(16),
    "before the recipe is named": kill_in_call("replace", 1),
    "before the plan is named": kill_in_call("replace", 2),
    "before the first shard is named": kill_in_call("replace", 3),
    "before the fourth shard is named": kill_in_call("replace", 6),
    "before the last shard is durable": kill_in_call("fsync", 21),
    "after the second shard": kill_in_call("fsync", 8),
    "after the last shard": kill_in_call("fsync", 22),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_build_killed_and_resumed_leaves_the_files_of_a_build_in_one_go(
    tmp_path: Path, whole: dict[str, bytes], death: str
):
    before, patch = DEATHS[death]
    store, killed = make_store(tmp_path / "killed"), Encoder(tmp_path / "killed.log", before)

    def doomed() -> None:
        patch()
        build_alone(store, entries(COUNT), killed)

    process = in_a_process(doomed)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    count, _ = build_alone(store, entries(COUNT), Encoder(tmp_path / "rest.log"))
    assert files(store) == whole, "no more and no less, no temp file"
    assert len(killed.noted()) + count - COUNT <= SHARD, "lost no more than a shard"


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (2, 3)])
def test_a_build_may_go_on_with_other_ranks(tmp_path: Path, whole: dict[str, bytes], first: int, second: int):
    before, _ = kill_at_chunk(4)
    store, killed = make_store(tmp_path / "killed"), Encoder(tmp_path / "killed.log", before)
    process = in_a_process(lambda: build_on(first, store, entries(COUNT), killed))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    rest = Encoder(tmp_path / "rest.log")
    ends = build_on(second, store, entries(COUNT), rest)
    assert files(store) == whole
    assert ends == [len(rest.noted())] * second
    assert len(killed.noted()) + len(rest.noted()) - COUNT <= first * SHARD, "lost no more than a shard of each rank"


SCRIPT = """
import sys, time
from pathlib import Path
from builds import Encoder, build_on, entries, make_store
print("ready", flush=True)
slowly = lambda chunk: time.sleep(0.03)
build_on(2, make_store(Path(sys.argv[1])), entries(500), Encoder(Path(sys.argv[2]), slowly))
"""


@pytest.mark.slow
@pytest.mark.fault
def test_a_build_killed_over_and_over_ends_with_the_same_files(tmp_path: Path, whole: dict[str, bytes]):
    log, store = tmp_path / "log", make_store(tmp_path / "killed")
    kills = 0
    for tenths in range(30):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "killed"), str(log)],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + tenths * 0.013)
        process.kill()
        process.wait()
        process.stdout.close()
        kills += 1
        if set(files(store)) >= set(whole):
            break
    assert kills > 1
    build_alone(store, entries(COUNT), Encoder(log))
    assert files(store) == whole
    assert len(Encoder(log).noted()) - COUNT <= kills * 2 * SHARD


def test_what_a_killed_build_of_other_entries_left_is_used(tmp_path: Path):
    store = make_store(tmp_path)
    killed = Encoder(tmp_path / "killed.log", kill_at_chunk(6)[0])
    in_a_process(lambda: build_alone(store, entries(COUNT), killed)).join(60)
    kept = 167  # the three shards of one shape
    wanted = [*entries(70, changed=[6]), *entries(COUNT)[70:][::-1]]
    encoder = Encoder(tmp_path / "log")
    assert build_alone(store, wanted, encoder)[0] == COUNT - kept + 1
    lookup = Lookup(write_indexed(store, [entry.key for entry in wanted]))
    assert all(torch.equal(lookup.at(at), answer(entry).half().float()) for at, entry in enumerate(wanted))


def begun(store: Store, log: Path, until: Path) -> BaseProcess:
    """A process that builds all entries, has come to its first chunk, and stays there until a file is there."""
    started = log.with_suffix(".started")

    def wait(chunk: int) -> None:
        started.touch()
        for _ in range(6000):
            if until.exists():
                return
            time.sleep(0.01)

    process = in_a_process(lambda: build_alone(store, entries(COUNT), Encoder(log, wait)))
    while not started.exists():
        assert process.is_alive()
        time.sleep(0.01)
    return process


class Waiting(Alone):
    """The only rank, which makes a file once it says that it waits."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def say(self, line: str) -> None:
        super().say(line)
        if "waiting for another run" in line:
            self.file.touch()


def test_of_two_builds_at_once_the_second_encodes_nothing(tmp_path: Path):
    store, ranks = make_store(tmp_path), Waiting(tmp_path / "waits")
    process = begun(store, tmp_path / "first.log", until=ranks.file)
    second = Encoder(tmp_path / "second.log")
    count, said = build_alone(store, entries(COUNT), second, ranks)
    process.join(60)
    assert process.exitcode == 0
    assert (count, second.noted()) == (0, [])
    assert sum("waiting for another run" in line for line in said) == 1


def test_a_run_that_needs_nothing_new_does_not_wait_for_one_that_builds(tmp_path: Path):
    store = make_store(tmp_path)
    build_alone(store, entries(70), Encoder(tmp_path / "log"))
    process = begun(store, tmp_path / "log", until=tmp_path / "never")
    assert build_alone(store, entries(70), Encoder(tmp_path / "log"))[0] == 0
    process.kill()
    process.join()
    assert build_alone(store, entries(COUNT), Encoder(tmp_path / "rest"))[0] == COUNT - 70, "no lock outlives its owner"
