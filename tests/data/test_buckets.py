"""Which sizes there are, and that each picture gets the one that cuts least of it away."""

import subprocess
import sys
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from trainer.data.buckets import HELD_OUT, LEFT_OUT, MAX_BUCKETS, OUT_OF_SCALE, Bucket, assign, make_buckets
from trainer.errors import UserError

SETS = [((512,), 64, 2.0), ((1024,), 64, 4.0), ((512, 768, 1024), 64, 2.0), ((100,), 32, 3.0), ((127,), 64, 1.5)]


def sizes(n: int, seed: int, most: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    widths, heights = np.random.default_rng(seed).integers(1, most, (2, n))
    return widths, heights


def best_of_all(
    width: int, height: int, buckets: tuple[Bucket, ...], max_upscale: float | None, max_downscale: float | None
) -> int:
    """What `assign` promises, one picture at a time and in fractions."""
    found = []
    for code, bucket in enumerate(buckets):
        scale = max(Fraction(bucket.width, width), Fraction(bucket.height, height))
        kept = bucket.width * bucket.height / (scale * width * scale * height)
        if max_upscale is not None and scale > Fraction(max_upscale):
            continue
        if max_downscale is not None and scale < 1 / Fraction(max_downscale):
            continue
        found.append((kept, bucket.width * bucket.height, bucket.width, code))
    return max(found)[-1] if found else OUT_OF_SCALE


def test_the_buckets_of_512_px_are_those_that_everybody_has():
    assert " ".join(map(str, make_buckets([512], 64, 2.0))) == "384x640 448x576 512x512 576x448 640x384"
    wide = [bucket for bucket in make_buckets([512], 64, 4.0) if bucket.width > 640]
    assert " ".join(map(str, wide)) == "704x320 768x320 832x256 896x256 960x256 1024x256"


@pytest.mark.parametrize(("image_sizes", "step_px", "max_aspect"), SETS)
def test_buckets_are_as_large_as_step_area_and_aspect_allow(image_sizes, step_px, max_aspect):
    buckets = make_buckets(image_sizes, step_px, max_aspect)
    assert len(set(buckets)) == len(buckets)
    squares = {Bucket(side // step_px * step_px, side // step_px * step_px) for side in image_sizes}
    assert squares <= set(buckets)
    for width, height in buckets:
        assert width % step_px == height % step_px == 0
        assert Bucket(height, width) in buckets
        assert max(width, height) <= max_aspect * min(width, height)
        fits = [side for side in image_sizes if width * height <= side * side]
        assert fits
        grown = [(width + step_px) * height, width * (height + step_px)]
        full = any(max(grown) > side * side for side in fits)
        assert full or Bucket(width, height) in squares


@pytest.mark.parametrize(("image_sizes", "step_px", "max_aspect"), SETS)
def test_no_size_is_missing(image_sizes, step_px, max_aspect):
    expected = set()
    for side in image_sizes:
        for width in range(step_px, 4 * side, step_px):
            heights = [h for h in range(step_px, 4 * side, step_px) if width * h <= side * side]
            if heights and max(width, heights[-1]) <= max_aspect * min(width, heights[-1]):
                expected |= {(width, heights[-1]), (heights[-1], width)}
        expected.add((side // step_px * step_px,) * 2)
    assert set(make_buckets(image_sizes, step_px, max_aspect)) == expected


@pytest.mark.parametrize(("image_sizes", "step_px", "max_aspect"), SETS)
def test_buckets_come_from_the_tallest_to_the_widest_small_before_large(image_sizes, step_px, max_aspect):
    buckets = make_buckets(image_sizes, step_px, max_aspect)
    assert buckets == make_buckets(tuple(reversed(image_sizes)), step_px, max_aspect)
    order = [(Fraction(width, height), width) for width, height in buckets]
    assert order == sorted(order)


def test_too_many_buckets_for_a_byte_are_refused_with_a_sufficient_step():
    with pytest.raises(UserError) as error:
        make_buckets([1024], 8, 4.0)
    assert "buckets with sides in steps of 8 px; at most 250" in error.value.what
    many = int(error.value.what.split()[0].replace(",", ""))
    assert many > MAX_BUCKETS
    assert error.value.where == "data.bucket_step_px"
    assert error.value.fix
    enough = int(error.value.fix.split()[0])
    assert len(make_buckets([1024], enough, 4.0)) <= MAX_BUCKETS
    with pytest.raises(UserError):
        make_buckets([1024], enough - 8, 4.0)


def test_a_step_longer_than_the_side_is_refused():
    with pytest.raises(UserError, match=r"128 px .* 100 x 100 px\n  in data.bucket_step_px\n  100 or less"):
        make_buckets([512, 100], 128, 2.0)
    assert make_buckets([100], 100, 2.0) == (Bucket(100, 100),)


@pytest.mark.parametrize(("max_upscale", "max_downscale"), [(None, None), (1.0, None), (None, 2.0), (1.5, 3.0)])
@pytest.mark.parametrize(("image_sizes", "step_px", "max_aspect"), SETS)
def test_every_picture_has_the_bucket_that_cuts_least_of_it_away(
    image_sizes, step_px, max_aspect, max_upscale, max_downscale
):
    buckets = make_buckets(image_sizes, step_px, max_aspect)
    widths, heights = sizes(600, seed=1, most=3 * max(image_sizes))
    # Small numbers and the buckets' own sizes meet ties and exact fits.
    small = np.array([(w, h) for w in range(1, 13) for h in range(1, 13)]) * (max(image_sizes) // 8)
    widths = np.concatenate([widths, small[:, 0], [bucket.width for bucket in buckets]])
    heights = np.concatenate([heights, small[:, 1], [bucket.height for bucket in buckets]])
    codes = assign(widths, heights, buckets, max_upscale, max_downscale)
    assert codes.dtype == np.uint8
    pairs = zip(widths.tolist(), heights.tolist(), strict=True)
    expected = [best_of_all(w, h, buckets, max_upscale, max_downscale) for w, h in pairs]
    assert codes.tolist() == expected
    if max_upscale is not None:
        assert OUT_OF_SCALE in expected
    elif max_downscale is None:
        assert OUT_OF_SCALE not in expected


def test_a_picture_of_a_buckets_own_size_gets_that_bucket():
    buckets = make_buckets([512], 64, 4.0)
    assert assign([b.width for b in buckets], [b.height for b in buckets], buckets).tolist() == [*range(len(buckets))]


def test_of_buckets_that_cut_equally_the_larger_then_the_wider_is_taken():
    for buckets, best in (
        ([Bucket(64, 128), Bucket(128, 64)], 1),
        ([Bucket(128, 64), Bucket(64, 128)], 0),
        ([Bucket(128, 256), Bucket(128, 64)], 0),
        ([Bucket(64, 64), Bucket(256, 256), Bucket(128, 128)], 1),
    ):
        assert assign([1000], [1000], buckets).tolist() == [best]


def test_of_one_shape_the_largest_within_the_limits_is_taken():
    buckets = make_buckets([256, 512, 1024], 64, 1.0)
    sides = [100, 256, 300, 600, 1024, 3000]
    assert assign(sides, sides, buckets).tolist() == [2] * 6
    assert assign(sides, sides, buckets, max_upscale=1.0).tolist() == [OUT_OF_SCALE, 0, 0, 1, 2, 2]
    assert assign(sides, sides, buckets, 2.0, 2.0).tolist() == [OUT_OF_SCALE, 1, 1, 2, 2, OUT_OF_SCALE]


def test_a_scale_limit_includes_itself():
    buckets = [Bucket(110, 110)]
    assert assign([100, 99], [100, 99], buckets, max_upscale=1.1).tolist() == [0, OUT_OF_SCALE]
    assert assign([121, 122], [121, 122], buckets, max_downscale=1.1).tolist() == [0, OUT_OF_SCALE]
    # The scale that covers is the larger of the two axes'.
    assert assign([100], [1000], buckets, 1.1, 1.0).tolist() == [0]
    assert assign([99], [1000], buckets, max_upscale=1.1).tolist() == [OUT_OF_SCALE]


def test_pictures_too_large_for_64_bit_products_are_assigned_exactly():
    buckets = make_buckets([1024], 64, 4.0)
    side = 2**31 - 1
    pairs = [(side, side), (side, side - 1), (side, side // 2), (side // 3, side), (5, 7)]
    widths, heights = zip(*pairs, strict=True)
    expected = [best_of_all(w, h, buckets, None, None) for w, h in pairs]
    assert assign(np.array(widths), np.array(heights), buckets).tolist() == expected
    tie = [Bucket(64, 128), Bucket(128, 64)]
    assert assign([side, side - 1, side], [side, side, side - 1], tie).tolist() == [1, 0, 1]


def test_a_pictures_bucket_depends_on_no_other_picture_or_integer_type():
    buckets = make_buckets([512], 64, 2.0)
    widths, heights = sizes(200_000, seed=3)
    codes = assign(widths, heights, buckets, 2.0, 4.0)
    some = np.random.default_rng(0).permutation(len(widths))[:1000]
    assert assign(widths[some], heights[some], buckets, 2.0, 4.0).tolist() == codes[some].tolist()
    assert np.array_equal(assign(widths.astype(np.uint16), heights.astype(np.uint16), buckets, 2.0, 4.0), codes)
    assert assign([], [], buckets).tolist() == []


def test_assigning_buckets_takes_little_memory_over_that_of_its_codes():
    buckets = make_buckets([1024], 16, 4.0)
    widths, heights = (side.astype(np.uint16) for side in sizes(300_000, seed=4))
    tracemalloc.start()
    assign(widths, heights, buckets, 2.0, 4.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(buckets) > 100
    assert peak < 40e6 + len(widths)


def test_reserved_codes_are_no_buckets():
    assert len({HELD_OUT, LEFT_OUT, OUT_OF_SCALE} & {*range(MAX_BUCKETS)}) == 0
    assert {HELD_OUT, LEFT_OUT, OUT_OF_SCALE} <= {*range(251, 256)}


def test_buckets_are_made_without_numpy():
    script = "import sys; sys.modules['numpy'] = None; from trainer.data.buckets import *; make_buckets([512], 64, 2.0)"
    subprocess.run([sys.executable, "-c", script], check=True)
