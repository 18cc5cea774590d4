"""Reads back what a picture of one shape shows, drawn or generated: the measuring side of prompt adherence.

Nothing here is learnt: a frame that is background, a distance from it, the nearest named colour, and the overlap with
drawings of the six shapes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.sources.shapes import (
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    RGB,
    SIZE_JITTER,
    SIZES,
    TILT_DEGREES,
    Place,
    Polygon,
    coverage,
)

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.float64]

FAR = 60.0  # in RGB, half the least distance between two named colours: what is farther from all of them has no name
FRAME = 0.03  # of the side: narrower than the margin that a drawn shape keeps from the edge
LEAST_AREA = 0.005  # of the picture; the smallest drawn shape covers four times as much
LEAST_OVERLAP = 0.7  # intersection over union; drawn shapes reach 0.95, a circle laid over a square 0.8
TILTS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of the most that a shape is turned
# Between the two sizes, equally far from either as a ratio.
MIDDLE_RADIUS = math.sqrt(SIZES["small"] * (1 + SIZE_JITTER) * SIZES["large"] * (1 - SIZE_JITTER))


class Reading(NamedTuple):
    """What a picture shows, in the words of a caption; None for what it shows too badly to be named."""

    size: str | None
    colour: str | None
    shape: str | None
    background: str | None


def read(picture: Image) -> Reading:
    """What an RGB picture of any square size shows."""
    pixels = np.asarray(picture, dtype=np.float64)
    paper = np.median(_frame(pixels), axis=0)
    background = _named(paper, BACKGROUNDS)
    distance = np.linalg.norm(pixels - paper, axis=-1)
    if np.mean(distance > FAR) < LEAST_AREA:
        return Reading(None, None, None, background)
    # The inside of the shape: most of it, and without the edges, which are mixed with the background.
    inside = distance > 0.8 * np.quantile(distance[distance > FAR], 0.9)
    ink = np.median(pixels[inside], axis=0)
    shape, radius = _best_shape(_covered(pixels, paper, ink))
    size = None if shape is None else "small" if radius < MIDDLE_RADIUS else "large"
    return Reading(size, _named(ink, COLOURS), shape, background)


def _frame(pixels: Pixels) -> Pixels:
    """The pixels along the four edges, [n, 3]."""
    width = max(1, int(FRAME * len(pixels)))
    inner = np.ones(pixels.shape[:2], dtype=bool)
    inner[width:-width, width:-width] = False
    return pixels[inner]


def _named(rgb: Pixels, among: dict[str, RGB]) -> str | None:
    """The name of a colour, None if no named one is near or the nearest is not `among` these."""
    name, there = min((COLOURS | BACKGROUNDS).items(), key=lambda item: math.dist(rgb, item[1]))
    return name if name in among and math.dist(rgb, there) < FAR else None


def _covered(pixels: Pixels, paper: Pixels, ink: Pixels) -> Pixels:
    """How much of each pixel is ink rather than paper, [H, W] in [0, 1]; traces are taken for noise."""
    way = ink - paper
    share = ((pixels - paper) @ way) / (way @ way)
    return np.where(share < 0.2, 0.0, np.minimum(share, 1.0))


def _best_shape(covered: Pixels) -> tuple[str | None, float]:
    """The shape whose drawing, of equal area and centre, overlaps most with `covered`, and its radius."""
    side, area = len(covered), covered.sum()
    x = (covered.sum(axis=0) @ (np.arange(side) + 0.5)) / area / side
    y = (covered.sum(axis=1) @ (np.arange(side) + 0.5)) / area / side
    best: tuple[float, str | None, float] = (LEAST_OVERLAP, None, 0.0)
    for shape in OUTLINES:
        radius = math.sqrt(area / UNIT_AREAS[shape]) / side
        tilt = TILT_DEGREES.get(shape)
        for degrees in [turn * tilt for turn in TILTS] if tilt else [0.0]:
            drawn = np.asarray(coverage(shape, side, Place(x, y, radius, degrees)), dtype=np.float64) / 255
            overlap = np.minimum(covered, drawn).sum() / np.maximum(covered, drawn).sum()
            best = max(best, (overlap, shape, radius), key=lambda each: each[0])
    return best[1], best[2]


def _polygon_area(outline: Polygon) -> float:
    """The shoelace formula."""
    following = (*outline[1:], outline[0])
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(outline, following, strict=True))) / 2


# Of each shape at radius 1; a second outline is a hole.
UNIT_AREAS = {
    shape: _polygon_area(outer) - sum(_polygon_area(hole) for hole in holes)
    for shape, (outer, *holes) in OUTLINES.items()
}
