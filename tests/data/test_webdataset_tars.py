"""Any tar is read as tarfile reads it, never unpacked, and whatever is wrong with one is told with its byte."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from typing import Any

import pytest
from pictures import png
from tars import add, old, open_shards, refusal, write

from trainer.data import shards as storage
from trainer.data import tar_members
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_shard_cache")

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
def test_members_of_any_tar_format_are_read_as_tarfile_reads_them(tmp_path, form):
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
    path = write(tmp_path / "in" / "a.tar", {"../escaped.png": png(), f"{tmp_path}/abs-escaped.png": png()})
    records = open_shards(path)
    assert records.image(0).size == (4, 4)
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "cache") == ["in"]


def test_a_shard_that_is_cut_off_is_refused_wherever_the_cut_is(tmp_path):
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


def test_a_shard_whose_disk_fails_is_refused_with_the_byte(tmp_path, monkeypatch):
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


def test_a_damaged_header_is_refused_with_its_byte(tmp_path):
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
def test_sizes_that_lie_are_refused(tmp_path, case):
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
