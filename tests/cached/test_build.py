"""A build killed anywhere and resumed, on whatever ranks, leaves the files of a build in one go."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builds import (
    SHAPE,
    SHARD_BYTES,
    Alone,
    Encoder,
    answer,
    build_alone,
    build_on,
    die,
    entries,
    files,
    flip,
    in_a_process,
    key,
    make_store,
    shards,
)

from trainer.cached import build as building
from trainer.cached.build import CHUNK, Wanted, build
from trainer.cached.lookup import Lookup, write_indexed
from trainer.errors import StorageFailed, UserError

COUNT = 500  # six shards of one shape and three of the other, the last ones not full
SHARD = 2 * CHUNK


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files of a build in one go on one rank."""
    store = make_store(tmp_path / "whole")
    assert build_alone(store, entries(COUNT), Encoder(tmp_path / "whole.log"))[0] == COUNT
    assert len(shards(store)) == math.ceil(167 / SHARD) + math.ceil(333 / SHARD)
    return files(store)


def test_all_entries_are_encoded_once_and_read_back(tmp_path: Path):
    store, encoder = make_store(tmp_path, "fp32"), Encoder(tmp_path / "log")
    wanted = entries(COUNT)
    assert build_alone(store, wanted + wanted[:70], encoder)[0] == COUNT
    assert sorted(encoder.noted()) == list(range(COUNT))
    lookup = Lookup(write_indexed(store, [entry.key for entry in wanted]))
    assert all(torch.equal(lookup.at(entry.index), answer(entry)) for entry in wanted)


def test_what_is_kept_is_not_encoded_again(tmp_path: Path):
    store, encoder = make_store(tmp_path), Encoder(tmp_path / "log")
    build_alone(store, entries(COUNT), encoder)
    before = files(store)
    count, said = build_alone(store, entries(COUNT)[::-1], encoder)
    assert (count, len(encoder.noted())) == (0, COUNT)
    assert files(store) == before
    assert "500 entries, all of them kept" in said[0]


@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_any_number_of_ranks_writes_the_same_files(tmp_path: Path, whole: dict[str, bytes], world_size: int):
    store, encoder = make_store(tmp_path / "ranks"), Encoder(tmp_path / "log")
    assert build_on(world_size, store, entries(COUNT), encoder) == [COUNT] * world_size
    assert files(store) == whole
    assert sorted(encoder.noted()) == list(range(COUNT))


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
def test_a_build_killed_at_any_time_over_and_over_ends_with_the_same_files(tmp_path: Path, whole: dict[str, bytes]):
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


def test_a_changed_entry_is_the_only_one_that_is_encoded_again(tmp_path: Path):
    store, encoder = make_store(tmp_path), Encoder(tmp_path / "log")
    build_alone(store, entries(COUNT), encoder)
    before = files(store)
    wanted = entries(COUNT, changed=[123])
    assert build_alone(store, wanted, encoder)[0] == 1
    assert encoder.noted()[COUNT:] == [10_123]
    assert files(store).items() > before.items(), "what was there is as it was"
    lookup = Lookup(write_indexed(store, [entry.key for entry in wanted]))
    assert torch.equal(lookup.at(123), answer(wanted[123]).half().float())


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


def test_another_recipe_has_a_folder_of_its_own_and_reads_nothing_of_this_one(tmp_path: Path):
    store, encoder = make_store(tmp_path), Encoder(tmp_path / "log")
    build_alone(store, entries(70), encoder)
    others = [make_store(tmp_path, vae="1" * 64), make_store(tmp_path, dtype="bf16"), make_store(tmp_path, more=1)]
    assert len({each.folder for each in (store, *others)}) == 4
    for other in others:
        other.create()
        for path in shards(store):
            (other.folder / path.name).write_bytes(path.read_bytes())
        count, said = build_alone(other, entries(70), encoder)
        assert count == 70
        assert any("another recipe made it" in line for line in said)


def test_a_damaged_shard_is_said_and_built_anew(tmp_path: Path):
    store, encoder = make_store(tmp_path), Encoder(tmp_path / "log")
    build_alone(store, entries(COUNT), encoder)
    before = files(store)
    for damage in (
        lambda path: flip(path, 30),
        lambda path: os.truncate(path, 5000),
        lambda path: os.truncate(path, 3),
    ):
        path = shards(store)[2]
        damage(path)
        count, said = build_alone(store, entries(COUNT), encoder)
        assert 0 < count <= SHARD
        assert sum("is damaged" in line and path.name in line for line in said) == 2, "before and under the lock"
        assert files(store) == before


def test_a_damaged_row_is_found_by_a_build_that_checks_rows(tmp_path: Path):
    store, encoder = make_store(tmp_path), Encoder(tmp_path / "log")
    build_alone(store, entries(COUNT), encoder)
    before = files(store)
    flip(shards(store)[1], -300)
    assert build_alone(store, entries(COUNT), encoder)[0] == 0
    assert 0 < build_alone(store, entries(COUNT), encoder, check_rows=True)[0] <= SHARD
    assert files(store) == before


def test_of_two_builds_at_once_the_second_waits_and_encodes_nothing(tmp_path: Path):
    store = make_store(tmp_path)
    started = tmp_path / "started"

    def slow(chunk: int) -> None:
        started.touch()
        time.sleep(0.05)

    process = in_a_process(lambda: build_alone(store, entries(COUNT), Encoder(tmp_path / "first.log", slow)))
    while not started.exists():
        time.sleep(0.01)
    second = Encoder(tmp_path / "second.log")
    count, said = build_alone(store, entries(COUNT), second)
    process.join(60)
    assert process.exitcode == 0
    assert (count, second.noted()) == (0, [])
    assert sum("waiting for another run" in line for line in said) == 1


def test_a_run_that_needs_nothing_new_does_not_wait_for_one_that_builds(tmp_path: Path):
    store = make_store(tmp_path)
    build_alone(store, entries(70), Encoder(tmp_path / "log"))
    started = tmp_path / "started"

    def stuck(chunk: int) -> None:
        started.touch()
        time.sleep(60)

    process = in_a_process(lambda: build_alone(store, entries(COUNT), Encoder(tmp_path / "log", stuck)))
    while not started.exists():
        time.sleep(0.01)
    assert build_alone(store, entries(70), Encoder(tmp_path / "log"))[0] == 0
    process.kill()
    process.join()
    assert build_alone(store, entries(COUNT), Encoder(tmp_path / "rest"))[0] == COUNT - 70, "no lock outlives its owner"


@pytest.mark.parametrize(
    ("dtype", "value", "what"),
    [
        ("fp16", 70_000.0, "70,000 is more than fp16 can hold, in picture 40\n  in cache.dtype"),
        ("fp32", math.inf, "not finite\n  in picture 40"),
        ("bf16", math.nan, "not finite\n  in picture 40"),
    ],
)
def test_a_value_that_cannot_be_kept_names_its_entry_on_every_rank(tmp_path, dtype: str, value: float, what: str):
    ended = []

    def encode(chunks):
        try:
            for chunk in chunks:
                rows = torch.stack([answer(entry) for entry in chunk])
                for row, entry in zip(rows, chunk, strict=True):
                    if entry.index == 40:
                        row[0, 0, 1, 1] = value
                yield rows
        finally:
            ended.append(True)

    store = make_store(tmp_path, dtype)
    ends = build_on(2, store, entries(COUNT), encode, name=lambda entry: f"picture {entry.index}")
    assert all(isinstance(end, UserError) and what in str(end) for end in ends), ends
    assert len(ended) == 2, "although the errors, and with them their tracebacks, are still there"
    assert build_on(2, store, entries(COUNT), Encoder(tmp_path / "log"))[0] <= COUNT, "the lock is free again"


def test_an_error_of_one_rank_is_raised_on_all_and_ends_the_encoder(tmp_path: Path):
    ended = []

    def encode(chunks):
        try:
            for chunk in chunks:
                if any(entry.index == 100 for entry in chunk):
                    error = UserError("picture cannot be read", "picture 100")
                    error.of_one_rank = True
                    raise error
                yield torch.stack([answer(entry) for entry in chunk])
        finally:
            ended.append(True)

    ends = build_on(2, make_store(tmp_path), entries(COUNT), encode)
    assert [str(end) for end in ends] == ["picture cannot be read\n  in picture 100"] * 2
    assert not any(end.of_one_rank for end in ends), "rank 0 has it too, and says it"
    assert len(ended) == 2
    assert not list(make_store(tmp_path).folder.glob(".*")), "neither plan nor temp file is left"


def test_a_full_disk_ends_the_build_and_keeps_what_is_done(tmp_path: Path, whole: dict[str, bytes], monkeypatch):
    store, encoder, real, calls = make_store(tmp_path / "full"), Encoder(tmp_path / "log"), os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFailed, match="No space left on device; a restart encodes only"):
            build_alone(store, entries(COUNT), encoder)
    assert not list(store.folder.glob(".*"))
    assert 0 < len(shards(store)) < len(whole) - 1
    build_alone(store, entries(COUNT), encoder)
    assert files(store) == whole
    assert len(encoder.noted()) - COUNT <= SHARD


def test_a_shard_that_cannot_be_written_at_once_is_tried_again(tmp_path: Path, whole: dict[str, bytes], monkeypatch):
    monkeypatch.setattr("trainer.cached.store.PAUSES_SECONDS", (0.0, 0.0))
    real, calls = os.replace, []

    def flaky(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) in (4, 5):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "replace", flaky)
    store = make_store(tmp_path / "flaky")
    build_alone(store, entries(COUNT), Encoder(tmp_path / "log"))
    assert files(store) == whole


def test_what_does_not_fit_on_the_disk_is_refused_before_anything_is_encoded(tmp_path: Path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    store, encoder = make_store(tmp_path), Encoder(tmp_path / "log")
    with pytest.raises(UserError, match=r"the cache needs 14\d\.\d KiB more; 97\.7 KiB are free"):
        build_alone(store, entries(COUNT), encoder)
    assert encoder.noted() == []


def test_a_build_says_what_is_to_come_how_far_it_is_and_how_it_went(tmp_path: Path, monkeypatch):
    store = make_store(tmp_path)
    build_alone(store, entries(100), Encoder(tmp_path / "log"))
    monkeypatch.setattr(building, "SAID_EVERY_SECONDS", 0.0)
    _, said = build_alone(store, entries(COUNT), Encoder(tmp_path / "log"))
    assert said[0].startswith("cache  500 entries = 100 kept + 400 to encode, in 8 shards of 11")
    assert "are free in" in said[0]
    assert said[1].startswith("cache  32 of 400 encoded, ")
    assert said[1].endswith(" s to go")
    assert said[-1].startswith("cache  400 encoded in 0 s, ")


def test_a_small_build_is_cut_so_that_every_rank_has_its_share(tmp_path: Path):
    wanted = [Wanted(key(index), (1, 2), index) for index in range(2048)]
    store, ranks = make_store(tmp_path), Alone()
    build(store, wanted, Encoder(tmp_path / "log"), ranks)
    assert len(shards(store)) == building.SHARDS == 2048 // CHUNK


def test_an_entry_larger_than_a_shard_has_one_of_its_own(tmp_path: Path):
    store = make_store(tmp_path)
    build_alone(
        store, [Wanted(key(index), SHAPE, index) for index in range(5)], Encoder(tmp_path / "log"), shard_bytes=9
    )
    assert len(shards(store)) == 5


def test_nothing_wanted_is_nothing_built(tmp_path: Path):
    store = make_store(tmp_path)
    assert build_on(2, store, [], Encoder(tmp_path / "log")) == [0, 0]
    assert len(Lookup(write_indexed(store, []))) == 0


def test_a_folder_that_cannot_be_made_is_refused_on_every_rank(tmp_path: Path):
    (tmp_path / "file").touch()
    ends = build_on(2, make_store(tmp_path / "file"), entries(9), Encoder(tmp_path / "log"))
    assert all(isinstance(end, UserError) and "no cache can be kept here" in str(end) for end in ends)


def test_shards_hold_no_more_than_they_may(whole: dict[str, bytes]):
    assert all(len(data) <= SHARD_BYTES + 512 for data in whole.values())
