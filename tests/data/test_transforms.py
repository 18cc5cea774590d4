"""Any picture becomes a sharp square; the crop and the flip are arguments."""

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.transforms import fit, to_tensor


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the column and green the row, each over its whole range."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (64, 200), (200, 64), (1, 1), (1, 500), (33, 65), (641, 479), (2000, 1500)])
def test_every_picture_becomes_a_square_of_the_asked_size(size):
    for u in (0.0, 0.5, 1 - 2**-53):
        assert fit(noise(*size), 64, u, u, True).size == (64, 64)


def test_a_picture_of_the_right_size_is_left_as_it_is():
    image = noise(64, 64)
    assert fit(image, 64, 0.3, 0.9, False).tobytes() == image.tobytes()


def test_a_crop_without_resizing_keeps_whole_pixels_and_reaches_both_ends():
    image = noise(96, 64)
    pixels = np.asarray(image)
    for u, left in ((0.0, 0), (0.5, 16), (1 - 2**-53, 32), (0.37, 12)):
        assert (np.asarray(fit(image, 64, u, 0.5, False)) == pixels[:, left : left + 64]).all()
    tall = image.transpose(Image.Transpose.TRANSPOSE)
    assert (np.asarray(fit(tall, 64, 0.0, 0.5, False)) == np.asarray(tall)[16:80]).all()


def test_every_place_of_a_crop_is_equally_likely():
    image = Image.fromarray(np.arange(67, dtype=np.uint8).reshape(1, 67).repeat(64, axis=0)).convert("RGB")
    lefts = [fit(image, 64, (i + 0.5) / 400, 0.5, False).getpixel((0, 0)) for i in range(400)]
    assert [lefts.count((left, left, left)) for left in range(4)] == [100, 100, 100, 100]


def test_a_resized_crop_shows_the_asked_part():
    image = ramp(400, 200)
    for u, (first, last) in {0.0: (0, 127), 0.5: (64, 191), 1 - 2**-53: (128, 255)}.items():
        seen = np.asarray(fit(image, 50, u, 0.5, False)).astype(int)
        assert abs(seen[25, 0, 0] - first) <= 3
        assert abs(seen[25, -1, 0] - last) <= 3
        assert seen[0, 25, 1] <= 3
        assert seen[-1, 25, 1] >= 252


def test_crop_and_resize_in_one_pass_equal_resize_then_crop():
    image = noise(300, 200).resize((600, 400), Image.Resampling.BICUBIC)
    whole = image.resize((150, 100), Image.Resampling.LANCZOS)
    assert (np.asarray(fit(image, 100, 0.5, 0.5, False)) == np.asarray(whole.crop((25, 0, 125, 100)))).all()


def test_shrinking_is_antialiased():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # a picked pixel would be black or white; a filtered one is gray
    for size in (64, 200):
        inner = np.asarray(fit(Image.fromarray(stripes), size, 0.5, 0.5, False)).astype(int)[:, 8:-8]
        assert np.abs(inner - 127).max() < 20, size


def test_shrinking_a_large_picture_by_blocks_first_stays_close_to_the_exact_filter():
    image = noise(1600, 1200)
    exact = image.resize((64, 64), Image.Resampling.LANCZOS, box=(200, 0, 1400, 1200))
    assert np.abs(np.asarray(fit(image, 64, 0.5, 0.5, False)).astype(int) - np.asarray(exact)).max() <= 6


def test_small_pictures_are_enlarged():
    seen = np.asarray(fit(ramp(16, 16), 64, 0.5, 0.5, False)).astype(int)
    assert (np.diff(seen[32, :, 0]) >= 0).all()
    assert seen[32, 0, 0] <= 5
    assert seen[32, -1, 0] >= 250


def test_flip_mirrors_left_to_right_after_the_crop():
    image = noise(96, 64)
    plain, flipped = (np.asarray(fit(image, 64, 0.2, 0.7, flip)) for flip in (False, True))
    assert (plain[:, ::-1] == flipped).all()


def test_a_tensor_is_channels_first_and_runs_from_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 255, 51], [255, 0, 102]]], np.uint8))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 1, 2)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert torch.equal(tensor[:2], torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]]]))
    assert torch.allclose(tensor[2], torch.tensor([[-0.6, -0.2]]))
