"""The pictures of a folder are records, captioned by its metadata or by text files, and indexed without decoding."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import line, open_folder, open_lines, refusal
from pictures import picture

from trainer.errors import UserError

ROOT = Path(__file__).parents[2]


def test_records_come_in_the_order_of_the_metadata(tmp_path):
    for name in ("b.png", "a.png", "sub/dir/c.png"):
        picture(tmp_path / name)
    records = open_lines(tmp_path, line("b.png", "bee"), "", line("./a.png", "ay"), line("sub//dir/c.png", "sea"))
    assert [records[i].key for i in range(len(records))] == ["b.png", "a.png", "sub/dir/c.png"]
    assert [records[i].captions for i in range(3)] == [("bee",), ("ay",), ("sea",)]
    assert records.image(2).getpixel((0, 0)) == (255, 0, 0)


def test_csv_and_jsonl_give_the_same_records(tmp_path):
    texts = ["plain", "with, comma", 'with "quotes"', "two\nlines", "größer 猫", ""]
    for i, _ in enumerate(texts):
        picture(tmp_path / f"{i}.png")
    json_records = open_lines(tmp_path, *(line(f"{i}.png", text) for i, text in enumerate(texts)))
    (tmp_path / "metadata.jsonl").unlink()
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    rows = ["file_name, text", *(f"{i}.png,{text}" for i, text in enumerate(quoted))]
    (tmp_path / "metadata.csv").write_text("\r\n".join(rows), encoding="utf-8-sig", newline="")
    csv_records = open_folder(tmp_path)
    assert [csv_records[i] for i in range(6)] == [json_records[i] for i in range(6)]
    assert csv_records.fingerprint() == json_records.fingerprint()


def test_columns_may_have_other_names(tmp_path):
    picture(tmp_path / "a.png")
    row = json.dumps({"path": "a.png", "prompt": "a dog", "text": 3})
    records = open_lines(tmp_path, row, image_column="path", caption_column="prompt")
    assert records[0].captions == ("a dog",)


def test_a_caption_may_be_a_list_of_captions(tmp_path):
    picture(tmp_path / "a.png")
    assert open_lines(tmp_path, line("a.png", ["one", "two"]))[0].captions == ("one", "two")


CAPTION_FAULTS = {
    "empty": ("", "the caption is empty"),
    "blank": (" \n", "the caption is empty"),
    "all of several are empty": (["", " "], "2 of its 2 captions cannot be used: the caption is empty"),
    "null": (None, "there is no caption"),
    "no captions": ([], "there is no caption"),
    "half of a character": ("\ud83d", "it holds half of a surrogate pair"),
}


@pytest.mark.parametrize("case", CAPTION_FAULTS)
def test_a_caption_without_words_is_reported_with_its_line(tmp_path, case):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    caption, fault = CAPTION_FAULTS[case]
    records = open_lines(tmp_path, line("b.png", "full"), line("a.png", caption))
    assert list(records.caption_faults()) == [(1, f"{tmp_path}/metadata.jsonl:2: 'a.png': {fault}")]
    assert records[1].captions == ("",)


SOME_FAULTS = {
    "empty": (["", "good one"], "1 of its 2 captions cannot be used: the caption is empty"),
    "not UTF-8": (["good one", "caf\udce9"], "1 of its 2 captions cannot be used: byte 0xe9 is not UTF-8"),
    "half of a character": (["\ud83d", "good one", ""], "2 of its 3 captions cannot be used: it holds half of a surro"),
}


@pytest.mark.parametrize("case", SOME_FAULTS)
def test_of_several_captions_only_the_usable_ones_are_kept(tmp_path, case):
    picture(tmp_path / "a.png")
    captions, fault = SOME_FAULTS[case]
    records = open_lines(tmp_path, line("a.png", captions))
    assert records[0].captions == ("good one",)
    ((index, told),) = records.caption_faults()
    assert index == 0
    assert told.startswith(f"{tmp_path}/metadata.jsonl:1: 'a.png': {fault}")


def test_a_line_without_the_caption_column_names_the_likely_one(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    (index, fault), *others = open_lines(tmp_path, line("a.png"), '{"file_name": "b.png", "txt": "x"}').caption_faults()
    assert (index, others) == (1, [])
    assert "no column 'text'; the line has 'file_name', 'txt': set data.caption_column=txt?" in fault


def test_a_caption_that_is_not_utf8_is_reported_with_its_line(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    bad = b'{"file_name": "b.png", "text": "caf\xe9"}\n'
    (tmp_path / "metadata.jsonl").write_bytes(line("a.png").encode() + b"\n" + bad)
    records = open_folder(tmp_path)
    assert list(records.caption_faults()) == [(1, f"{tmp_path}/metadata.jsonl:2: 'b.png': byte 0xe9 is not UTF-8")]
    assert records[1].captions == ("",)


def test_text_files_next_to_the_pictures_hold_a_caption_per_line(tmp_path):
    for name in ("b.png", "a.jpg", "sub/deep/c.webp", ".hidden/x.png"):
        picture(tmp_path / name)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n  two  \n")
    (tmp_path / "sub" / "deep" / "c.txt").write_text("sea", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no picture is called like this")
    records = open_folder(tmp_path)
    assert [records[i].key for i in range(len(records))] == ["a.jpg", "b.png", "sub/deep/c.webp"]
    assert [records[i].captions for i in range(3)] == [("",), ("one", "two"), ("sea",)]
    assert list(records.caption_faults()) == [(0, "'a.jpg': there is no a.txt")]
    assert records.image(2).size == (4, 4)


def test_why_a_text_file_gives_no_caption_is_said(tmp_path):
    for name in "abcd":
        picture(tmp_path / "set" / f"{name}.png")
    (tmp_path / "set" / "a.TXT").write_text("one")
    (tmp_path / "set" / "b.txt").write_text("\n \n")
    (tmp_path / "set" / "c.txt").write_bytes(b"good\ncaf\xe9")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "set" / "d.Txt").symlink_to(tmp_path / "secret.txt")
    records = open_folder(tmp_path / "set")
    assert [records[i].captions for i in range(4)] == [("one",), ("",), ("good",), ("",)]
    assert [told for _, told in records.caption_faults()] == [
        "'b.png': there is no caption in b.txt",
        "'c.png': 1 of its 2 captions cannot be used: byte 0xe9 is not UTF-8 in c.txt",
        "'d.png': there is no caption: d.Txt is a link that leaves data_root",
    ]


def test_a_note_says_that_text_files_are_not_read_next_to_metadata(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    assert open_lines(tmp_path, line("a.png"), line("b.png")).notes() == []
    (tmp_path / "b.txt").write_text("another cat\n")
    told = "note   captions come from metadata.jsonl; b.txt and others like it are not read"
    assert open_lines(tmp_path, line("a.png"), line("b.png")).notes() == [told]
    (tmp_path / "metadata.jsonl").unlink()
    assert open_folder(tmp_path).notes() == []


def test_a_changed_text_file_is_seen_at_once(tmp_path):
    picture(tmp_path / "a.png")
    for text in ("one", "two"):
        (tmp_path / "a.txt").write_text(text)
        assert open_folder(tmp_path)[0].captions == (text,)


def test_a_missing_file_is_a_bad_picture_where_those_may_be_skipped(tmp_path):
    picture(tmp_path / "a.png")
    records = open_lines(tmp_path, line("a.png"), line("gone.png"), on_bad="skip")
    assert [look.fault for look in records.looks()] == [None, "picture cannot be read: No such file or directory"]
    assert "holds a NUL" in refusal(tmp_path, line("a.png"), line("gone\0.png"), on_bad="skip")


def test_a_byte_order_mark_and_a_missing_last_newline_are_read_over(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line("a.png").encode())
    assert len(open_folder(tmp_path)) == 1


def test_a_relative_data_root_starts_at_the_working_directory(tmp_path, monkeypatch):
    picture(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "metadata.jsonl").write_text(line("a.png"))
    monkeypatch.chdir(tmp_path)
    records = open_folder("set")
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(records)).image(0).size == (4, 4)


def test_neither_torch_nor_pillow_is_imported_to_index_a_folder(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(line("a.png") + "\n" + line("b.png"))
    code = f"""
import sys
sys.modules["torch"] = None
from trainer.data.record import Source
records = Source.parse({{"kind": "imagefolder", "data_root": {str(tmp_path)!r}, "image_size": 64}}).open()
print(len(records), records[1].key, "PIL" in sys.modules, len(records.fingerprint()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "2 b.png False 64\n", done.stderr


def test_an_unreadable_picture_is_named_with_its_path(tmp_path):
    (tmp_path / "a.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"HTML.*\n  in .*/a\.png"):
        open_lines(tmp_path, line("a.png")).image(0)


def test_the_pixel_limit_of_the_config_is_used(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="over the limit of 15"):
        open_lines(tmp_path, line("a.png"), max_pixels=15).image(0)


def test_the_fingerprint_changes_with_key_caption_content_and_order(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    lines = [line("a.png", ["x", "y"]), line("b.png", "z")]
    base = open_lines(tmp_path, *lines).fingerprint()
    assert open_lines(tmp_path, *lines).fingerprint() == base
    assert open_lines(tmp_path, *lines[::-1]).fingerprint() != base
    assert open_lines(tmp_path, lines[0], line("b.png", "Z")).fingerprint() != base
    assert open_lines(tmp_path, line("a.png", ["xy"]), lines[1]).fingerprint() != base
    with open(tmp_path / "a.png", "ab") as file:
        file.write(b"!")
    assert open_lines(tmp_path, *lines).fingerprint() != base


def test_the_fingerprint_does_not_depend_on_where_the_folder_lies(tmp_path):
    fingerprints = set()
    for place in ("one", "two/deep"):
        picture(tmp_path / place / "a.png")
        fingerprints.add(open_lines(tmp_path / place, line("a.png")).fingerprint())
    assert len(fingerprints) == 1


def test_a_directory_is_listed_once_instead_of_asking_for_each_file(tmp_path, monkeypatch):
    for n in range(300):
        (tmp_path / f"{n}.png").touch()
    calls: dict[str, int] = dict.fromkeys(("scandir", "stat", "lstat"), 0)

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, counted(name))
        assert len(open_lines(tmp_path, *(line(f"{n}.png") for n in range(300)))) == 300
    assert calls["scandir"] == 1
    assert calls["stat"] + calls["lstat"] < 50
