"""A small captioned image folder, written from the built-in shapes: something to try a config on."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

from trainer.data.image_file import read_image
from trainer.data.sources.shapes import ShapeRecords
from trainer.errors import UserError

METADATA = "metadata.jsonl"
MOST_IMAGES = 100_000
_PICTURE = re.compile(r"(\d{6})\.png")
_TEMP = ".dummy-imagefolder-tmp-"


def write_dummy_imagefolder(folder: str | os.PathLike[str], num_images: int, image_size: int, seed: int = 0) -> int:
    """Make `folder` hold `num_images` captioned PNG pictures and their `metadata.jsonl`; how many files were written.

    The same call twice gives the same folder and writes nothing the second time; after a call for fewer images the
    others stay, unlisted. Raises UserError, before it writes anything, if the folder holds a file that this function
    would not have written with this size and seed.
    """
    folder = Path(folder)
    if not 1 <= num_images <= MOST_IMAGES:
        raise UserError(f"{num_images} images cannot be written; the number is 1 to {MOST_IMAGES:,}")
    if not 8 <= image_size <= 8192:
        raise UserError(f"an image size of {image_size} pixels cannot be drawn; it is 8 to 8192")
    records = ShapeRecords(MOST_IMAGES, image_size, seed=seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = {name for name in os.listdir(folder) if not name.startswith(_TEMP)}
        for name in sorted(there):
            _check_ours(folder / name, records)
        written = 0
        for index in range(num_images):
            if _name(index) not in there:
                written += _write(folder / _name(index), _png(records, index))
        metadata = _metadata(records, num_images)
        # Last, so that a folder with metadata is whole.
        if METADATA not in there or (folder / METADATA).read_bytes() != metadata:
            written += _write(folder / METADATA, metadata)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    return written


def _check_ours(path: Path, records: ShapeRecords) -> None:
    refused = UserError(
        f"{path} was not written by this command with this size and seed; choose an empty or new folder"
    )
    picture = _PICTURE.fullmatch(path.name)
    if path.name == METADATA and path.is_file():
        text = path.read_bytes()
        if text != _metadata(records, min(text.count(b"\n"), MOST_IMAGES)):
            raise refused
    elif picture and path.is_file() and int(picture[1]) < MOST_IMAGES:
        # Pixels, not bytes: another version of zlib packs the same picture differently.
        try:
            same = read_image(path).tobytes() == records.image(int(picture[1])).tobytes()
        except UserError:
            raise refused from None
        if not same:
            raise refused
    else:
        raise refused


def _name(index: int) -> str:
    return f"{index:06d}.png"


def _metadata(records: ShapeRecords, num_images: int) -> bytes:
    lines = [json.dumps({"file_name": _name(index), "text": records[index].captions[0]}) for index in range(num_images)]
    return "".join(line + "\n" for line in lines).encode()


def _png(records: ShapeRecords, index: int) -> bytes:
    packed = io.BytesIO()
    records.image(index).save(packed, "PNG")
    return packed.getvalue()


def _write(path: Path, data: bytes) -> int:
    """Put a whole file in place or none; 1."""
    temp = path.with_name(f"{_TEMP}{os.getpid()}")
    temp.write_bytes(data)
    os.replace(temp, path)
    return 1
