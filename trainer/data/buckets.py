"""Aspect buckets: the sizes that pictures are cropped to, and which of them each picture gets."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from trainer.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A picture's code is the place of its bucket, or, from 251 on, why it has none. One byte a picture.
MAX_BUCKETS = 250
HELD_OUT, LEFT_OUT, OUT_OF_SCALE = 255, 254, 253

BLOCK = 1 << 16  # pictures assigned at a time: temporaries stay below 50 MB with 250 buckets


class Bucket(NamedTuple):
    """The size of a training crop, pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def make_buckets(image_sizes: Sequence[int], step_px: int, max_aspect: float) -> tuple[Bucket, ...]:
    """The buckets of every side in `image_sizes`, from the tallest shape to the widest, of one shape the smaller first.

    For a side s: the square of s rounded down to `step_px`, and for every multiple of `step_px` as one side the largest
    as the other that keeps the area within s x s, both ways round, where no side is over `max_aspect` times the other.
    (NovelAI 2022, "NovelAI improvements on Stable Diffusion", and kohya's sd-scripts make theirs in this way.)

    Raises UserError for a side below the step, and for more than MAX_BUCKETS.
    """
    assert image_sizes, "buckets of no image size"
    if step_px > min(image_sizes):
        side = min(image_sizes)
        raise UserError(
            f"no bucket with sides in steps of {step_px} px fits into the area of {side} x {side} px",
            "data.bucket_step_px",
            f"{side} or less",
        )
    found = _sizes(image_sizes, step_px, max_aspect)
    if len(found) > MAX_BUCKETS:
        enough = step_px
        while len(_sizes(image_sizes, enough, max_aspect)) > MAX_BUCKETS:
            enough += step_px
        raise UserError(
            f"{len(found):,} buckets with sides in steps of {step_px} px; at most {MAX_BUCKETS} are possible",
            "data.bucket_step_px",
            f"{enough} is enough, or allow less narrow shapes or fewer sizes",
        )
    return tuple(sorted(found, key=lambda bucket: (Fraction(*bucket), bucket.width)))


def _sizes(image_sizes: Sequence[int], step_px: int, max_aspect: float) -> set[Bucket]:
    found = set()
    for side in image_sizes:
        square = side // step_px * step_px
        found.add(Bucket(square, square))
        longest = int(side * max_aspect**0.5) + 1  # a longer side is over max_aspect times the other
        for one in range(step_px, longest + 1, step_px):
            other = side * side // one // step_px * step_px
            if other and max(one, other) <= max_aspect * min(one, other):
                found |= {Bucket(one, other), Bucket(other, one)}
    return found


def assign(
    widths: Sequence[int] | NDArray[np.integer],
    heights: Sequence[int] | NDArray[np.integer],
    buckets: Sequence[Bucket],
    max_upscale: float | None = None,
    max_downscale: float | None = None,
) -> NDArray[np.uint8]:
    """For each picture the place in `buckets` of the one that cuts least of it away, [N] uint8.

    A picture is scaled until it covers its bucket, and what juts out is cut off. Buckets that would enlarge it over
    `max_upscale` times or shrink it over `max_downscale` times are not for it; with none left its code is OUT_OF_SCALE.
    Of buckets that cut away equally little, the larger area is taken, then the wider.

    The fractions are compared in whole numbers, so a picture has the same bucket on every machine.
    """
    import numpy as np

    assert 0 < len(buckets) <= MAX_BUCKETS, f"{len(buckets)} buckets"
    codes = np.empty(len(widths), np.uint8)
    for start in range(0, len(widths), BLOCK):
        part = slice(start, start + BLOCK)
        w, h = np.asarray(widths[part], np.int64), np.asarray(heights[part], np.int64)
        assert min(w.min(), h.min()) > 0, "a picture without a size"
        codes[part] = _assign_block(w, h, buckets, max_upscale, max_downscale)
    return codes


def _assign_block(
    w: NDArray[np.int64],
    h: NDArray[np.int64],
    buckets: Sequence[Bucket],
    max_upscale: float | None,
    max_downscale: float | None,
) -> NDArray[np.uint8]:
    # With r = bucket width / height and R = picture width / height, a bucket of r <= R keeps r/R of the picture and one
    # of r > R keeps R/r. So only two can be best: the last allowed one up to R and the first one beyond.
    import numpy as np

    narrower, wider = np.full((2, len(w)), OUT_OF_SCALE, np.uint8)
    shapes = [Fraction(*bucket) for bucket in buckets]
    areas = [bucket.width * bucket.height for bucket in buckets]
    is_wider = [width * h > height * w for width, height in buckets]
    allowed = [_allowed(w, h, bucket, max_upscale, max_downscale) for bucket in buckets]
    # The last one written stays: the nearest shape, and of one shape the largest.
    for code in sorted(range(len(buckets)), key=lambda code: (shapes[code], areas[code])):
        narrower[allowed[code] & ~is_wider[code]] = code
    for code in sorted(range(len(buckets)), key=lambda code: (-shapes[code], areas[code])):
        wider[allowed[code] & is_wider[code]] = code

    side = max(int(w.max()), int(h.max())) * max(map(max, buckets))
    exact = np.int64 if side < 2**31 else object  # Python's integers where the products below could overflow
    bucket_w, bucket_h = np.ones((2, 256), exact)
    bucket_w[: len(buckets)], bucket_h[: len(buckets)] = np.array(buckets).T
    # r of the narrower / R against R / r of the wider, multiplied out.
    of_narrower = bucket_w[narrower] * bucket_w[wider] * h.astype(exact) ** 2
    of_wider = bucket_h[narrower] * bucket_h[wider] * w.astype(exact) ** 2
    area = bucket_w * bucket_h
    larger = area[narrower] > area[wider]  # of equal areas the wider is the wider one
    better = (of_narrower > of_wider) | ((of_narrower == of_wider) & larger)
    take = (narrower != OUT_OF_SCALE) & ((wider == OUT_OF_SCALE) | better.astype(bool))
    return np.where(take, narrower, wider)


def _allowed(
    w: NDArray[np.int64], h: NDArray[np.int64], bucket: Bucket, max_upscale: float | None, max_downscale: float | None
) -> NDArray[np.bool_]:
    """Whether the scale that makes each picture cover the bucket, the larger of its two axes', is within the limits."""
    import numpy as np

    allowed = np.ones(len(w), bool)
    if max_upscale is not None:
        allowed &= (bucket.width <= max_upscale * w) & (bucket.height <= max_upscale * h)
    if max_downscale is not None:
        allowed &= (w <= max_downscale * bucket.width) | (h <= max_downscale * bucket.height)
    return allowed
