"""Labelled grids of pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
LABEL_LINES = 3


def labelled_grid(pictures: Sequence[Image.Image], labels: Sequence[str], title: str, columns: int = 4) -> Image.Image:
    """One picture: a title, then the pictures row by row, each under its label; small ones enlarged to 128 pixels."""
    scale = max(1, 128 // pictures[0].width)
    side = pictures[0].width * scale
    font = ImageFont.load_default(size=12)
    line = 15
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell_width, cell_height = side + MARGIN, side + LABEL_LINES * line + MARGIN
    grid = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + line + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(grid)
    pen.text((MARGIN, MARGIN), title, fill="black", font=font)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        row, column = divmod(index, columns)
        x, y = MARGIN + column * cell_width, line + 2 * MARGIN + row * cell_height
        lines = textwrap.wrap(label, width=max(8, side // 7), max_lines=LABEL_LINES, placeholder=" …")
        pen.multiline_text((x, y), "\n".join(lines), fill="black", font=font, spacing=2)
        enlarged = picture.resize((side, picture.height * scale), Image.Resampling.NEAREST)
        grid.paste(enlarged, (x, y + LABEL_LINES * line))
    return grid
