"""What a store hands out is what was put in, or an error that says where and what to do."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from builds import SHAPE, Encoder, answer, build_alone, entries, files, flip, in_a_process, key, make_store, shards
from safetensors import safe_open

from trainer.cached.lookup import KEPT, Lookup, write_indexed, write_keyed
from trainer.cached.store import DTYPES, Store, verify_store
from trainer.cached.tensor_files import DamagedError, map_tensors
from trainer.errors import UserError

COUNT = 200


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = make_store(tmp_path)
    build_alone(store, entries(COUNT), Encoder(tmp_path / "log"))
    return store


def keys(count: int = COUNT) -> list[bytes]:
    return [entry.key for entry in entries(count)]


def errors(lookup: Lookup) -> list[UserError]:
    """What reading each entry raises."""
    found = []
    for index in range(len(lookup)):
        try:
            lookup.at(index)
        except UserError as error:
            found.append(error)
    return found


def holds(read: Callable[..., torch.Tensor], *name: Any) -> bool:
    """Whether a lookup's `at` or `of` finds an entry."""
    try:
        read(*name)
    except KeyError:
        return False
    return True


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_entry_rounded_to_the_dtype_of_the_store(tmp_path: Path, dtype: str):
    store = make_store(tmp_path, dtype)
    build_alone(store, entries(70), Encoder(tmp_path / "log"))
    lookup = Lookup(write_indexed(store, keys(70)))
    for entry in entries(70):
        row = lookup.at(entry.index)
        assert row.dtype == torch.float32
        assert torch.equal(row, answer(entry).to(DTYPES[dtype][1]).float())
        row += 1  # in memory of its own
        assert row.shape == entry.shape
    assert torch.equal(lookup.at(3), answer(entries(70)[3]).to(DTYPES[dtype][1]).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shard_is_a_safetensors_file_like_any_other(tmp_path: Path, dtype: str):
    store = make_store(tmp_path, dtype)
    build_alone(store, entries(40), Encoder(tmp_path / "log"))
    for path in shards(store):
        with safe_open(str(path), framework="pt") as file:
            assert file.metadata() == {"dtype": dtype, "format": "1", "recipe": store.recipe}
            payload, crc32 = file.get_tensor("payload"), file.get_tensor("crc32")
            names = [row.numpy().tobytes() for row in file.get_tensor("keys")]
        assert payload.dtype == DTYPES[dtype][1]
        assert len(payload) == len(crc32) == len(names)
        for name, row in zip(names, payload, strict=True):
            entry = next(entry for entry in entries(40) if entry.key == name)
            assert torch.equal(row, answer(entry).to(row.dtype))


def test_the_recipe_is_there_in_the_clear(store: Store):
    assert json.loads((store.folder / "recipe.json").read_text()) == {
        "vae": "0" * 64,
        "transform": 1,
        "format": 1,
        "dtype": "fp16",
    }
    assert store.folder.name == f"moments-{store.recipe[:16]}"


def test_a_lookup_by_index_knows_variants_and_what_is_absent(store: Store):
    every = keys()
    lookup = Lookup(write_indexed(store, [every[0], every[1], None, every[3], every[4], None], variants=2))
    assert len(lookup) == 3
    assert [[holds(lookup.at, index, variant) for variant in (0, 1)] for index in range(3)] == [
        *([True, True], [False, True], [True, False])
    ]
    assert torch.equal(lookup.at(1, 1), answer(entries(COUNT)[3]).half().float())
    with pytest.raises(KeyError):
        lookup.at(1, 0)


def test_a_lookup_by_key_finds_every_entry_and_no_other(store: Store):
    lookup = Lookup(write_keyed(store, [*keys(), *keys(9)]))
    assert len(lookup) == COUNT
    for entry in entries(COUNT):
        assert holds(lookup.of, entry.key)
        assert torch.equal(lookup.of(entry.key), answer(entry).half().float())
    assert not holds(lookup.of, key(0, 1))
    with pytest.raises(KeyError):
        lookup.of(b"\xff" * 16)


def test_keys_are_bytes_and_may_hold_any(tmp_path: Path):
    from trainer.cached.build import Wanted

    odd = [bytes(16), b"\0" * 15 + b"\1", b"\1" + b"\0" * 15, b"\xff" * 16, b"a" + bytes(14) + b"b", b"a" * 15 + b"\0"]
    store = make_store(tmp_path)
    build_alone(store, [Wanted(name, SHAPE, index) for index, name in enumerate(odd)], Encoder(tmp_path / "log"))
    by_key, by_index = Lookup(write_keyed(store, odd)), Lookup(write_indexed(store, odd))
    for index, name in enumerate(odd):
        expected = answer(Wanted(name, SHAPE, index)).half().float()
        assert torch.equal(by_key.of(name), expected)
        assert torch.equal(by_index.at(index), expected)
    assert not holds(by_key.of, b"a" * 14 + b"\0\0")
    with_absent = Lookup(write_indexed(store, [*odd, None]))
    assert not holds(with_absent.at, len(odd)), "absent, although a key of zeros is kept"


def test_a_key_that_is_not_kept_is_refused(store: Store):
    with pytest.raises(UserError, match="1 entries are no longer in the cache"):
        write_indexed(store, [*keys(), key(0, 1)])


def test_each_flipped_bit_of_a_row_is_found_when_it_is_read(store: Store):
    path = shards(store)[0]
    whole = path.read_bytes()
    shard = store.shard(path.name)
    count, size = len(shard), len(whole)
    for at in (size - 1, size - 257, size - count * 256):
        flip(path, at)
        (error,) = errors(Lookup(write_indexed(store, keys())))
        assert error.where == str(path)
        assert f"row {(at - size) // 256 + count} is not what was written" in error.what
        assert "delete that file and start again" in str(error.fix)
        path.write_bytes(whole)


def test_deleting_a_damaged_shard_is_the_cure(tmp_path: Path, store: Store):
    before = files(store)
    flip(shards(store)[1], -1)
    shards(store)[1].unlink()
    build_alone(store, entries(COUNT), Encoder(tmp_path / "log"))
    assert files(store) == before


def test_no_bit_of_a_shard_flips_unseen(tmp_path: Path):
    store = make_store(tmp_path)
    build_alone(store, entries(30), Encoder(tmp_path / "log"))
    path, other = shards(store)
    whole = path.read_bytes()
    places = {*range(600), *range(600, len(whole), 97)}
    for at in sorted(places):
        flip(path, at)
        faults = dict(verify_store(store.folder, print))
        assert faults[path.name] is not None, f"byte {at} of {len(whole)}"
        assert faults[other.name] is None
        path.write_bytes(whole)
    assert set(dict(verify_store(store.folder, print)).values()) == {None}


def test_verify_refuses_a_folder_that_is_no_cache_or_has_another_recipe(tmp_path: Path, store: Store):
    with pytest.raises(UserError, match="this is no cache"):
        list(verify_store(tmp_path, print))
    flip(store.folder / "recipe.json", 12)
    with pytest.raises(UserError, match="delete that file"):
        list(verify_store(store.folder, print))
    store.create()
    assert len(list(verify_store(store.folder, print))) == len(shards(store))


def test_a_shard_under_the_name_of_another_is_not_read(store: Store):
    lookup = Lookup(write_indexed(store, keys()))
    first, second = shards(store)[:2]
    first.write_bytes(second.read_bytes())
    assert dict(verify_store(store.folder, print))[first.name] == "its keys are not those that its name is made of"
    assert {error.what for error in errors(lookup)} == {
        "the cache is damaged: its keys are not those that its name is made of"
    }


def test_a_shard_that_is_gone_is_named(store: Store):
    lookup = Lookup(write_indexed(store, keys()))
    gone = shards(store)[0]
    gone.unlink()
    assert {error.where for error in errors(lookup)} == {str(gone)}


def test_a_damaged_lookup_is_not_used(store: Store):
    path = write_indexed(store, keys())
    flip(path, -5)
    with pytest.raises(UserError, match="start again: it is written anew"):
        Lookup(path)
    assert write_indexed(store, keys()) == path
    assert len(Lookup(path)) == COUNT


def test_the_same_lookup_has_the_same_name_whatever_else_is_kept(tmp_path: Path, store: Store):
    path = write_indexed(store, keys())
    build_alone(store, entries(COUNT, changed=range(90)), Encoder(tmp_path / "log"))
    assert write_indexed(store, keys()) == path


def test_old_lookups_go_but_for_those_in_use(store: Store):
    used = Lookup(write_indexed(store, keys(50)))
    unused = write_indexed(store, keys(51))
    for path, age in ((used.path, 90), (unused, 80)):
        os.utime(path, (0, path.stat().st_mtime - age))
    for count in range(60, 60 + KEPT):
        write_indexed(store, keys(count))
    assert used.path.exists()
    assert not unused.exists()
    path = used.path
    del used
    write_indexed(store, keys(99))
    assert not path.exists()
    assert len(list(path.parent.iterdir())) == KEPT


def rows(lookup: Lookup) -> list[torch.Tensor]:
    return [lookup.at(index) for index in range(len(lookup))]


def read_in_a_process(lookup: Lookup, pipe) -> None:
    pipe.send(b"".join(row.numpy().tobytes() for row in rows(lookup)))
    pipe.close()


@pytest.mark.parametrize(
    ("method", "opened"), [("fork", False), ("fork", True), pytest.param("spawn", True, marks=pytest.mark.slow)]
)
def test_a_lookup_is_read_in_other_processes(store: Store, method: str, opened: bool):
    lookup = Lookup(write_indexed(store, keys()))
    if opened:
        rows(lookup)
    context = cast(SpawnContext, multiprocessing.get_context(method))  # for its names: BaseContext has none
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=read_in_a_process, args=(lookup, there), daemon=True)
    process.start()
    assert here.poll(60)
    assert here.recv() == b"".join(row.numpy().tobytes() for row in rows(lookup))
    process.join(60)


def test_a_lookup_pickles_as_little_more_than_its_path(store: Store):
    lookup = Lookup(write_indexed(store, keys()))
    rows(lookup)
    assert len(pickle.dumps(lookup)) < 600
    again = rows(pickle.loads(pickle.dumps(lookup)))  # all that a spawned process is given
    assert len(again) == COUNT
    assert all(torch.equal(one, other) for one, other in zip(again, rows(lookup), strict=True))


def test_open_shards_hold_no_file_descriptors(store: Store):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system does not list a process's descriptors")
    lookup = Lookup(write_indexed(store, keys()))
    before = len(os.listdir("/proc/self/fd"))
    rows(lookup)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"1234567", bytes(8), (2**60).to_bytes(8, "little") + b"{}"),
        *((2).to_bytes(8, "little") + text for text in (b"{}", b"[]", b"\xff{", b"1 ")),
        (4).to_bytes(8, "little") + b'{"a"',
    ],
)
def test_a_file_that_is_no_safetensors_counts_as_damaged(tmp_path: Path, content: bytes):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DamagedError):
        map_tensors(tmp_path / "file")


def test_a_lock_is_not_inherited_by_a_forked_worker(store: Store, tmp_path: Path):
    import time

    with store.locked(print):
        process = in_a_process(lambda: time.sleep(60))
    said = []
    with store.locked(said.append):
        pass
    process.kill()
    assert said == []


def test_a_lock_that_cannot_be_had_is_refused(store: Store):
    (store.folder / "lock").unlink()
    (store.folder / "lock").mkdir()
    with pytest.raises(UserError, match="nothing can be added to the cache"), store.locked(print):
        pass


def test_contents_find_what_is_kept(store: Store):
    contents = store.survey(print)
    wanted = np.frombuffer(b"".join([*keys(3), key(0, 1)]), "S16")
    assert (contents.find(wanted) == 2**64 - 1).tolist() == [False, False, False, True]
