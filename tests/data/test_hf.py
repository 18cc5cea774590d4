"""Data sets of Hugging Face `datasets`: saved, in parquet, and on a hub; no file outside of them is ever read."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trainer.data.record import Source
from trainer.data.sources.hf import HuggingFaceRecords
from trainer.errors import UserError

datasets = pytest.importorskip("datasets")

ROOT = Path(__file__).parents[2]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(colour: str = "red", size: tuple[int, int] = (4, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def open_set(dataset: Path | str, **fields: Any) -> HuggingFaceRecords:
    records = Source.parse({"kind": "hf", "dataset": str(dataset), "image_size": 32} | fields).open()
    assert isinstance(records, HuggingFaceRecords)
    return records


def refusal(dataset: Path | str, **fields: Any) -> str:
    with pytest.raises(UserError) as error:
        open_set(dataset, **fields)
    return str(error.value)


def parquet(path: Path, images: list[Any], text: list[Any] | None = None, kind: Any = IMAGE, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = text if text is not None else [f"caption {number}" for number in range(len(images))]
    pq.write_table(pa.table({"image": pa.array(images, kind), "text": text} | columns), path)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    return path


def saved(path: Path, split: str | None = None, **columns: Any) -> Path:
    columns = columns or {"image": [{"bytes": png(), "path": "a.png"}, {"bytes": png("blue"), "path": "b.png"}]}
    columns.setdefault("text", ["a", "b"])
    table = datasets.Dataset.from_dict(columns, split=split).cast_column("image", datasets.Image())
    table.save_to_disk(path)
    return path


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def keys(records: HuggingFaceRecords) -> list[str]:
    return [records[index].key for index in range(len(records))]


# What rows are


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


def test_keys_are_paths_as_they_stand_the_last_part_of_absolute_ones_or_the_rows_number(tmp_path):
    paths = ["a.png", "./sub//b.png", "/home/somebody/c.png", "../d.png", None, "", "a.png", "/x/a.png", "a.png#2"]
    images = [{"bytes": png(), "path": path} for path in paths]
    records = open_set(parquet(tmp_path / "a.parquet", images))
    wanted = ["a.png", "sub/b.png", "c.png", "d.png", "4", "5", "a.png#2", "a.png#3", "a.png#2#2"]
    assert keys(records) == wanted


def test_a_column_may_name_the_records_and_then_names_each_once(tmp_path):
    images = [{"bytes": png(), "path": "same.png"}] * 2
    path = parquet(tmp_path / "a.parquet", images, id=[7, 8], word=["x", "x"], gap=["x", None])
    assert keys(open_set(path, key_column="id")) == ["7", "8"]
    assert f"key 'x' is in row 0 already\n  in {path}:1" in refusal(path, key_column="word")
    assert "column 'gap' is empty" in refusal(path, key_column="gap")
    assert "no column 'ids'" in refusal(path, key_column="ids")


def test_missing_and_empty_captions_are_told_by_row(tmp_path):
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
def test_a_wrong_column_is_told_with_those_there_are(tmp_path, case):
    fields, reason = COLUMNS[case]
    path = parquet(tmp_path / "a.parquet", [png()], ["x"], pa.binary(), label=[3])
    told = refusal(path, **fields)
    assert reason in told
    assert str(path) in told


def test_bombs_damage_and_rows_without_a_picture_are_faults_of_their_records(tmp_path):
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


def test_workers_map_the_files_themselves_and_need_no_datasets(tmp_path):
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


def test_parquet_files_of_a_split_are_told_by_their_names(tmp_path):
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


def test_what_is_no_data_set_is_told(tmp_path, monkeypatch):
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


def test_nothing_is_drawn_on_the_terminal_and_torchvision_is_left_alone(tmp_path, capfd):
    path = parquet(tmp_path / "a.parquet", [png()] * 3, kind=pa.binary())
    list(open_set(path).looks())
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    assert "torchvision" not in sys.modules


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


# The hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as downloads of a data set ask for."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    card: dict[str, Any] = {}
    status: dict[str, tuple[int, str]] = {}  # of repositories, with X-Error-Code

    def log_message(self, format: str, *_: Any) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        for name, (status, code) in self.status.items():
            if f"/{name}/" in f"{path}/":
                return self.answer(b"{}", status, X_Error_Code=code)
        if path.startswith("/api/datasets/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in self.files.items()
            ]
            return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
        if path.startswith("/api/datasets/"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "me/set", "sha": COMMIT, "siblings": siblings, "cardData": self.card, "private": False}
            return self.answer(json.dumps(info | {"downloads": 0, "likes": 0, "tags": []}).encode())
        data = self.files.get(path.partition(f"/resolve/{COMMIT}/")[2])
        if data is None:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        return self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    import huggingface_hub
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    Hub.files, Hub.card, Hub.status = {}, {}, {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    huggingface_hub.close_session()
    yield Hub
    huggingface_hub.close_session()
    server.shutdown()


def table(folder: Path, count: int) -> bytes:
    return parquet(folder / "made.parquet", [png()] * count, kind=pa.binary()).read_bytes()


def test_a_data_set_on_the_hub_is_downloaded_by_split_and_names_its_commit(hub, tmp_path, capfd):
    for number, name in enumerate(("train-00000-of-00001", "test-00000-of-00001"), 1):
        hub.files[f"data/{name}.parquet"] = table(tmp_path, number)
    records = open_set("me/set", split="test")
    assert len(records) == 2
    assert records.provenance() == {"revision": COMMIT}
    downloaded = {path.name for path in (tmp_path / "hub").rglob("*.parquet")}
    assert downloaded == {"test-00000-of-00001.parquet"}
    assert capfd.readouterr() == ("", "")


def test_what_was_downloaded_is_read_without_the_hub(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub.files["data/train-0.parquet"] = table(tmp_path, 2)
    first = open_set("me/set", revision=COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = open_set("me/set", revision=COMMIT)
    assert again.fingerprint() == first.fingerprint()
    assert again.provenance() == {"revision": COMMIT}
    told = refusal("me/other")
    assert "no path of this name exists, it is not downloaded, and the hub cannot be reached" in told


def test_configurations_of_the_readme_or_of_folders_are_chosen(hub, tmp_path):
    for number, name in enumerate(("en/train-0.parquet", "fr/train-0.parquet", "fr/held.parquet"), 1):
        hub.files[name] = table(tmp_path, number)
    told = refusal("me/set")
    assert "it has several configurations; there are en, fr" in told
    assert "set data.config_name" in told
    assert "there is no configuration 'de'; there are en, fr" in refusal("me/set", config_name="de")
    assert len(open_set("me/set", config_name="fr")) == 2
    hub.card = {
        "configs": [
            {"config_name": "english", "data_files": "en/*.parquet", "default": True},
            {"config_name": "french", "data_files": [{"split": "train", "path": ["fr/train-*", "nothing"]}, HELD]},
            {"config_name": "evil", "data_files": [{"split": "train", "path": "/etc/*"}]},
        ]
    }
    assert len(open_set("me/set")) == 1
    assert len(open_set("me/set", config_name="french", split="odd")) == 3
    assert "there is no split 'test'; there is train, odd" in refusal("me/set", config_name="french", split="test")
    assert "no parquet file is called /etc/*" in refusal("me/set", config_name="evil")


HELD = {"split": "odd", "path": "**/held.parquet"}


def test_a_repository_cannot_name_files_outside_of_itself(hub, tmp_path):
    data = table(tmp_path, 1)
    for name in ("../../../up.parquet", "/abs.parquet", "a/../../b.parquet"):
        hub.files = {name: data}
        assert "it has no parquet file" in refusal("me/set")


def test_a_data_set_without_parquet_is_told_where_a_copy_may_be(hub):
    hub.files["pictures.zip"] = hub.files["script.py"] = b"import os"
    assert "data.revision=refs/convert/parquet is a copy" in refusal("me/set")


HUB_ERRORS = {
    "not there": (404, "RepoNotFound", "the hub has no such data set"),
    "gated": (403, "GatedRepo", "its owner has not let you in"),
    "no such revision": (404, "RevisionNotFound", "there is no revision 'v9'"),
    "down": (500, "", "no path of this name exists, and the hub cannot be reached"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_errors_of_the_hub_are_one_line_each(hub, case):
    status, code, reason = HUB_ERRORS[case]
    hub.status = {"me/gone": (status, code)}
    told = refusal("me/gone", revision="v9")
    assert reason in told
    assert "in hub data set me/gone" in told
    assert len(told.splitlines()) == 3


@pytest.mark.integration
def test_a_small_public_data_set_is_read_from_the_hub(tmp_path):
    records = open_set("hf-internal-testing/fixtures_image_utils", revision="refs/convert/parquet", split="test")
    assert records.image(0).mode == "RGB"
