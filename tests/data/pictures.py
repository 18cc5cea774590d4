"""Small pictures that the tests of data store."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

LONG_AGO = 1_600_000_000 * 10**9  # an mtime, in nanoseconds


def png(colour: str = "red", size: tuple[int, int] = (4, 4), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


def picture(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
