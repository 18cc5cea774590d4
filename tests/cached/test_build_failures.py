"""An error, a value or a disk that ends a build is told on every rank, and what is done is kept."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest
import torch
from builds import COUNT, SHARD, Encoder, answer, build_alone, build_on, entries, files, make_store, shards

from trainer.errors import StorageFailed, UserError


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


def test_what_does_not_fit_on_the_disk_is_refused_before_encoding(tmp_path: Path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    store, encoder = make_store(tmp_path), Encoder(tmp_path / "log")
    with pytest.raises(UserError, match=r"the cache needs 14\d\.\d KiB more; 97\.7 KiB are free"):
        build_alone(store, entries(COUNT), encoder)
    assert encoder.noted() == []


def test_a_folder_that_cannot_be_made_is_refused_on_every_rank(tmp_path: Path):
    (tmp_path / "file").touch()
    ends = build_on(2, make_store(tmp_path / "file"), entries(9), Encoder(tmp_path / "log"))
    assert all(isinstance(end, UserError) and "no cache can be kept here" in str(end) for end in ends)
