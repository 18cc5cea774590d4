"""The members of a shard with one name are one record; what is wrong with its picture or captions is told by name."""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
import zlib

import pytest
from pictures import png
from tars import add, open_shards, refusal, write

from trainer.data.sources import webdataset
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_shard_cache")


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


def test_bad_and_oversized_captions_are_reported_record_by_record(tmp_path, monkeypatch):
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
