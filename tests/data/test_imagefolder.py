"""A folder with a metadata file is indexed without decoding, safely, and everything wrong with it is told at once."""

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.data.looks import NOTHING
from trainer.data.sources.imagefolder import ImageFolder, ImageFolderRecords
from trainer.errors import UserError

ROOT = Path(__file__).parents[2]


def picture(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)


def line(name: object, text: object = "a cat") -> str:
    return json.dumps({"file_name": name, "text": text})


def open_folder(root: Path | str, **fields: object) -> ImageFolderRecords:
    return ImageFolder.model_validate({"data_root": str(root), "image_size": 64, **fields}).open()


def open_lines(root: Path, *lines: str, **fields: object) -> ImageFolderRecords:
    (root / "metadata.jsonl").write_text("".join(text + "\n" for text in lines), encoding="utf-8")
    return open_folder(root, **fields)


def refusal(root: Path, *lines: str, **fields: object) -> str:
    with pytest.raises(UserError) as error:
        open_lines(root, *lines, **fields)
    return str(error.value)


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
def test_a_caption_without_words_is_told_with_its_line_and_its_record_reads_as_without_one(tmp_path, case):
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
def test_of_several_captions_those_that_can_be_used_are_kept_and_the_others_told(tmp_path, case):
    picture(tmp_path / "a.png")
    captions, fault = SOME_FAULTS[case]
    records = open_lines(tmp_path, line("a.png", captions))
    assert records[0].captions == ("good one",)
    ((index, told),) = records.caption_faults()
    assert index == 0
    assert told.startswith(f"{tmp_path}/metadata.jsonl:1: 'a.png': {fault}")


def test_a_line_without_the_column_is_told_what_column_may_be_meant(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    (index, fault), *others = open_lines(tmp_path, line("a.png"), '{"file_name": "b.png", "txt": "x"}').caption_faults()
    assert (index, others) == (1, [])
    assert "no column 'text'; the line has 'file_name', 'txt': set data.caption_column=txt?" in fault


def test_captions_that_are_not_utf8_are_told_and_their_records_kept(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    bad = b'{"file_name": "b.png", "text": "caf\xe9"}\n'
    (tmp_path / "metadata.jsonl").write_bytes(line("a.png").encode() + b"\n" + bad)
    records = open_folder(tmp_path)
    assert list(records.caption_faults()) == [(1, f"{tmp_path}/metadata.jsonl:2: 'b.png': byte 0xe9 is not UTF-8")]
    assert records[1].captions == ("",)


def test_text_files_beside_the_pictures_hold_their_captions_a_line_each(tmp_path):
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


def test_a_text_file_without_captions_is_told_from_one_that_is_not_there_or_not_read(tmp_path):
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


@pytest.mark.parametrize("name", ["metadata.jsonl", "a.txt"])
def test_a_text_file_that_may_not_be_read_is_named_and_tried_once(tmp_path, monkeypatch, name):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text(line("a.png"))
    os.utime(tmp_path / name, (1_600_000_000, 1_600_000_000))
    tried: list[str] = []
    real = open

    def refused(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == str(tmp_path / name):  # the tests may run as root, whom permissions do not stop
            tried.append(name)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refused)
        with pytest.raises(UserError, match=f"cannot be read: Permission denied\n  in {tmp_path}/{name}"):
            open_folder(tmp_path)
    assert tried == [name]


def test_a_changed_text_file_is_seen_at_once(tmp_path):
    picture(tmp_path / "a.png")
    for text in ("one", "two"):
        (tmp_path / "a.txt").write_text(text)
        assert open_folder(tmp_path)[0].captions == (text,)


def test_missing_files_are_left_to_the_policy_where_bad_pictures_may_be_left_out(tmp_path):
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


def test_a_missing_folder_names_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"'pics' does not exist\n  in data.data_root\n.*{tmp_path}"):
        open_folder("pics")
    with pytest.raises(UserError, match="does not exist"):
        open_folder("nul\0byte")


def test_a_file_an_empty_folder_and_two_metadata_files_are_refused(tmp_path):
    picture(tmp_path / "set" / "a.png")
    with pytest.raises(UserError, match="is a file"):
        open_folder(tmp_path / "set" / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        open_folder(tmp_path / "empty")
    (tmp_path / "set" / "metadata.csv").write_text("file_name,text\na.png,x\n")
    assert "keep one of them" in refusal(tmp_path / "set", line("a.png"))


def test_pictures_without_metadata_are_told_what_a_line_looks_like(tmp_path):
    picture(tmp_path / "my cat.png")
    with pytest.raises(UserError) as error:
        open_folder(tmp_path, caption_column="prompt")
    example = str(error.value).partition("such as: ")[2]
    (tmp_path / "metadata.jsonl").write_text(example)
    assert open_folder(tmp_path, caption_column="prompt")[0].captions == ("a photo of a cat",)


def test_metadata_one_folder_below_is_pointed_at(tmp_path):
    picture(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "metadata.jsonl").write_text(line("a.png"))
    with pytest.raises(UserError, match=f"set data.data_root={tmp_path}/train"):
        open_folder(tmp_path)


def test_metadata_without_records_is_refused(tmp_path):
    assert "lists no picture" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UserError, match="lists no picture"):
        open_folder(tmp_path)


BAD_LINES = {
    "bad json": ('{"file_name": "a.png", "text": }', "not JSON: Expecting value at column 32"),
    "deep json": ("[" * 100_000, "not JSON"),
    "not an object": ('["a.png", "a cat"]', "where an object is needed"),
    "no file name": ('{"text": "a cat"}', "no column 'file_name'; the line has 'text'"),
    "number as caption": (line("a.png", 7), "column 'text' is 7, not a string"),
    "number in list": (line("a.png", ["x", 1]), "an item of column 'text' is 1"),
    "number as name": (line(5), "column 'file_name' is 5"),
    "empty name": (line(""), "empty"),
    "duplicate": (line("./first.png"), "'first.png' is listed on line 1 already"),
    "missing file": (line("gone.png"), "1 of 2 listed files do not exist: 'gone.png' (line 2)"),
    "backslashes": (line("sub\\a.png"), "names are written with /"),
    "nul": (line("a\0.png"), "holds a NUL"),
    "nul in a directory": (line("a\0/b.png"), "holds a NUL"),
    "below a file": (line("first.png/x.png"), "do not exist"),
    "a directory": (line("sub"), "not a regular file"),
    "a pipe": (line("pipe"), "not a regular file"),
    "parent": (line("../secret.png"), "'..'"),
    "inner parent": (line("sub/../first.png"), "'..'"),
    "absolute": (line("/etc/hostname"), "absolute"),
    "link out": (line("out.png"), "a link that leaves data_root"),
    "link out by a directory": (line("outdir/secret.png"), "a link that leaves data_root"),
    "dangling link": (line("dangling.png"), "do not exist"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path, case):
    root = tmp_path / "set"
    for path in (root / "first.png", root / "a.png", tmp_path / "secret.png", root / "sub" / "x.png"):
        picture(path)
    os.mkfifo(root / "pipe")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "outdir").symlink_to(tmp_path)
    (root / "dangling.png").symlink_to("nowhere.png")
    text, reason = BAD_LINES[case]
    told = refusal(root, line("first.png"), text)
    assert reason in told
    assert f"{root}/metadata.jsonl:2" in told


def test_links_that_stay_inside_are_followed(tmp_path):
    picture(tmp_path / "real" / "a.png", "blue")
    (tmp_path / "alias").symlink_to("real")
    (tmp_path / "b.png").symlink_to(tmp_path / "real" / "a.png")
    records = open_lines(tmp_path, line("alias/a.png"), line("b.png"))
    assert [records.image(i).getpixel((0, 0)) for i in range(2)] == [(0, 0, 255)] * 2


def old_lines(root: Path, *lines: str) -> ImageFolderRecords:
    """The folder, whose metadata was written long ago, so that its index is remembered."""
    open_lines(root, *lines)
    os.utime(root / "metadata.jsonl", (1_600_000_000, 1_600_000_000))
    return open_folder(root)


@pytest.mark.parametrize("by", ["file", "directory"])
def test_a_link_that_leaves_the_folder_is_refused_also_after_the_index_was_made(tmp_path, by):
    names = ["sub/a.png", "sub/b.png", "c.png", "sub/d.png"]
    for name in names:
        picture(tmp_path / "set" / name)
    records = old_lines(tmp_path / "set", *map(line, names))
    assert [look.fault for look in records.looks()] == [None] * 4
    picture(tmp_path / "secret" / "a.png", "blue")
    if by == "file":
        for name in ("sub/a.png", "sub/d.png"):
            (tmp_path / "set" / name).unlink()
            (tmp_path / "set" / name).symlink_to(tmp_path / "secret" / "a.png")
        outside = [0, 3]
    else:
        (tmp_path / "set" / "sub").rename(tmp_path / "moved")
        (tmp_path / "set" / "sub").symlink_to(tmp_path / "moved")
        outside = [0, 1, 3]
    for again in (records, open_folder(tmp_path / "set")):
        for index in outside:
            with pytest.raises(UserError, match="is a link that leaves data_root"):
                again.image(index)
        assert again.image(2).size == (4, 4)
        for fresh in (False, True):
            looks = list(again.looks(fresh))
            assert [i for i, look in enumerate(looks) if look.fault] == outside
            assert {(look.content, look.fault) for look in looks if look.fault} == {
                (NOTHING, "picture is a link that leaves data_root")
            }


def test_links_inside_of_a_root_that_is_a_link_are_looked_at(tmp_path):
    picture(tmp_path / "real" / "sub" / "a.png")
    (tmp_path / "real" / "b.png").symlink_to("sub/a.png")
    (tmp_path / "link").symlink_to("real")
    records = open_lines(tmp_path / "link", line("sub/a.png"), line("b.png"))
    assert [look.fault for look in records.looks()] == [None, None]


def test_a_folder_whose_name_only_starts_like_the_root_is_outside(tmp_path):
    picture(tmp_path / "set-private" / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "set-private" / "a.png")
    assert "leaves data_root" in refusal(tmp_path / "set", line("a.png"))


def test_a_data_root_that_is_itself_a_link_is_read(tmp_path):
    picture(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "metadata.jsonl").write_text(line("a.png"))
    (tmp_path / "link").symlink_to("real")
    assert len(open_folder(tmp_path / "link")) == 1


def test_metadata_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "private.jsonl").write_text(line("a.png"))
    picture(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "metadata.jsonl").symlink_to(tmp_path / "private.jsonl")
    with pytest.raises(UserError, match=r"metadata\.jsonl is a link that leaves data_root"):
        open_folder(tmp_path / "set")


NO_COLUMN = {
    "another name": ('{"file_name": "a.png", "txt": "x"}', "'txt': set data.caption_column=txt?"),
    "the only other column": ('{"file_name": "a.png", "prompt": "x"}', "set data.caption_column=prompt?"),
    "none that could be meant": (
        '{"file_name": "a.png", "width": 3, "height": 4}',
        "the line has 'file_name', 'width', 'height': set data.caption_column",
    ),
}


@pytest.mark.parametrize("case", NO_COLUMN)
def test_a_column_that_no_line_has_is_refused_with_what_may_be_meant(tmp_path, case):
    picture(tmp_path / "a.png")
    text, reason = NO_COLUMN[case]
    assert reason in refusal(tmp_path, text)


def test_a_file_name_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "caf\xe9.png", "text": "x"}\n')
    with pytest.raises(UserError, match=r"is not UTF-8\n  in .*metadata\.jsonl:1"):
        open_folder(tmp_path)


def test_all_problems_are_told_together_up_to_twenty(tmp_path):
    picture(tmp_path / "a.png")
    told = refusal(tmp_path, line("a.png"), "{", line("../x"), line("gone.png"), line("a.png", 1))
    assert told.startswith("4 problems")
    assert [f"metadata.jsonl:{n}:" in told for n in range(1, 7)] == [False, True, True, True, True, False]
    told = refusal(tmp_path, *(["{"] * 50))
    assert told.count("not JSON") == 20
    assert "and 30 more" in told


def test_missing_files_are_counted_and_the_first_ones_named(tmp_path):
    told = refusal(tmp_path, *(line(f"{n}.png") for n in range(1000)))
    assert "1,000 of 1,000 listed files do not exist: '0.png' (line 1), '1.png' (line 2)" in told
    assert "and 995 more" in told


BAD_CSV = {
    "an unquoted comma": ("file_name,text\na.png,x\nb.png,red, blue\n", 3, "needs quotes"),
    "a missing cell": ("file_name,text\na.png,x\nb.png\n", 3, "1 cells, but the header names 2"),
    "an open quote": ('file_name,text\na.png,x\nb.png,"never closed\nc.png,y\n', 3, "not CSV"),
    "no caption column": ("file_name,caption\na.png,x\n", 2, "no column 'text'"),
    "a column twice": ("file_name,text,text\na.png,x,y\n", 1, "twice"),
    "after a caption of two lines": ('file_name,text\na.png,"x\ny"\n../b.png,z\n', 4, "'..'"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv_is_refused_with_the_line_where_the_row_starts(tmp_path, case):
    content, number, reason = BAD_CSV[case]
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises(UserError) as error:
        open_folder(tmp_path)
    assert reason in str(error.value)
    assert f"metadata.csv:{number}" in str(error.value)


def test_indexing_and_fingerprinting_import_no_torch_and_indexing_decodes_nothing(tmp_path):
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
