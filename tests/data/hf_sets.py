"""Data sets of Hugging Face `datasets` that the tests write and open; without the library they are skipped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import png

from trainer.data.record import Source
from trainer.data.sources.hf import HuggingFaceRecords
from trainer.errors import UserError

datasets = pytest.importorskip("datasets")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


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
