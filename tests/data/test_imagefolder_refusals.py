"""Everything that is wrong with a folder or its metadata is told at once, with its line and what may be meant."""

import errno
import os
from typing import Any

import pytest
from folders import line, open_folder, refusal
from pictures import picture

from trainer.errors import UserError


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


def test_refused_pictures_without_metadata_show_a_line_to_write(tmp_path):
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


def test_all_problems_are_listed_together_up_to_twenty(tmp_path):
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
