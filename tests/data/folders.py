"""Folders of pictures that the tests of imagefolder write the metadata of, and open."""

import json
from pathlib import Path

import pytest

from trainer.data.sources.imagefolder import ImageFolder, ImageFolderRecords
from trainer.errors import UserError


def line(name: object, text: object = "a cat") -> str:
    return json.dumps({"file_name": name, "text": text})


def open_folder(root: Path | str, **fields: object) -> ImageFolderRecords:
    return ImageFolder.model_validate({"data_root": str(root), "image_size": 64, **fields}).open()


def open_lines(root: Path, *lines: str, **fields: object) -> ImageFolderRecords:
    (root / "metadata.jsonl").write_text("".join(text + "\n" for text in lines), encoding="utf-8")
    return open_folder(root, **fields)


def refusal(root: Path, *lines: str, **fields: object) -> str:
    with pytest.raises(UserError) as error:
        open_lines(root, *lines, **fields)
    return str(error.value)
