"""Links are followed inside of the folder, and what lies outside is never read."""

import os
from pathlib import Path

import pytest
from folders import line, open_folder, open_lines, refusal
from pictures import picture

from trainer.data.looks import NOTHING
from trainer.data.sources.imagefolder import ImageFolderRecords
from trainer.errors import UserError


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
def test_a_link_that_leaves_the_folder_is_refused_even_after_indexing(tmp_path, by):
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


def test_links_inside_of_a_root_that_is_a_link_are_followed(tmp_path):
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
