"""Shards in an object store: read through the real client from a server that speaks S3, also in forked workers."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_sources_agree import CAPTIONS, held, write_folder, write_shards

from trainer.data import shards
from trainer.data.record import Records, Source
from trainer.data.shards import Storage
from trainer.data.sources.webdataset import WebDatasetRecords
from trainer.errors import UserError

BUCKET = "pictures"

pytestmark = pytest.mark.usefixtures("fresh_shard_cache")


@pytest.fixture
def bucket(client: Any, tmp_path: Path) -> Iterator[Path]:
    """The folder whose pictures lie in the bucket as `0000.tar` and `0001.tar`."""
    folder = write_folder(tmp_path / "folder")
    write_shards(tmp_path / "shards", folder)
    for path in sorted((tmp_path / "shards").iterdir()):
        client.put(str(path), f"{BUCKET}/{path.name}")
    yield folder
    client.rm(f"{BUCKET}/*")


def source(endpoint: str, **fields: Any) -> Source:
    section = {
        "kind": "webdataset",
        "image_size": 32,
        "shards": f"s3://{BUCKET}/{{0000..0001}}.tar",
        "storage_options": {"endpoint_url": endpoint},
    }
    return Source.parse(section | fields)


def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that are asked of the server from now on, in this process."""
    ranges: list[tuple[int, int]] = []
    real = Storage.read_range

    def counted(self: Storage, shard: Any, start: int, length: int) -> bytes:
        ranges.append((start, length))
        return real(self, shard, start, length)

    monkeypatch.setattr(Storage, "read_range", counted)
    return ranges


def test_shards_in_s3_hold_the_records_of_the_folder(endpoint, bucket):
    folder = Source.parse({"kind": "imagefolder", "data_root": str(bucket), "image_size": 32}).open()
    records = source(endpoint).open()
    assert held(records) == held(folder)
    assert records.fingerprint() == folder.fingerprint()
    assert records.where(0) == f"s3://{BUCKET}/0000.tar: a.png"


def test_a_second_start_reads_no_shard(endpoint, bucket, monkeypatch):
    first = source(endpoint).open()
    ranges = asked(monkeypatch)
    records = source(endpoint).open()
    assert list(records.looks()) == list(first.looks())
    assert ranges == []
    data = records.data(1)
    assert data is not None
    assert [length for _, length in ranges] == [len(data)]


class Reading:
    """A data set for a DataLoader; records are opened before its workers start, and have been read in the parent."""

    def __init__(self, records: Records):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        return self.records[index].key, self.records.image(index).tobytes(), os.getpid()


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_workers_read_from_s3_after_their_parent_did(endpoint, bucket, start):
    from torch.utils.data import DataLoader

    records = source(endpoint).open()
    want = [(records[i].key, records.image(i).tobytes()) for i in range(len(records))]
    loader = DataLoader(Reading(records), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=60)  # pyright: ignore[reportArgumentType]
    got = list(loader)
    assert [(key, data) for key, data, _ in got] == want
    assert len({pid for _, _, pid in got} - {os.getpid()}) == 2


def test_reading_a_shard_that_changed_since_the_index_is_refused(endpoint, bucket, client, tmp_path):
    records = source(endpoint).open()
    path = tmp_path / "shards" / "0000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT")] ^= 1
    client.pipe(f"{BUCKET}/0000.tar", bytes(data))
    with pytest.raises(UserError, match=r"changed since it was indexed: it was \"?.* and is") as error:
        records.image(0)
    assert error.value.where == f"s3://{BUCKET}/0000.tar"
    client.pipe(f"{BUCKET}/0001.tar", (tmp_path / "shards" / "0001.tar").read_bytes()[:2048])
    with pytest.raises(UserError, match="bytes and has 2,048"):
        records.image(4)


def test_only_a_changed_shard_is_indexed_anew(endpoint, bucket, client, tmp_path, monkeypatch):
    source(endpoint).open()
    ranges = asked(monkeypatch)
    shard = (tmp_path / "shards" / "0001.tar").read_bytes()
    client.pipe(f"{BUCKET}/0001.tar", shard + bytes(512))
    assert len(source(endpoint).open()) == len(CAPTIONS)
    assert ranges == [(0, len(shard) + 512)]


def test_a_missing_shard_or_bucket_is_refused_by_its_url(endpoint, bucket):
    for url in (f"s3://{BUCKET}/gone.tar", "s3://no-such-bucket/a.tar"):
        with pytest.raises(UserError, match="does not exist") as error:
            source(endpoint, shards=url).open()
        assert error.value.where == url


def test_no_credentials_is_one_line_that_says_where_they_come_from(endpoint, bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    # A file system that another test opened has its credentials already.
    shards.forget_connections()
    with pytest.raises(UserError, match=r"may not be read\n.*\n.*AWS_ACCESS_KEY_ID .*anon: true"):
        source(endpoint).open()
    shards.forget_connections()


def test_a_server_that_does_not_answer_is_asked_five_times(endpoint, capfd, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client's own, below ours
    shards.forget_connections()
    with pytest.raises(UserError, match="cannot be read after 5 attempts") as error:
        source("http://127.0.0.1:9", storage_options={"endpoint_url": "http://127.0.0.1:9"}).open()
    assert error.value.where == f"s3://{BUCKET}/0000.tar"
    assert "attempt 5 of 5 in 0.008 s" in capfd.readouterr().err


def cached(endpoint: str, tmp_path: Path, limit: int, **fields: Any) -> Any:
    return source(endpoint, shard_cache_dir=str(tmp_path / "kept"), shard_cache_bytes=limit, **fields).open()


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "kept").iterdir() if not path.name.endswith("lock"))


def size(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "kept").iterdir())


def test_shards_that_fit_are_read_from_disk_after_one_fetch(endpoint, bucket, tmp_path, monkeypatch):
    plain = source(endpoint).open()
    ranges = asked(monkeypatch)
    records = cached(endpoint, tmp_path, 10**9)
    assert held(records) == held(plain)
    asked_by_cache = [each for each in ranges if each[0] == 0]
    assert len(kept(tmp_path)) == 2
    ranges.clear()
    assert [records.data(i) for i in range(len(records))]
    assert ranges == []
    assert len(asked_by_cache) == 2


def test_reading_from_a_kept_shard_notes_the_time(endpoint, bucket, tmp_path):
    records = cached(endpoint, tmp_path, 10**9)
    want = records.data(0)
    for name in kept(tmp_path):
        os.utime(tmp_path / "kept" / name, (1_600_000_000, 1_600_000_000))
    assert [records.data(0), records.data(4)] != [want, want]
    assert all((tmp_path / "kept" / name).stat().st_mtime > 1_700_000_000 for name in kept(tmp_path))


def test_a_kept_shard_of_another_size_is_fetched_again(endpoint, bucket, tmp_path):
    records = cached(endpoint, tmp_path, 10**9)
    want = records.data(0)
    for name in kept(tmp_path):
        os.truncate(tmp_path / "kept" / name, 100)
    assert records.data(0) == want
    assert max((tmp_path / "kept" / name).stat().st_size for name in kept(tmp_path)) > 100


def test_what_is_kept_never_takes_more_than_the_limit(endpoint, bucket, tmp_path):
    sizes = [path.stat().st_size for path in sorted((tmp_path / "shards").iterdir())]
    records = cached(endpoint, tmp_path, max(sizes))
    want = [records.data(i) for i in range(len(records))]
    assert want == [source(endpoint).open().data(i) for i in range(len(records))]
    assert len(kept(tmp_path)) == 1
    assert size(tmp_path) <= max(sizes)
    nothing = cached(endpoint, tmp_path / "small", min(sizes) - 1)
    assert [nothing.data(i) for i in range(len(nothing))] == want
    assert not (tmp_path / "small" / "kept").exists()


def test_the_least_recently_used_shards_of_earlier_runs_make_room(endpoint, bucket, client, tmp_path):
    data = [path.read_bytes() for path in sorted((tmp_path / "shards").iterdir())]
    urls = [f"s3://{BUCKET}/{number}.tar" for number in range(4)]
    for number, url in enumerate(urls):
        client.pipe(url, data[0] + bytes(512 * number))  # other sizes, and so other files
    limit = 3 * (len(data[0]) + 3 * 512)
    names = []
    for age, url in zip((3000, 1000, 2000), urls[:3], strict=True):
        records = cached(endpoint, tmp_path, limit, shards=url)
        records.data(0)
        (new,) = set(kept(tmp_path)) - set(names)
        names.append(new)
        stamp = os.stat(tmp_path / "kept" / new).st_mtime - age
        os.utime(tmp_path / "kept" / new, (stamp, stamp))
    cached(endpoint, tmp_path, limit, shards=urls[3]).data(0)
    assert names[0] not in kept(tmp_path)
    assert {names[1], names[2]} < set(kept(tmp_path))
    assert size(tmp_path) <= limit


def fetch(records: Any, results: Any) -> None:
    results.put([records.data(index) for index in range(len(records))])


def test_several_processes_share_the_kept_shards_and_the_limit(endpoint, bucket, tmp_path):
    plain = source(endpoint).open()
    want = [plain.data(i) for i in range(len(plain))]
    limit = max(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    assert isinstance(plain, WebDatasetRecords)
    storage = Storage({"endpoint_url": endpoint}, str(tmp_path / "kept"), limit)
    records = WebDatasetRecords(plain.index, plain.shards, storage, plain.max_pixels)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=fetch, args=(records, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [results.get() for _ in workers] == [want] * 4
    for worker in workers:
        worker.join()
    assert size(tmp_path) <= limit
    assert not [name for name in kept(tmp_path) if name.endswith(".part")]


def test_a_shard_that_changed_before_it_was_fetched_is_not_kept(endpoint, bucket, client, tmp_path):
    plain = source(endpoint).open()
    assert isinstance(plain, WebDatasetRecords)
    data = bytearray((tmp_path / "shards" / "0000.tar").read_bytes())
    data[data.index(b"IDAT")] ^= 1
    client.pipe(f"{BUCKET}/0000.tar", bytes(data))
    storage = Storage({"endpoint_url": endpoint}, str(tmp_path / "kept"), 10**9)
    records = WebDatasetRecords(plain.index, plain.shards, storage, plain.max_pixels)
    with pytest.raises(UserError, match="changed since it was indexed"):
        records.image(0)
    assert kept(tmp_path) == []


def test_a_half_fetched_shard_of_a_killed_process_is_fetched_again(endpoint, bucket, tmp_path):
    records = cached(endpoint, tmp_path, 10**9)
    for name in kept(tmp_path):
        path = tmp_path / "kept" / name
        path.with_name(f"{name}.part").write_bytes(path.read_bytes()[:100])
        path.unlink()
    (tmp_path / "kept" / f"{'0' * 32}.shard.part").write_bytes(b"x" * 100)
    assert held(records) == held(source(endpoint).open())
    assert [name.endswith(".shard") for name in kept(tmp_path)] == [True, True]


def test_records_stay_small_to_pickle(endpoint, bucket):
    records = source(endpoint).open()
    again = pickle.loads(pickle.dumps(records))
    assert held(again) == held(records)
    assert len(pickle.dumps(records)) < 2000
