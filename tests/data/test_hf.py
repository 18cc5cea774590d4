"""Each row of a data set is a record, read quietly and as it stands, and what is wrong with one is told by its row."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hf_sets import open_set, parquet, refusal, saved
from pictures import png

from trainer.data.sources.hf import HuggingFaceRecords
from trainer.errors import UserError

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("fresh_hf_cache")

ROOT = Path(__file__).parents[2]


def keys(records: HuggingFaceRecords) -> list[str]:
    return [records[index].key for index in range(len(records))]


def test_a_saved_data_set_is_read_by_path_name_without_decoding_it(tmp_path):
    records = open_set(saved(tmp_path / "set"))
    assert keys(records) == ["a.png", "b.png"]
    assert [records[i].captions for i in range(2)] == [("a",), ("b",)]
    assert records.data(0) == png()
    assert records.image(1).getpixel((0, 0)) == (0, 0, 255)
    assert records.where(1) == f"{tmp_path}/set: row 1, 'b.png'"
    assert records.provenance() == {}


def test_columns_of_bytes_and_captions_that_are_lists_are_read(tmp_path):
    images = [png(), png("blue")]
    for kind in (pa.binary(), pa.large_binary()):
        path = parquet(tmp_path / f"{kind}.parquet", images, [["one", "two"], ["three"]], kind)
        records = open_set(path)
        assert keys(records) == ["0", "1"]
        assert [records[i].captions for i in range(2)] == [("one", "two"), ("three",)]
        assert [records.data(i) for i in range(2)] == images


def test_columns_may_have_other_names(tmp_path):
    path = parquet(tmp_path / "a.parquet", [png()], ["x"], pa.binary(), jpg=pa.array([png("blue")]), prompt=["y"])
    records = open_set(path, image_column="jpg", caption_column="prompt")
    assert (records.data(0), records[0].captions) == (png("blue"), ("y",))


def test_keys_are_relative_paths_or_base_names_or_row_numbers(tmp_path):
    paths = ["a.png", "./sub//b.png", "/home/somebody/c.png", "../d.png", None, "", "a.png", "/x/a.png", "a.png#2"]
    images = [{"bytes": png(), "path": path} for path in paths]
    records = open_set(parquet(tmp_path / "a.parquet", images))
    wanted = ["a.png", "sub/b.png", "c.png", "d.png", "4", "5", "a.png#2", "a.png#3", "a.png#2#2"]
    assert keys(records) == wanted


def test_a_column_that_names_the_records_must_name_each_once(tmp_path):
    images = [{"bytes": png(), "path": "same.png"}] * 2
    path = parquet(tmp_path / "a.parquet", images, id=[7, 8], word=["x", "x"], gap=["x", None])
    assert keys(open_set(path, key_column="id")) == ["7", "8"]
    assert f"key 'x' is in row 0 already\n  in {path}:1" in refusal(path, key_column="word")
    assert "column 'gap' is empty" in refusal(path, key_column="gap")
    assert "no column 'ids'" in refusal(path, key_column="ids")


def test_missing_and_empty_captions_are_reported_by_row(tmp_path):
    path = parquet(tmp_path / "a.parquet", [png()] * 4, ["x", None, " ", "y"], pa.binary())
    records = open_set(path)
    assert list(records.caption_faults()) == [
        (1, f"{path}: row 1, '1': there is no caption"),
        (2, f"{path}: row 2, '2': the caption is empty"),
    ]
    assert [records[i].captions for i in range(4)] == [("x",), ("",), ("",), ("y",)]
    path = parquet(tmp_path / "b.parquet", [png()] * 2, [["x", "", None], ["y"]], pa.binary())
    records = open_set(path)
    told = f"{path}: row 0, '0': 2 of its 3 captions cannot be used: the caption is empty"
    assert list(records.caption_faults()) == [(0, told)]
    assert [records[i].captions for i in range(2)] == [("x",), ("y",)]


COLUMNS = {
    "no image column": ({"image_column": "picture"}, "no column 'picture'; there are 'image', 'text', 'label'"),
    "no caption column": ({"caption_column": "txt"}, "set data.caption_column=text?"),
    "an image column of text": ({"image_column": "text", "caption_column": "label"}, "holds string, not pictures"),
    "a caption column of numbers": ({"caption_column": "label"}, "column 'label' holds int64, not text"),
    "a key column of pictures": ({"key_column": "image"}, "not names"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_a_wrong_column_is_refused_with_those_there_are(tmp_path, case):
    fields, reason = COLUMNS[case]
    path = parquet(tmp_path / "a.parquet", [png()], ["x"], pa.binary(), label=[3])
    told = refusal(path, **fields)
    assert reason in told
    assert str(path) in told


def test_bombs_damage_and_missing_pictures_are_faults_of_their_records(tmp_path):
    images = [png(), b"<html>", b"", None, png(size=(9, 9))]
    records = open_set(parquet(tmp_path / "a.parquet", images, kind=pa.binary()), max_pixels=80)
    looks = list(records.looks())
    assert [look.content for look in looks][:3] == [hashlib.sha256(data or b"").hexdigest() for data in images[:3]]
    assert (looks[0].width, looks[0].height, looks[0].fault) == (4, 4, None)
    reasons = ["HTML", "the file is empty", "the row holds no picture", "81 pixels is over the limit of 80"]
    assert [reason in str(look.fault) for reason, look in zip(reasons, looks[1:], strict=True)] == [True] * 4
    with pytest.raises(UserError, match="over the limit"):
        records.image(4)


def test_looks_are_remembered_until_the_files_change(tmp_path, monkeypatch):
    from trainer.data.sources import hf

    path = parquet(tmp_path / "a.parquet", [png(), png("blue")], kind=pa.binary())
    first = list(open_set(path).looks())
    asked: list[int] = []
    real = hf.look_at_each

    def counted(data: Any, count: int, *rest: Any) -> Any:
        asked.append(count)
        return real(data, count, *rest)

    monkeypatch.setattr(hf, "look_at_each", counted)
    assert list(open_set(path).looks()) == first
    assert asked == []
    assert list(open_set(path).looks(fresh=True)) == first
    assert asked == [2]
    assert "over the limit" in str(next(iter(open_set(path, max_pixels=15).looks())).fault)
    parquet(path, [png("lime"), png("blue")], kind=pa.binary())
    os.utime(path, (1_600_000_001, 1_600_000_001))
    changed = list(open_set(path).looks())
    assert [look.content for look in changed] == [
        hashlib.sha256(png(colour)).hexdigest() for colour in ("lime", "blue")
    ]


def test_workers_read_the_files_without_datasets(tmp_path):
    records = open_set(saved(tmp_path / "set"))
    assert records.data(0) == png()
    pickled = pickle.dumps(records)
    assert len(pickled) < 2000
    (tmp_path / "pickled").write_bytes(pickled)
    code = f"""
import pickle, sys
for blocked in ("torch", "datasets", "torchvision", "huggingface_hub"):
    sys.modules[blocked] = None
records = pickle.load(open({str(tmp_path / "pickled")!r}, "rb"))
print(records[1].key, records.image(1).getpixel((0, 0)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "b.png (0, 0, 255)\n", done.stderr


def test_reading_a_data_set_prints_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)  # another test may have needed it
    path = parquet(tmp_path / "a.parquet", [png()] * 3, kind=pa.binary())
    list(open_set(path).looks())
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    assert "torchvision" not in sys.modules
