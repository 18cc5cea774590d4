"""Labelled pictures of pictures: the grid of one step, and the same prompts step after step."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

MARGIN = 8
LINE = 15
LABEL_LINES = 3
TITLE_WIDTH = 76  # beside the rows of a progress sheet
LEAST_SIDE = 128  # smaller pictures are enlarged to it, in whole pixels
PROMPTS, PICTURE_SIDE = "prompts", "picture_px"  # what a grid's file says of itself


def labelled_grid(pictures: Sequence[Image.Image], labels: Sequence[str], title: str, columns: int = 4) -> Image.Image:
    """One picture: a title, then the pictures row by row, each under its label."""
    cell_width, cell_height = _cell(pictures[0].width)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + LINE + 2 * MARGIN), "white")
    ImageDraw.Draw(grid).text((MARGIN, MARGIN), title, fill="black", font=_font())
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = _place(index, columns, picture.width)
        _label(grid, (x, y - LABEL_LINES * LINE), label, cell_width - MARGIN)
        grid.paste(_enlarged(picture), (x, y))
    return grid


def grid_png(grid: Image.Image, labels: Sequence[str], picture_side: int) -> bytes:
    """The grid as a PNG that says which prompts it shows, so that `pictures_in` can read them back."""
    notes = PngInfo()
    notes.add_itxt(PROMPTS, json.dumps(list(labels), ensure_ascii=False))
    notes.add_text(PICTURE_SIDE, str(picture_side))
    return png(grid, notes)


def png(image: Image.Image, notes: PngInfo | None = None) -> bytes:
    """The content of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=notes)
    return file.getvalue()


def pictures_in(path: Path, labels: Sequence[str], columns: int = 4) -> list[Image.Image] | None:
    """The pictures of a grid's file in their own size, one a label; None if it shows other prompts."""
    with Image.open(path, formats=["PNG"]) as grid:
        grid.load()
        notes = grid.info
        if notes.get(PROMPTS) != json.dumps(list(labels), ensure_ascii=False):
            return None
        own, side = int(notes[PICTURE_SIDE]), _side(int(notes[PICTURE_SIDE]))
        found = []
        for index in range(len(labels)):
            x, y = _place(index, min(columns, len(labels)), own)
            found.append(grid.crop((x, y, x + side, y + side)).resize((own, own), Image.Resampling.NEAREST))
        return found


def progress_sheet(rows: dict[str, Sequence[Image.Image]], labels: Sequence[str]) -> Image.Image:
    """One column a prompt, its label above; one row of pictures for each title."""
    first = next(iter(rows.values()))[0]
    cell_width, row_height = _cell(first.width)[0], _side(first.width) + MARGIN
    top = LABEL_LINES * LINE + 2 * MARGIN
    sheet = Image.new("RGB", (TITLE_WIDTH + len(labels) * cell_width, top + len(rows) * row_height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        _label(sheet, (TITLE_WIDTH + column * cell_width, MARGIN), label, cell_width - MARGIN)
    for row, (title, pictures) in enumerate(rows.items()):
        y = top + row * row_height
        pen.text((MARGIN, y + row_height // 2 - LINE), title, fill="black", font=_font())
        for column, picture in enumerate(pictures):
            sheet.paste(_enlarged(picture), (TITLE_WIDTH + column * cell_width, y))
    return sheet


def _cell(width: int) -> tuple[int, int]:
    """Width and height that a picture of `width` pixels takes, with its label and margin."""
    return _side(width) + MARGIN, _side(width) + LABEL_LINES * LINE + MARGIN


def _place(index: int, columns: int, width: int) -> tuple[int, int]:
    """Where a grid has the upper left corner of its picture `index`."""
    row, column = divmod(index, columns)
    cell_width, cell_height = _cell(width)
    return MARGIN + column * cell_width, LINE + 2 * MARGIN + row * cell_height + LABEL_LINES * LINE


def _side(width: int) -> int:
    return width * max(1, LEAST_SIDE // width)


def _enlarged(picture: Image.Image) -> Image.Image:
    return picture.resize((_side(picture.width), _side(picture.width)), Image.Resampling.NEAREST)


def _label(image: Image.Image, at: tuple[int, int], text: str, width: int) -> None:
    lines = textwrap.wrap(text, width=max(8, width // 7), max_lines=LABEL_LINES, placeholder=" …")
    ImageDraw.Draw(image).multiline_text(at, "\n".join(lines), fill="black", font=_font(), spacing=2)


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=12)
