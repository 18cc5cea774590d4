"""Shards that the tests of webdataset write and open."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from trainer.data.record import Source
from trainer.data.sources.webdataset import WebDatasetRecords
from trainer.errors import UserError


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **header: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in header.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def write(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            add(tar, name, data)
    return path


def open_shards(shards: Any, **fields: Any) -> WebDatasetRecords:
    section = {"kind": "webdataset", "image_size": 32, "shards": str(shards) if isinstance(shards, Path) else shards}
    records = Source.parse(section | fields).open()
    assert isinstance(records, WebDatasetRecords)
    return records


def refusal(path: Path, **fields: Any) -> str:
    with pytest.raises(UserError) as error:
        open_shards(path, **fields)
    return str(error.value)


def old(path: Path, seconds: int = 1_600_000_000) -> Path:
    os.utime(path, (seconds, seconds))
    return path
