from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from trainer.data.record import Look, Record, Records, Source, silent
from trainer.rng import uniform

if TYPE_CHECKING:
    from PIL.Image import Image

RGB = tuple[int, int, int]
Polygon = tuple[tuple[float, float], ...]

# Hues at least 28 degrees apart; any two colours or backgrounds lie at least 120 apart in RGB.
COLOURS: dict[str, RGB] = {
    "red": (225, 0, 30),
    "orange": (255, 120, 0),
    "yellow": (255, 240, 0),
    "green": (0, 155, 50),
    "cyan": (0, 215, 225),
    "blue": (0, 60, 255),
    "purple": (140, 0, 200),
    "pink": (255, 90, 190),
}
BACKGROUNDS: dict[str, RGB] = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
SIZES: dict[str, float] = {"small": 0.15, "large": 0.28}  # the mean radius, as a fraction of the picture's side
SIZE_JITTER = 0.1
MARGIN = 0.04  # of the side, between the shape and the picture's edge
DRAWING = 1  # counts up when `draw` or `place` change the pictures, so that the fingerprint does


def _regular(corners: int, radius: float, start_degrees: float = -90.0) -> Polygon:
    """A polygon with its corners on a circle, the first one at the top; y points down."""
    angles = [math.radians(start_degrees + 360 * corner / corners) for corner in range(corners)]
    return tuple((radius * math.cos(angle), radius * math.sin(angle)) for angle in angles)


def _star(outer: float, inner: float) -> Polygon:
    tips, notches = _regular(5, outer), _regular(5, inner, start_degrees=-54.0)
    return tuple(point for pair in zip(tips, notches, strict=True) for point in pair)


def _cross(long: float, short: float) -> Polygon:
    quarter = ((-short, -long), (short, -long), (short, -short))
    turns = ((1, 0), (0, 1), (-1, 0), (0, -1))  # (cos, sin) of 0, 90, 180 and 270 degrees
    return tuple((c * x - s * y, s * x + c * y) for c, s in turns for x, y in quarter)


# In units of the radius, scaled to look equally large; a second outline is a hole.
OUTLINES: dict[str, tuple[Polygon, ...]] = {
    "circle": (_regular(96, 1.0),),
    "square": (_regular(4, 1.25, start_degrees=-45.0),),
    "triangle": (_regular(3, 1.3),),
    "star": (_star(1.35, 0.55),),
    "cross": (_cross(1.1, 0.36),),
    "ring": (_regular(96, 1.1), _regular(96, 0.6)),
}
SHAPES = tuple(OUTLINES)
TILT_DEGREES = {"square": 10.0, "triangle": 10.0, "star": 10.0, "cross": 10.0}  # at most, either way


class Combination(NamedTuple):
    """What a caption says; there are 288."""

    size: str
    colour: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


@dataclass(frozen=True)
class Place:
    """What a caption does not say: centre and radius as fractions of the picture's side, and the tilt."""

    x: float
    y: float
    radius: float
    degrees: float = 0.0


def combinations() -> list[Combination]:
    """All combinations, in an order fixed by a hash, so that any first few of them are a mixed lot."""
    everything = [Combination(*values) for values in product(SIZES, COLOURS, SHAPES, BACKGROUNDS)]
    return sorted(everything, key=lambda combination: hashlib.sha256(combination.caption.encode()).digest())


def held_out(fraction: float) -> list[Combination]:
    """The combinations that training never draws; each of their words still occurs in the others."""
    everything = combinations()
    left = Counter(word for combination in everything for word in combination)
    held: list[Combination] = []
    for combination in everything:
        if len(held) == round(fraction * len(everything)):
            break
        if all(left[word] > 1 for word in combination):
            held.append(combination)
            left.subtract(combination)
    return held


def place(combination: Combination, seed: int, index: int) -> Place:
    """Where record `index` has its shape: wholly inside the picture."""

    def between(low: float, high: float, stream: str) -> float:
        return low + (high - low) * uniform(seed, f"shapes/{stream}", index)

    radius = SIZES[combination.size] * between(1 - SIZE_JITTER, 1 + SIZE_JITTER, "radius")
    tilt = TILT_DEGREES.get(combination.shape, 0.0)
    edge = radius * max(math.hypot(x, y) for x, y in OUTLINES[combination.shape][0]) + MARGIN
    return Place(
        between(edge, 1 - edge, "x"),
        between(edge, 1 - edge, "y"),
        radius,
        between(-tilt, tilt, "tilt") if tilt else 0.0,
    )


def draw(combination: Combination, image_size: int, at: Place) -> Image:
    """The picture, RGB, `image_size` pixels square, with antialiased edges."""
    from PIL import Image

    picture = Image.new("RGB", (image_size, image_size), BACKGROUNDS[combination.background])
    picture.paste(COLOURS[combination.colour], mask=coverage(combination.shape, image_size, at))
    return picture


def coverage(shape: str, image_size: int, at: Place) -> Image:
    """How much of each pixel the shape covers, 8 bits, 255 for all of it."""
    from PIL import Image, ImageDraw

    fine = max(1, min(4, 4096 // image_size))  # fine pixels a pixel; beyond 4096 pixels steps no longer show
    mask = Image.new("L", (fine * image_size, fine * image_size))
    pen = ImageDraw.Draw(mask)
    c, s = math.cos(math.radians(at.degrees)), math.sin(math.radians(at.degrees))
    scale = fine * image_size
    for outline, ink in zip(OUTLINES[shape], (255, 0), strict=False):
        turned = [(at.x + at.radius * (c * x - s * y), at.y + at.radius * (s * x + c * y)) for x, y in outline]
        pen.polygon([(x * scale, y * scale) for x, y in turned], fill=ink)
    return mask.reduce(fine)


class Shapes(Source):
    """Built-in pictures of one coloured shape, drawn on the fly: nothing to download, and a known right answer."""

    kind = "shapes"

    image_size: int = Field(default=64, ge=32, le=8192, multiple_of=8, description="Side of the drawn picture, pixels.")
    num_images: int = Field(default=8192, ge=1, le=10_000_000, description="Records in an epoch.")
    held_out_fraction: float = Field(
        default=0.1,
        ge=0,
        le=0.9,
        description="Fraction of the 288 combinations never drawn, to test what was understood.",
    )
    data_seed: int = Field(
        default=0, ge=0, le=2**63 - 1, description="Chooses places, radii and tilts; other than train.seed."
    )

    def open(self) -> ShapeRecords:
        return ShapeRecords(self.num_images, self.image_size, self.held_out_fraction, self.data_seed)


class ShapeRecords(Records):
    """Record i is a function of (seed, i): all drawn combinations in turn, each time in another place."""

    def __init__(self, num_images: int, image_size: int, held_out_fraction: float = 0.0, seed: int = 0):
        self.num_images, self.image_size, self.seed = num_images, image_size, seed
        held = set(held_out(held_out_fraction))
        self.drawn = [combination for combination in combinations() if combination not in held]

    def __len__(self) -> int:
        return self.num_images

    def combination(self, index: int) -> Combination:
        """What record `index` shows."""
        if not 0 <= index < self.num_images:
            raise IndexError(f"record {index} of {self.num_images}")
        return self.drawn[index % len(self.drawn)]

    def __getitem__(self, index: int) -> Record:
        return Record(f"shapes/{self.seed}/{index}", (self.combination(index).caption,))

    def image(self, index: int) -> Image:
        combination = self.combination(index)
        return draw(combination, self.image_size, place(combination, self.seed, index))

    def caption_faults(self) -> Iterator[tuple[int, str]]:
        return iter(())

    def looks(self, fresh: bool = False, say: Callable[[str], None] = silent) -> Iterator[Look]:
        """Content is what the pictures are drawn from, not their pixels: their size in pixels does not matter."""
        drawing = hashlib.sha256(_drawing())
        for index in range(self.num_images):
            digest = drawing.copy()
            digest.update(json.dumps([self.seed, index, *self.combination(index)]).encode())
            yield Look(digest.hexdigest(), self.image_size, self.image_size)

    def fingerprint(self, contents: Iterable[str] | None = None) -> str:
        """Of the definition of the records, and so as quick for millions of them as for a few."""
        first = self.drawn[: self.num_images]
        definition = [self.num_images, self.seed, first, [combination.caption for combination in first]]
        return hashlib.sha256(_drawing() + json.dumps(definition).encode()).hexdigest()


def _drawing() -> bytes:
    """How a combination is drawn; corners to nine digits, because sines end differently on different machines."""
    corners = {
        shape: [[(round(x, 9) + 0.0, round(y, 9) + 0.0) for x, y in outline] for outline in outlines]
        for shape, outlines in OUTLINES.items()
    }
    tables = [DRAWING, COLOURS, BACKGROUNDS, SIZES, SIZE_JITTER, MARGIN, corners, TILT_DEGREES]
    return json.dumps(tables).encode()
