"""Of a data set on disk only its own files are read, those of the split, and what is missing or damaged is told."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pyarrow as pa
import pytest
from hf_sets import open_set, parquet, refusal, saved
from pictures import png

from trainer.errors import UserError

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("fresh_hf_cache")


# Which files are read


def test_splits_of_a_saved_data_set_are_chosen_by_name(tmp_path):
    rows = {"image": [{"bytes": png(), "path": "a.png"}], "text": ["a"]}
    one = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": one, "odd": datasets.concatenate_datasets([one, one])}).save_to_disk(
        tmp_path / "set"
    )
    assert len(open_set(tmp_path / "set")) == 1
    assert len(open_set(tmp_path / "set", split="odd")) == 2
    assert "there is no split 'test'; there is train, odd" in refusal(tmp_path / "set", split="test")
    assert "there is no split '../set'" in refusal(tmp_path / "set", split="../set")
    (tmp_path / "set" / "train").rename(tmp_path / "elsewhere")
    assert "train/state.json is missing" in refusal(tmp_path / "set")
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere")
    assert "is a link that leaves the data set's folder" in refusal(tmp_path / "set")
    saved(tmp_path / "val", split="validation")
    assert "set data.split=validation" in refusal(tmp_path / "val")
    assert len(open_set(tmp_path / "val", split="validation")) == 2
    assert "set data.split=train" in refusal(saved(tmp_path / "plain"), split="validation")


def test_parquet_files_of_a_split_are_found_by_their_names(tmp_path):
    names = ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001", "extra/dev"]
    for number, name in enumerate(names):
        parquet(tmp_path / "set" / f"{name}.parquet", [png()] * (number + 1), kind=pa.binary())
    assert [len(open_set(tmp_path / "set", split=split)) for split in ("train", "test", "validation")] == [3, 3, 4]
    assert "there is no split 'odd'; there is train, validation, test" in refusal(tmp_path / "set", split="odd")
    assert len(open_set(f"{tmp_path}/set/data/train-*.parquet")) == 3
    assert "set data.split=test" in refusal(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    unnamed = parquet(tmp_path / "pictures.parquet", [png()], kind=pa.binary())
    assert len(open_set(unnamed)) == 1
    assert "there is no split 'test'" in refusal(unnamed, split="test")


def test_another_file_of_the_same_name_length_and_time_is_converted_anew(tmp_path):
    path = parquet(tmp_path / "a.parquet", [png()] * 2, ["cat", "dog"], pa.binary())
    assert open_set(path)[0].captions == ("cat",)
    converted = sorted((tmp_path / "hf-cache").rglob("*.arrow"))
    assert open_set(path)[1].captions == ("dog",)
    assert sorted((tmp_path / "hf-cache").rglob("*.arrow")) == converted
    other = parquet(tmp_path / "b.parquet", [png()] * 2, ["cow", "pig"], pa.binary())
    assert (other.stat().st_size, other.stat().st_mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    other.replace(path)  # as `rsync -t` puts a file in place of another; `cp -p` writes into it
    assert [open_set(path)[i].captions for i in range(2)] == [("cow",), ("pig",)]


def test_what_is_no_data_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        f"'./gone' does not exist\n  in data.dataset\n  relative paths start at the working directory, {tmp_path}"
        in (refusal("./gone"))
    )
    for name in ("data/train.parquet", "train.parquet", "~/set", "/gone/set", "some/where/set"):
        assert f"'{name}' does not exist\n  in data.dataset\n" in refusal(name)
    assert "no file is called" in refusal("*.parquet")
    (tmp_path / "a.txt").write_text("x")
    assert "is no parquet file" in refusal("a.txt")
    (tmp_path / "empty").mkdir()
    assert "neither state.json, dataset_dict.json nor a parquet file" in refusal("empty")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is not parquet PAR1")
    assert "parquet cannot be read" in refusal("bad.parquet")
    for name in ("revision", "config_name"):
        assert f"{name} is for data sets on the hub" in refusal("a.txt", **{name: "x"})


# What a stranger's data set may not do


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.png"
    path.write_bytes(png("blue"))
    return path


def test_rows_that_only_name_a_file_may_not_leave_the_folder(tmp_path, secret):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link.png").symlink_to(secret)
    (tmp_path / "set" / "in").mkdir()
    (tmp_path / "set" / "in" / "side.png").write_bytes(png("lime"))
    reasons = {
        str(secret): "outside of the data set's folder, where nothing is read",
        "../secret.png": "outside of",
        "in/../../secret.png": "outside of",
        "link.png": "outside of",
        "in": "not a regular file",
        "gone.png": "not in the data set's folder",
        "https://host/a.png": "not in the data set's folder",
        "zip://a.png::https://host/a.zip": "not in",
        "/dev/stdin": "outside of",
    }
    for number, (path, reason) in enumerate(reasons.items()):
        file = parquet(tmp_path / "set" / f"{number}.parquet", [{"bytes": None, "path": path}])
        told = refusal(file)
        assert reason in told, path
        assert f"in {file}:0" in told
    file = parquet(tmp_path / "set" / "a.parquet", [{"bytes": None, "path": "in/./side.png"}])
    records = open_set(file)
    assert records.image(0).getpixel((0, 0)) == (0, 255, 0)
    assert records.fingerprint() == open_set(file).fingerprint()
    (tmp_path / "set" / "in" / "side.png").write_bytes(png("red"))
    assert next(open_set(file).looks()).content == hashlib.sha256(png("red")).hexdigest()
    (tmp_path / "set" / "in" / "side.png").unlink()
    (tmp_path / "set" / "in" / "side.png").symlink_to(secret)  # the index of the rows is that of before
    for again in (records, open_set(file)):
        with pytest.raises(UserError, match="is a link that leaves the data set's folder"):
            again.image(0)
        assert "is a link that leaves" in str(next(again.looks()).fault)


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/etc/passwd", "..", "link.arrow", 7, "a.txt"])
def test_a_saved_data_set_may_not_name_files_outside_of_its_folder(tmp_path, name):
    saved(tmp_path / "other")
    folder = saved(tmp_path / "set")
    (folder / "link.arrow").symlink_to(tmp_path / "other" / "data-00000-of-00001.arrow")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))
    told = refusal(folder)
    assert any(reason in told for reason in ("outside of the data set's folder", "leaves the folder", "does not list"))


def test_damaged_files_end_in_a_user_error(tmp_path):
    folder = saved(tmp_path / "set")
    file = folder / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    for length in (0, 10, len(whole) // 2):
        file.write_bytes(whole[:length])
        assert "cannot be read" in refusal(folder)
    file.write_bytes(whole)
    for text in ("{", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [], "_indices_files": [{"filename": "x"}]}'):
        (folder / "state.json").write_text(text)
        refusal(folder)


def test_offsets_that_lead_out_of_a_file_are_refused(tmp_path):
    folder = saved(tmp_path / "set")
    file = folder / "data-00000-of-00001.arrow"
    whole, first, second = file.read_bytes(), len(png()), len(png("blue"))
    offsets = struct.pack("<3i", 0, first, first + second)
    assert whole.count(offsets) == 1
    for evil in ((0, first, 2_000_000_000), (0, -8, first), (-100, first, first)):
        file.write_bytes(whole.replace(offsets, struct.pack("<3i", *evil)))
        assert "the data set is damaged" in refusal(folder)
