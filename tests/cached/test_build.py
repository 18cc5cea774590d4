"""A build encodes once what is not kept, into the same shards on any number of ranks, and says how it goes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from builds import (
    COUNT,
    SHAPE,
    SHARD,
    SHARD_BYTES,
    Alone,
    Encoder,
    answer,
    build_alone,
    build_on,
    entries,
    files,
    flip,
    key,
    make_store,
    shards,
)

from trainer.cached import build as building
from trainer.cached.build import CHUNK, Wanted, build
from trainer.cached.lookup import Lookup, write_indexed
from trainer.cached.store import verify_store
from trainer.data.record import silent


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


def test_another_recipe_reads_nothing_of_this_one(tmp_path: Path):
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


def test_a_shard_with_a_damaged_row_is_built_again_once_it_is_deleted(tmp_path: Path):
    store, encoder = make_store(tmp_path), Encoder(tmp_path / "log")
    build_alone(store, entries(COUNT), encoder)
    before = files(store)
    flip(shards(store)[1], -300)
    assert build_alone(store, entries(COUNT), encoder)[0] == 0
    (damaged,) = [name for name, fault in verify_store(store.folder, silent) if fault is not None]
    (store.folder / damaged).unlink()
    assert 0 < build_alone(store, entries(COUNT), encoder)[0] <= SHARD
    assert files(store) == before


def test_a_build_says_what_is_to_come_how_far_it_is_and_how_it_went(tmp_path: Path, monkeypatch):
    store = make_store(tmp_path)
    build_alone(store, entries(100), Encoder(tmp_path / "log"))
    monkeypatch.setattr(building, "SAID_EVERY_SECONDS", 0.0)
    _, said = build_alone(store, entries(COUNT), Encoder(tmp_path / "log"))
    assert said[0].startswith("cache  500 entries = 100 kept + 400 to encode, in 8 shards of 11")
    assert "are free in" in said[0]
    assert said[1].startswith("cache  32 of 400 encoded, ")
    assert said[1].endswith(" s to go")
    assert re.match(r"cache  400 encoded in \d+ s, ", said[-1])


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


def test_shards_hold_no_more_than_they_may(whole: dict[str, bytes]):
    assert all(len(data) <= SHARD_BYTES + 512 for data in whole.values())
