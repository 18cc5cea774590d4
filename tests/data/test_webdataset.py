"""Tar shards are indexed in one pass, read by range, never unpacked, and whatever is wrong with one is told by name."""

from __future__ import annotations

import errno
import hashlib
import http.server
import io
import json
import os
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from trainer.data import shards as storage
from trainer.data import tar_members
from trainer.data.record import Source
from trainer.data.shards import SourceError
from trainer.data.sources import webdataset
from trainer.data.sources.webdataset import WebDatasetRecords, expanded
from trainer.errors import UserError


def png(colour: str = "red", size: tuple[int, int] = (4, 4), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **header: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in header.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def write(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            add(tar, name, data)
    return path


def open_shards(shards: Any, **fields: Any) -> WebDatasetRecords:
    section = {"kind": "webdataset", "image_size": 32, "shards": str(shards) if isinstance(shards, Path) else shards}
    records = Source.parse(section | fields).open()
    assert isinstance(records, WebDatasetRecords)
    return records


def refusal(path: Path, **fields: Any) -> str:
    with pytest.raises(UserError) as error:
        open_shards(path, **fields)
    return str(error.value)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.01)


def old(path: Path, seconds: int = 1_600_000_000) -> Path:
    os.utime(path, (seconds, seconds))
    return path


# What a sample is


def test_members_with_one_name_up_to_the_first_dot_are_one_sample(tmp_path):
    path = write(
        tmp_path / "a.tar",
        {
            "set.one/x.png": png("red"),
            "set.one/x.txt": b"a red one\n\n a second caption \n",
            "y.txt": b"first comes its caption",
            "y.seg.png": png("green"),
            "y.jpg": png("blue"),
            "z.cls": b"7",
            "only.json": b"{}",
            ".hidden.png": png(),
        },
    )
    records = open_shards(path)
    assert [records[i].key for i in range(len(records))] == ["set.one/x.png", "y.jpg"]
    assert [records[i].captions for i in range(2)] == [("a red one", "a second caption"), ("first comes its caption",)]
    assert records.image(1).getpixel((0, 0)) == (0, 0, 255)
    assert records.where(1) == f"{path}: y.jpg"


def test_a_caption_may_stand_far_from_its_picture(tmp_path):
    many = {f"{n}.png": png() for n in range(40)} | {f"{n}.txt": f"caption {n}".encode() for n in reversed(range(40))}
    records = open_shards(write(tmp_path / "a.tar", many))
    assert [records[i].captions for i in range(40)] == [(f"caption {n}",) for n in range(40)]


JSON_CAPTIONS = {
    "a string": ({"text": "a cat"}, None, ("a cat",), None),
    "a list": ({"text": ["a", "b"]}, None, ("a", "b"), None),
    "json goes before txt": ({"text": "a"}, "b", ("a",), None),
    "txt where json has no such column": ({"width": 3}, "b", ("b",), None),
    "txt where json has null": ({"text": None}, "b", ("b",), None),
    "null alone": ({"text": None, "other": 1}, None, ("",), "there is no caption"),
    "an empty list": ({"text": []}, None, ("",), "there is no caption"),
    "a number": ({"text": 7}, "b", ("",), "'text' of .json is 7, not a string"),
    "a number in a list": ({"text": ["a", 7]}, None, ("",), "'text' of .json is 7, not a string"),
    "not an object": ([1], None, ("",), ".json holds [1] where an object is needed"),
    "another column": ({"txt": "x"}, None, ("",), "no column 'text'; .json has 'txt': set data.caption_column=txt?"),
    "half of a pair": ({"text": "\ud83d"}, None, ("",), "it holds half of a surrogate pair"),
    "half of a pair beside another": (
        {"text": ["a", "\ud83d", "b"]},
        None,
        ("a", "b"),
        "1 of its 3 captions cannot be used: it holds half of a surrogate pair",
    ),
    "one of several is empty": ({"text": ["", "a"]}, None, ("a",), "1 of its 2 captions cannot be used"),
    "all are empty": ({"text": ["", " "]}, None, ("",), "2 of its 2 captions cannot be used: the caption is empty"),
}


@pytest.mark.parametrize("case", JSON_CAPTIONS)
def test_captions_come_from_json_or_else_from_txt(tmp_path, case):
    values, text, captions, fault = JSON_CAPTIONS[case]
    members = {"z.png": png(), "z.txt": b"whole", "a.png": png(), "a.json": json.dumps(values).encode()}
    if text is not None:
        members["a.txt"] = text.encode()
    records = open_shards(write(tmp_path / "a.tar", members))
    assert records[1].captions == captions
    faults = list(records.caption_faults())
    assert (fault is None) == (faults == [])
    if fault:
        ((index, told),) = faults
        assert index == 1
        assert told.startswith(f"{tmp_path}/a.tar: 'a.png': ")
        assert fault in told


def test_bad_captions_are_told_record_by_record_and_never_read_without_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_CAPTION_BYTES", 100)
    members = {
        "a.png": png(),
        "b.png": png(),
        "b.json": b"{",
        "c.png": png(),
        "c.json": b"[" * 99,
        "d.png": png(),
        "d.txt": b"caf\xe9",
        "e.png": png(),
        "e.txt": b"x" * 101,
        "f.png": png(),
        "f.txt": b"fine",
    }
    records = open_shards(write(tmp_path / "a.tar", members))
    assert [records[i].captions for i in range(6)] == [("",)] * 5 + [("fine",)]
    faults = [told for _, told in records.caption_faults()]
    wanted = ["there is no caption", "not JSON", "JSON", "byte 0xe9 is not UTF-8", "over 100 bytes"]
    assert len(faults) == len(wanted)
    assert all(want in fault for want, fault in zip(wanted, faults, strict=True))


def test_a_column_that_no_record_has_is_refused_with_the_near_one(tmp_path):
    members = {"a.png": png(), "a.json": b'{"caption": "x", "url": "y"}', "b.png": png(), "b.json": b'{"caption": "z"}'}
    path = write(tmp_path / "a.tar", members)
    assert "no column 'captoin'; .json has 'caption', 'url': set data.caption_column=caption?" in refusal(
        path, caption_column="captoin"
    )
    assert open_shards(path, caption_column="caption")[0].captions == ("x",)


def test_two_pictures_of_one_sample_are_refused(tmp_path):
    told = refusal(write(tmp_path / "a.tar", {"a.png": png(), "a.jpg": png()}))
    assert "'a.png' and 'a.jpg' are pictures of one sample" in told


def test_a_name_in_two_shards_is_refused_naming_both(tmp_path):
    one, two = (write(tmp_path / f"{n}.tar", {f"{n}.png": png(), "x.png": png()}) for n in (1, 2))
    with pytest.raises(UserError, match=f"'x.png' is in '{one}' and in '{two}'"):
        open_shards([str(one), str(two)])


def test_a_name_that_is_not_utf8_and_a_shard_without_pictures_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        add(tar, "caf\udce9.png", png())
    assert "is not UTF-8" in refusal(path)
    assert "hold no picture" in refusal(write(tmp_path / "b.tar", {"a.txt": b"x"}))


# Which shards


def test_braces_count_with_their_zeros_and_several_multiply():
    assert list(expanded("a-{008..011}.tar")) == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert list(expanded("{0..1}/{1..2}")) == ["0/1", "0/2", "1/1", "1/2"]
    assert list(expanded("plain {} {a,b}")) == ["plain {} {a,b}"]
    for wrong in ("{5..2}", "{0..99999999}", "{0..9999}{0..9999}"):
        with pytest.raises(UserError):
            expanded(wrong)


def test_shards_come_in_the_order_they_are_named_and_a_star_by_name(tmp_path):
    for name in "cab":
        write(tmp_path / f"{name}.tar", {f"{name}.png": png()})
    named = open_shards([f"{tmp_path}/c.tar", f"{tmp_path}/a.tar"])
    assert [named[i].key for i in range(2)] == ["c.png", "a.png"]
    starred = open_shards(f"{tmp_path}/*.tar")
    assert [starred[i].key for i in range(3)] == ["a.png", "b.png", "c.png"]
    with pytest.raises(UserError, match="no file is called"):
        open_shards(f"{tmp_path}/*.gone")
    with pytest.raises(UserError, match="is named twice"):
        open_shards([f"{tmp_path}/*.tar", f"{tmp_path}/a.tar"])
    with pytest.raises(UserError, match="No such file"):
        open_shards(f"{tmp_path}/gone.tar")


REFUSED = {
    "a pipe": ("pipe:cat /etc/passwd", "would run a command"),
    "a pipe in a list": (["a.tar", "pipe:curl http://x"], "would run a command"),
    "another protocol": ("ftp://host/a.tar", "is not read; a path, s3://"),
    "a chain": ("simplecache::s3://b/a.tar", "is not read"),
    "a chain behind an allowed one": ("s3://b/a::file:///etc/passwd", "is not read"),
    "gzip": ("a.tar.gz", "is compressed: unpack it"),
    "tgz": ("s3://b/a.tgz", "is compressed"),
    "zstd": ("a.tar.zst", "is compressed"),
    "a password": ("https://me:secret@host/a.tar", "user or password"),
    "a signature": ("https://host/a.tar?X-Amz-Signature=abc", "signed"),
    "nothing": ([], "no shard is named"),
    "an empty name": ("", "no shard is named"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_shard_is_refused_before_anything_is_opened(case):
    shards, reason = REFUSED[case]
    with pytest.raises(ValidationError, match=reason):
        open_shards(shards)


def test_a_star_in_a_url_is_refused():
    with pytest.raises(UserError, match="count them with braces"):
        open_shards("s3://bucket/*.tar")


@pytest.mark.parametrize(
    "name", ["key", "secret", "aws_secret_access_key", "token", "session_token", "Password", "sas_token", "account_key"]
)
def test_secrets_are_refused_in_storage_options_with_the_place_where_they_belong(name):
    with pytest.raises(ValidationError, match="AWS_SECRET_ACCESS_KEY in the environment") as error:
        open_shards("s3://b/a.tar", storage_options={name: "hunter2"})
    assert "looks like a secret" in str(error.value)
    with pytest.raises(ValidationError, match="user or password"):
        open_shards("s3://b/a.tar", storage_options={"endpoint_url": "http://me:hunter2@host"})


def test_options_that_would_do_nothing_are_refused(tmp_path):
    path = write(tmp_path / "a.tar", {"a.png": png()})
    assert "no shard is remote" in refusal(path, storage_options={"anon": True})
    assert "no shard is remote" in refusal(path, shard_cache_bytes=10)
    with pytest.raises(ValidationError, match="shard_cache_dir needs"):
        open_shards(path, shard_cache_dir="/tmp/x")


def test_a_missing_library_is_told_with_what_installs_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs:// needs gcsfs(.|\n)*pip install \"difftrain\[cloud\]\""):
        open_shards("gs://bucket/a.tar")


# What a tar may hold

KINDS = {
    "a hard link": {"type": tarfile.LNKTYPE, "linkname": "a.png"},
    "a symbolic link": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    "a device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
    "a pipe": {"type": tarfile.FIFOTYPE},
    "a member of the unknown type b'Z'": {"type": b"Z"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_links_devices_and_pipes_are_refused_by_name_and_byte(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.png", b"x" * 512)
        add(tar, "evil.png", **KINDS[kind])
    told = refusal(path)
    assert f"the shard holds {kind}, 'evil.png', at byte 1,024" in told
    assert "--hard-dereference" in told


def test_sparse_files_and_global_names_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.png", b"x", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    assert "a sparse file at byte 0" in refusal(path)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "b.png"}) as tar:
        add(tar, "a.png", png())
    assert "a pax header that names all members after it" in refusal(path)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "by git archive"}) as tar:
        add(tar, "a.png", png())
    assert open_shards(path)[0].key == "a.png"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_directories_and_every_format_are_read_as_tarfile_reads_them(tmp_path, form):
    names = ["a.png", "d" * 90 + "/" + "e" * 60 + ".png", "größe/猫.png", "../../up.png", "/abs.png"]
    if form != tarfile.USTAR_FORMAT:
        names.append("x" * 300 + ".png")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        add(tar, "d" * 90, type=tarfile.DIRTYPE)
        for number, name in enumerate(names):
            add(tar, name, png(size=(number + 1, 1)), mtime=1.5)
    records = open_shards(path)
    assert [records[i].key for i in range(len(records))] == names
    assert [records.image(i).size[0] for i in range(len(names))] == list(range(1, len(names) + 1))
    with tarfile.open(path) as tar:
        there = {member.name: member.offset_data for member in tar if member.isfile()}
    assert [records.index.table["offset"][i].as_py() for i in range(len(names))] == list(there.values())


def test_nothing_is_written_where_names_lead(tmp_path):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "a.tar", {"../escaped.png": png(), "/tmp/abs-escaped.png": png()})
    records = open_shards(path)
    assert records.image(0).size == (4, 4)
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "cache") == ["in"]
    assert not os.path.exists("/tmp/abs-escaped.png")


def test_a_shard_that_is_cut_off_is_told_wherever_the_cut_is(tmp_path):
    whole = write(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"x", "long" * 40 + ".png": png()}).read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    path = tmp_path / "cut.tar"
    for length in [0, 1, 511, 512, 513, 600, 1023, 1024, 1500, *range(1536, end + 1, 300), end]:
        path.write_bytes(whole[:length])
        told = refusal(path)
        assert f"the shard is cut off at byte {length:,}\n  in {path}" in told
    path.write_bytes(whole[: end + 512])
    assert len(open_shards(path)) == 2


def test_a_shard_whose_disk_fails_is_told_with_its_byte_and_read_once(tmp_path, monkeypatch):
    path = old(write(tmp_path / "a.tar", {"a.png": png()}))
    opened: list[str] = []

    class Failing(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def stream(self: Any, shard: Any) -> Any:
        opened.append(shard.url)
        return Failing()

    monkeypatch.setattr(storage.Storage, "stream", stream)
    assert f"shard cannot be read at byte 0: Input/output error\n  in {path}" in refusal(path)
    assert opened == [str(path)]


def test_a_damaged_header_is_told_with_its_byte(tmp_path):
    path = write(tmp_path / "a.tar", {"a.png": b"x" * 512, "b.png": png()})
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 0xFF
    path.write_bytes(data)
    assert f"no tar header at byte 1,024 (bad checksum)\n  in {path}" in refusal(path)
    path.write_bytes(b"<html>" * 200)
    assert "not a tar archive" in refusal(path)
    path.write_bytes(b"\x1f\x8b" + bytes(600))
    assert "compressed with gzip" in refusal(path)


def header(name: str, size: int, kind: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


EVIL = {
    "a long name of 8 GB": (header("x", 2**33, tarfile.GNUTYPE_LONGNAME), "a header of 8,589,934,592 bytes"),
    "a pax header of 8 GB": (header("x", 2**33, tarfile.XHDTYPE), "a header of 8,589,934,592 bytes"),
    "a negative size": (header("a.png", -5, tarfile.REGTYPE), "no size"),
    "a size past the end": (header("a.png", 2**50, tarfile.REGTYPE), "cut off at byte 2,048"),
    "a pax record longer than the header": (header("x", 9, tarfile.XHDTYPE) + b"99 path=a".ljust(512, b"\0"), "no pax"),
    "a pax record of no length": (header("x", 9, tarfile.XHDTYPE) + b"0 path=ab".ljust(512, b"\0"), "no pax header"),
    "a pax size that is no number": (
        header("x", 12, tarfile.XHDTYPE) + b"12 size=1_0\n".ljust(512, b"\0") + header("a.png", 10, tarfile.REGTYPE),
        "no size",
    ),
}


@pytest.mark.parametrize("case", EVIL)
def test_sizes_that_lie_are_refused_and_cost_no_memory(tmp_path, case):
    data, reason = EVIL[case]
    path = tmp_path / "a.tar"
    path.write_bytes(data + bytes(2048 - len(data)) if case != "a size past the end" else data + bytes(1536))
    assert reason in refusal(path)


def test_damaged_archives_never_raise_anything_but_a_user_error(tmp_path):
    import random

    generator = random.Random(0)
    whole = write(tmp_path / "a.tar", {"a.png": png(), "long" * 40 + ".txt": b"x", "b.png": png()}).read_bytes()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(6000)] = generator.randrange(256)
        try:
            names = [member.name for member in tar_members.members(io.BytesIO(data), "here")]
        except UserError:
            continue
        assert len(names) <= 3


# Pictures that cannot be read


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_bombs_and_damaged_pictures_are_faults_of_their_records(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_PICTURE_BYTES", 5000)
    members = {"a.png": png(), "b.png": bomb(60_000, 60_000), "c.png": b"<html>", "d.png": b"", "e.png": b"x" * 5001}
    records = open_shards(write(tmp_path / "a.tar", members))
    looks = list(records.looks())
    assert [look.content for look in looks] == [hashlib.sha256(data).hexdigest() for data in members.values()]
    assert (looks[0].width, looks[0].height, looks[0].fault) == (4, 4, None)
    reasons = ["over the limit of 89,478,485", "HTML", "the file is empty", "5,001 bytes is over the limit of 5,000"]
    assert [reason in str(look.fault) for reason, look in zip(reasons, looks[1:], strict=True)] == [True] * 4
    with pytest.raises(UserError, match=r"over the limit.*\n  in .*a\.tar: b\.png"):
        records.image(1)


def test_the_pixel_limit_of_the_config_is_used_also_by_a_remembered_index(tmp_path):
    path = old(write(tmp_path / "a.tar", {"a.png": png(size=(5, 5))}))
    assert next(open_shards(path).looks()).fault is None
    assert "over the limit of 24" in str(next(open_shards(path, max_pixels=24).looks()).fault)
    assert next(open_shards(path, max_pixels=25).looks()).fault is None


# The index


def test_a_shard_is_read_once_and_again_when_it_changed(tmp_path, monkeypatch):
    paths = [old(write(tmp_path / f"{n}.tar", {f"{n}.png": png()})) for n in "ab"]
    read: list[str] = []
    real = webdataset.members

    def counted(file: Any, where: str) -> Any:
        read.append(where)
        return real(file, where)

    monkeypatch.setattr(webdataset, "members", counted)
    names = [str(path) for path in paths]
    first = open_shards(names)
    assert open_shards(names).fingerprint() == first.fingerprint()
    assert read == names
    open_shards(names[::-1])
    assert read == names
    old(write(paths[1], {"b.png": png(), "c.png": png()}), 1_600_000_001)
    assert len(open_shards(names)) == 3
    assert read == [*names, names[1]]
    open_shards(names, caption_column="other")
    assert len(read) == 5


def test_a_picture_that_changed_since_the_index_is_refused_when_it_is_read(tmp_path):
    red, blue = png("red", form="BMP"), png("blue", form="BMP")
    path = old(write(tmp_path / "a.tar", {"a.bmp": red, "b.bmp": red}))
    records = open_shards(path)
    old(write(path, {"a.bmp": blue, "b.bmp": red}))
    with pytest.raises(SourceError, match=rf"changed since it was indexed: its bytes (.|\n)*in {path}"):
        records.image(0)
    assert records.image(1).size == (4, 4)
    assert next(records.looks(fresh=True)).content == hashlib.sha256(blue).hexdigest()
    path.write_bytes(b"")
    with pytest.raises(UserError, match="bytes and has 0"):
        records.image(0)
    with pytest.raises(SourceError, match="bytes and has 0"):  # and is no picture that a fresh look leaves out
        list(records.looks(fresh=True))
    path.unlink()
    with pytest.raises(SourceError, match="No such file"):
        records.image(0)


def test_a_second_start_opens_one_index_whatever_the_number_of_shards(tmp_path, monkeypatch):
    for number in range(20):
        old(write(tmp_path / f"{number:03d}.tar", {f"{number}.png": png()}))
    asked: list[Any] = []
    real = webdataset.indexed

    def counted(identity: Any, *rest: Any) -> Any:
        asked.append(identity)
        return real(identity, *rest)

    monkeypatch.setattr(webdataset, "indexed", counted)
    first = open_shards(f"{tmp_path}/{{000..019}}.tar")
    assert len(asked) == 22  # each shard's, all records, the shards' names
    asked.clear()
    assert open_shards(f"{tmp_path}/{{000..019}}.tar").fingerprint() == first.fingerprint()
    assert len(asked) == 2


# Over HTTP


class Server(http.server.ThreadingHTTPServer):
    """Files over HTTP; what `faults` says of the next requests is done instead of answering them."""

    daemon_threads = True
    files: dict[str, bytes]
    faults: list[str]
    ranges: bool
    asked: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(self.command)
        fault = self.server.faults.pop(0) if self.server.faults else None
        data = self.server.files.get(self.path)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if data is None or fault:
            self.send_response(404 if data is None else int(str(fault)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, status = data, 200
        if self.server.ranges and (asked := self.headers.get("Range")):
            first, last = asked.removeprefix("bytes=").split("-")
            body, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.ranges, server.asked = {}, [], True, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def serve(server: Server, tmp_path: Path) -> Callable[..., str]:
    def put(members: dict[str, bytes], name: str = "/a.tar") -> str:
        server.files[name] = write(tmp_path / "made.tar", members).read_bytes()
        return f"http://127.0.0.1:{server.server_port}{name}"

    return put


def test_a_shard_behind_http_is_read_by_range(server, serve):
    url = serve({"a.png": png("red"), "a.txt": b"x", "b.png": png("blue")})
    records = open_shards(url)
    assert [(records[i].key, records.image(i).getpixel((0, 0))) for i in range(2)] == [
        ("a.png", (255, 0, 0)),
        ("b.png", (0, 0, 255)),
    ]
    server.asked.clear()
    again = open_shards(url)
    assert server.asked == ["HEAD"]
    assert again.fingerprint() == records.fingerprint()
    url = serve({"a.png": png("green")})
    with pytest.raises(SourceError, match="changed since it was indexed"):
        records.image(0)
    server.files.clear()
    with pytest.raises(SourceError, match="the shard does not exist"):
        records.image(0)


@pytest.mark.parametrize("fault", ["drop", "500", "503", "429"])
def test_errors_of_the_network_are_tried_again_after_waits_that_double(server, serve, capfd, fault):
    records = open_shards(serve({"a.png": png()}))
    server.faults = [fault] * 4
    assert records.image(0).size == (4, 4)
    lines = capfd.readouterr().err.splitlines()
    told = [line.rpartition("; ")[2] for line in lines if "attempt" in line]
    wanted = [f"attempt {n} of 5 in {wait} s" for n, wait in ((2, 0.01), (3, 0.02), (4, 0.04), (5, 0.08))]
    assert told == (wanted[:2] if fault == "drop" else wanted)  # a dropped connection is tried twice by the client
    server.faults = ["500"] * 20
    with pytest.raises(SourceError, match="cannot be read after 5 attempts"):
        records.image(0)
    with pytest.raises(SourceError, match="cannot be read after 5 attempts"):
        list(records.looks(fresh=True))


def test_a_shard_that_changes_while_it_is_indexed_is_refused(server, serve, monkeypatch):
    url = serve({"a.png": png("red")})
    real = webdataset.members

    def changing(file: Any, where: str) -> Iterator[Any]:
        yield from real(file, where)
        serve({"a.png": png("blue")})

    monkeypatch.setattr(webdataset, "members", changing)
    with pytest.raises(UserError, match="changed since it was indexed"):
        open_shards(url)


def test_a_missing_file_is_not_asked_for_again(server, serve):
    url = serve({"a.png": png()})
    with pytest.raises(UserError, match="does not exist"):
        open_shards(url.replace("a.tar", "gone.tar"))
    assert len(server.asked) <= 2


def test_a_server_without_ranges_is_refused(server, serve):
    url = serve({"a.png": png(), "big.txt": bytes(100)})
    records = open_shards(url)
    server.ranges = False
    with pytest.raises(UserError, match="sends whole files"):
        records.image(0)
