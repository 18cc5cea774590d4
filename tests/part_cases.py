"""Builds any kind of any family, for the tests of the parts.

Only a kind with a required argument of a new name needs an entry in `REQUIRED`.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.data.dummy import write_dummy_imagefolder
from trainer.models.base import ModelFamily
from trainer.models.folder import save_diffusers_folder
from trainer.registry import Part

Make = Callable[..., Any]


def _pictures(folder: Path) -> str:
    write_dummy_imagefolder(folder / "pictures", num_images=6, image_size=40)
    return str(folder / "pictures")


def _shards(folder: Path) -> str:
    with tarfile.open(folder / "0.tar", "w") as tar:
        tar.add(_pictures(folder), "pictures")
    return str(folder / "{0..0}.tar")


def _dataset(folder: Path) -> str:
    import datasets

    pictures = Path(_pictures(folder))
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    columns = {"image": [str(pictures / row["file_name"]) for row in rows], "text": [row["text"] for row in rows]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.save_to_disk(folder / "dataset")
    return str(folder / "dataset")


def _pretrained(folder: Path) -> str:
    save_diffusers_folder(ModelFamily.parse({"kind": "tiny"}).load(0), folder / "model")
    return str(folder / "model")


# The values of arguments that some kind requires, by name; each is made once, below a folder of its own.
REQUIRED: dict[str, Callable[[Path], Any]] = {
    "image_size": lambda folder: 32,
    "peak": lambda folder: 1e-3,
    "data_root": _pictures,
    "shards": _shards,
    "dataset": _dataset,
    "sources": lambda folder: [{"source": {"kind": "imagefolder", "data_root": _pictures(folder)}, "repeats": 2}],
    "pretrained": _pretrained,
    "dir": lambda folder: str(folder / "cache"),
}


def kinds(family: type[Part]) -> list[Any]:
    return [pytest.param(part, id=kind) for kind, part in family.kinds().items()]


def maker(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A function that builds a kind, with what it requires beyond the given values."""
    made: dict[str, Any] = {}

    def build(part: type[Part], **values: Any) -> Part:
        for name, field in part.model_fields.items():
            if field.is_required() and name not in values:
                if name not in made:
                    made[name] = REQUIRED[name](tmp_path_factory.mktemp(name))
                values[name] = made[name]
        return part(**values)

    return build
