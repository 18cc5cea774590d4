"""What cannot be trained on is listed whole and refused, or left out and listed; never trained on in silence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.cli import main
from trainer.data.sources.imagefolder import ImageFolderRecords
from trainer.errors import UserError

CONFIG = """\
model: {{kind: tiny}}
data: {{kind: imagefolder, data_root: {pictures}, image_size: 32, num_workers: 0}}
train: {{seed: 7, max_steps: 3, global_batch_size: 8, log_every: 1}}
objective: {{kind: flow}}
lr: {{peak: 1e-3}}
"""
COUNT = 100


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    rows = []
    for index in range(COUNT):
        noise = np.random.default_rng(index).integers(0, 256, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}) + "\n")
    (root / "metadata.jsonl").write_text("".join(rows))
    return root


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(pictures=pictures))
    return path


def spoil(pictures: Path) -> set[str]:
    """Five pictures of a hundred that cannot be read, each in another way."""
    (pictures / "3.png").write_bytes((pictures / "3.png").read_bytes()[:1000])  # truncated
    (pictures / "17.png").write_bytes(b"")
    (pictures / "40.png").write_text("<!DOCTYPE html><title>404</title>")
    (pictures / "55.png").write_bytes(b"PK\x03\x04 an archive under the name of a picture")
    (pictures / "98.png").unlink()
    return {"3.png", "17.png", "40.png", "55.png", "98.png"}


def caption(pictures: Path, texts: dict[int, bytes]) -> None:
    """Put other JSON in the place of some captions."""
    lines = (pictures / "metadata.jsonl").read_bytes().splitlines(keepends=True)
    for index, text in texts.items():
        lines[index] = b'{"file_name": "%d.png", "text": %s}\n' % (index, text)
    (pictures / "metadata.jsonl").write_bytes(b"".join(lines))


def train(config: Path, run: Path, *overrides: str, resume: str = "none") -> int:
    options = ["--set", *overrides] if overrides else []
    return main(["train", "--config", str(config), "--output-dir", str(run), "--resume", resume, *options])


def bad_samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_by_default_bad_pictures_are_all_listed_before_the_first_step(
    config: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    spoil(pictures)
    (pictures / "98.png").write_bytes(b"x")  # a file that is missing is a fault of the metadata's line
    before = contents(pictures)
    assert train(config, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "of 100 records 5 pictures cannot be read" in said
    for name, reason in {
        "3.png": "damaged",
        "17.png": "the file is empty",
        "40.png": "it holds HTML or XML",
        "55.png": "it starts with the bytes 50 4b 03 04",
        "98.png": "not a picture",
    }.items():
        assert any(name in line and reason in line for line in said.splitlines()), name
    assert not (tmp_path / "run").exists()
    assert contents(pictures) == before, "no file of the user's is touched"


def test_skipped_pictures_are_listed_in_bad_samples(
    config: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    spoilt = spoil(pictures)
    before = contents(pictures)
    assert train(config, tmp_path / "run", "data.on_bad=skip") == 0
    assert "data   100 records = 95 to train on + 0 held out + 5 left out" in capsys.readouterr().out
    listed = bad_samples(tmp_path / "run")
    assert {line["key"] for line in listed} == spoilt
    assert {line["action"] for line in listed} == {"left out"}
    assert all(line["reason"].startswith(str(pictures)) for line in listed)
    manifest = json.loads((tmp_path / "run" / "run_manifest.json").read_text())
    assert [manifest["data"][name] for name in ("records", "training", "left_out")] == [100, 95, 5]
    assert contents(pictures) == before


def test_more_bad_pictures_than_allowed_end_the_start(config: Path, pictures: Path, tmp_path: Path, capsys):
    spoil(pictures)
    assert train(config, tmp_path / "run", "data.on_bad=skip", "data.max_bad_fraction=0.04") == 2
    assert "5 of 100 pictures cannot be read, more than data.max_bad_fraction = 0.04" in capsys.readouterr().err


CAPTIONS = {2: b'""', 5: b'" \\t"', 11: b"null", 23: b'"caf\xe9"', 31: b'["fine", ""]'}


def test_captions_without_words_are_all_listed_and_refused_by_default(config, pictures, tmp_path, capsys):
    caption(pictures, CAPTIONS)
    assert train(config, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "of 100 records 5 have no caption" in said
    for index in CAPTIONS:
        assert f"metadata.jsonl:{index + 1}: '{index}.png': " in said


def test_records_without_a_caption_are_counted(config, pictures, tmp_path, capsys):
    caption(pictures, CAPTIONS)
    assert train(config, tmp_path / "skip", "data.on_missing_caption=skip") == 0
    assert "95 to train on + 0 held out + 5 left out" in capsys.readouterr().out
    assert {line["key"] for line in bad_samples(tmp_path / "skip")} == {f"{index}.png" for index in CAPTIONS}
    assert train(config, tmp_path / "empty", "data.on_missing_caption=empty") == 0
    assert "note   4 of 100 records have no caption" in capsys.readouterr().out
    assert not (tmp_path / "empty" / "bad_samples.jsonl").exists()


def test_captions_that_are_cut_are_counted(config, pictures, tmp_path, capsys):
    caption(pictures, dict.fromkeys(range(COUNT), b'"%s"' % (b"a red circle " * 800)))
    assert train(config, tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["captions_cut"] for line in lines] == [8, 8, 8]
    said = capsys.readouterr().out
    assert "note   100 of 100 captions are longer than the 75 tokens that are read" in said
    assert "24 captions were longer than the text encoder reads" in said


@pytest.fixture
def unreadable_later(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Keys of pictures that a storage gave at the start and gives no more."""
    keys: set[str] = set()
    read = ImageFolderRecords.data

    def data(self: ImageFolderRecords, index: int) -> bytes:
        if self[index].key in keys:
            raise UserError("picture cannot be read: Input/output error", self.where(index))
        return read(self, index)

    monkeypatch.setattr(ImageFolderRecords, "data", data)
    return keys


def test_a_picture_that_becomes_unreadable_is_replaced_by_its_slot(
    config: Path, tmp_path: Path, unreadable_later: set[str]
):
    unreadable_later |= {f"{index}.png" for index in range(0, COUNT, 5)}
    wanted = ("data.on_bad=skip", "data.max_bad_fraction=0.5")
    assert train(config, tmp_path / "whole", *wanted) == 0
    listed = bad_samples(tmp_path / "whole")
    assert listed, "24 slots read about five of the pictures that are gone"
    tried = {(line["slot"], line["key"]) for line in listed}  # a substitute that is gone too has one of its own
    for line in listed:
        assert line["key"] in unreadable_later
        assert line["instead"] != line["key"]
        assert line["instead"] not in unreadable_later or (line["slot"], line["instead"]) in tried
        assert line["step"] == line["slot"] // 8 + 1
        assert line["action"] == "replaced"
    assert train(config, tmp_path / "broken", *wanted, "train.max_steps=2", "train.micro_batch_size=4") == 0
    assert train(config, tmp_path / "broken", *wanted, "train.micro_batch_size=2", resume="auto") == 0
    assert bad_samples(tmp_path / "broken") == listed, "no cut of the batch and no resume takes other substitutes"


def test_a_picture_that_becomes_unreadable_ends_a_run_by_default(
    config: Path, tmp_path: Path, unreadable_later: set[str], capsys
):
    unreadable_later |= {f"{index}.png" for index in range(0, COUNT, 5)}
    assert train(config, tmp_path / "run") == 2
    assert "picture cannot be read: Input/output error" in capsys.readouterr().err


def test_too_many_pictures_that_become_unreadable_end_the_run(config, tmp_path, unreadable_later, capsys):
    unreadable_later |= {f"{index}.png" for index in range(0, COUNT, 2)}
    assert train(config, tmp_path / "run", "data.on_bad=skip", "data.max_bad_fraction=0.03") == 2
    assert "more than data.max_bad_fraction = 0.03 of them; bad_samples.jsonl lists them" in capsys.readouterr().err
    assert len({line["key"] for line in bad_samples(tmp_path / "run")}) > 3


def test_records_left_out_for_their_captions_are_no_unreadable_pictures(config, pictures, tmp_path, unreadable_later):
    caption(pictures, dict.fromkeys(range(50, 100), b'""'))
    unreadable_later |= {f"{index}.png" for index in range(0, 50, 7)}
    skip = ("data.on_missing_caption=skip", "data.on_bad=skip", "data.max_bad_fraction=0.1")
    assert train(config, tmp_path / "run", *skip) == 0
    assert any(line["action"] == "replaced" for line in bad_samples(tmp_path / "run"))
