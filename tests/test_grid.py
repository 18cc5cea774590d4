"""Grids say what they show, so that the sheet of all steps is made from the files of a run alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trainer.grid import grid_png, labelled_grid, pictures_in, progress_sheet

LABELS = ["ein roter Kreis", "a “blue” square", "x" * 300, "", "five"]


def picture(seed: int, side: int = 64) -> Image.Image:
    return Image.effect_noise((side, side), 10 + seed).convert("RGB")


@pytest.mark.parametrize("side", [32, 64, 96, 200])
def test_pictures_come_back_from_a_grid_pixel_for_pixel(tmp_path: Path, side: int):
    pictures = [picture(seed, side) for seed in range(len(LABELS))]
    path = tmp_path / "grid.png"
    path.write_bytes(grid_png(labelled_grid(pictures, LABELS, "step 3"), LABELS, side))
    found = pictures_in(path, LABELS)
    assert found is not None
    assert [each.tobytes() for each in found] == [each.tobytes() for each in pictures]


def test_a_grid_of_other_prompts_is_left_out(tmp_path: Path):
    path = tmp_path / "grid.png"
    path.write_bytes(grid_png(labelled_grid([picture(0)], ["a"], "step 3"), ["a"], 64))
    assert pictures_in(path, ["b"]) is None
    labelled_grid([picture(0)], ["a"], "step 3").save(path)  # a grid that says nothing of itself
    assert pictures_in(path, ["a"]) is None


def test_a_sheet_has_a_column_for_each_prompt_and_a_row_for_each_step():
    pictures = {step: [picture(10 * step + column) for column in range(3)] for step in range(2)}
    sheet = progress_sheet({f"step {step}": row for step, row in pictures.items()}, ["a", "b", "c"])
    for step, row in pictures.items():
        for column, each in enumerate(row):
            x, y = 76 + column * 136, 61 + step * 136
            seen = sheet.crop((x, y, x + 128, y + 128)).resize((64, 64), Image.Resampling.NEAREST)
            assert seen.tobytes() == each.tobytes(), (step, column)
