"""The same pictures are the same records, whatever they are stored in."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.data.record import Records, Source

CAPTIONS = {
    "a.png": ["a red square"],
    "b.jpg": ["größer 猫", "another"],
    "c.webp": ["with, comma"],
    "d.gif": ["x" * 400],
    "e.bmp": ["last"],
}


def write_folder(root: Path) -> Path:
    """A folder with one picture of each format, in the order of `CAPTIONS`."""
    root.mkdir()
    with open(root / "metadata.jsonl", "w", encoding="utf-8") as file:
        for number, (name, captions) in enumerate(CAPTIONS.items()):
            Image.linear_gradient("L").resize((40 + number, 36)).convert("RGB").save(root / name)
            file.write(json.dumps({"file_name": name, "text": captions}) + "\n")
    return root


def write_shards(root: Path, folder: Path, shards: int = 2) -> str:
    """The folder as tars in webdataset's layout; the pattern that names them."""
    root.mkdir()
    names = list(CAPTIONS)
    for shard in range(shards):
        with tarfile.open(root / f"{shard:04d}.tar", "w") as tar:
            for name in names[shard * len(names) // shards : (shard + 1) * len(names) // shards]:
                tar.add(folder / name, name)
                text = json.dumps({"text": CAPTIONS[name]}).encode()
                member = tarfile.TarInfo(f"{Path(name).stem}.json")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))
    return f"{root}/{{0000..{shards - 1:04d}}}.tar"


def write_datasets(root: Path, folder: Path) -> tuple[str, str]:
    """The folder as `datasets` saves it to disk, and as parquet."""
    import datasets

    def table(images: list[Any]) -> datasets.Dataset:
        columns = {"image": images, "text": list(CAPTIONS.values())}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    table([str(folder / name) for name in CAPTIONS]).save_to_disk(root / "saved")
    held = [{"bytes": (folder / name).read_bytes(), "path": name} for name in CAPTIONS]
    table(held).to_parquet(root / "train.parquet")
    return str(root / "saved"), str(root / "train.parquet")


def held(records: Records) -> list[tuple[Any, ...]]:
    looks = list(records.looks())
    return [
        (records[i], looks[i], records.data(i), records.image(i).tobytes(), records.held_out_by(i))
        for i in range(len(records))
    ]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("stores")
    folder = write_folder(root / "folder")
    saved, parquet = write_datasets(root, folder)
    shards = write_shards(root / "shards", folder)
    each = {
        "imagefolder": {"kind": "imagefolder", "data_root": str(folder)},
        "save_to_disk": {"kind": "hf", "dataset": saved},
        "parquet": {"kind": "hf", "dataset": parquet},
        "webdataset": {"kind": "webdataset", "shards": shards},
        "mix": {"kind": "mix", "sources": [{"source": {"kind": "imagefolder", "data_root": str(folder)}}]},
    }
    return {name: section | {"image_size": 32} for name, section in each.items()}


@pytest.mark.parametrize("name", ["save_to_disk", "parquet", "webdataset", "mix"])
def test_the_same_pictures_are_the_same_records_in_every_source(stores, name):
    folder, other = Source.parse(stores["imagefolder"]).open(), Source.parse(stores[name]).open()
    assert held(other) == held(folder)
    assert [record[0].key for record in held(other)] == list(CAPTIONS)
    assert other.fingerprint() == folder.fingerprint()
    assert list(other.looks(fresh=True)) == list(folder.looks())
