"""Any picture becomes a sharp sample of the asked size; the crop and the flip are arguments."""

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.transforms import View, as_float, box, fit, size_condition, to_pixels


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def square(image: Image.Image, side: int, u_x: float, u_y: float, flip: bool) -> Image.Image:
    return fit(image, View(side, side, u_x, u_y, flip))


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the column and green the row, each over its whole range."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (64, 200), (200, 64), (1, 1), (1, 500), (33, 65), (641, 479), (2000, 1500)])
def test_every_picture_becomes_a_square_of_the_asked_size(size):
    for u in (0.0, 0.5, 1 - 2**-53):
        assert square(noise(*size), 64, u, u, True).size == (64, 64)


def test_a_picture_of_the_right_size_is_left_as_it_is():
    image = noise(64, 64)
    assert square(image, 64, 0.3, 0.9, False).tobytes() == image.tobytes()


def test_a_crop_without_resizing_keeps_whole_pixels():
    image = noise(96, 64)
    pixels = np.asarray(image)
    for u, left in ((0.0, 0), (0.5, 16), (1 - 2**-53, 32), (0.37, 12)):
        assert (np.asarray(square(image, 64, u, 0.5, False)) == pixels[:, left : left + 64]).all()
    tall = image.transpose(Image.Transpose.TRANSPOSE)
    assert (np.asarray(square(tall, 64, 0.0, 0.5, False)) == np.asarray(tall)[16:80]).all()


def test_every_place_of_a_crop_is_equally_likely():
    image = Image.fromarray(np.arange(67, dtype=np.uint8).reshape(1, 67).repeat(64, axis=0)).convert("RGB")
    lefts = [square(image, 64, (i + 0.5) / 400, 0.5, False).getpixel((0, 0)) for i in range(400)]
    assert [lefts.count((left, left, left)) for left in range(4)] == [100, 100, 100, 100]


def test_a_resized_crop_shows_the_asked_part():
    image = ramp(400, 200)
    for u, (first, last) in {0.0: (0, 127), 0.5: (64, 191), 1 - 2**-53: (128, 255)}.items():
        seen = np.asarray(square(image, 50, u, 0.5, False)).astype(int)
        assert abs(seen[25, 0, 0] - first) <= 3
        assert abs(seen[25, -1, 0] - last) <= 3
        assert seen[0, 25, 1] <= 3
        assert seen[-1, 25, 1] >= 252


def test_crop_and_resize_in_one_pass_equal_resize_then_crop():
    image = noise(300, 200).resize((600, 400), Image.Resampling.BICUBIC)
    whole = image.resize((150, 100), Image.Resampling.LANCZOS)
    assert (np.asarray(square(image, 100, 0.5, 0.5, False)) == np.asarray(whole.crop((25, 0, 125, 100)))).all()


def test_shrinking_is_antialiased():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # a picked pixel would be black or white; a filtered one is gray
    for size in (64, 200):
        inner = np.asarray(square(Image.fromarray(stripes), size, 0.5, 0.5, False)).astype(int)[:, 8:-8]
        assert np.abs(inner - 127).max() < 20, size


def test_shrinking_by_blocks_first_stays_close_to_the_exact_filter():
    image = noise(1600, 1200)
    exact = image.resize((64, 64), Image.Resampling.LANCZOS, box=(200, 0, 1400, 1200))
    assert np.abs(np.asarray(square(image, 64, 0.5, 0.5, False)).astype(int) - np.asarray(exact)).max() <= 6


def test_small_pictures_are_enlarged():
    seen = np.asarray(square(ramp(16, 16), 64, 0.5, 0.5, False)).astype(int)
    assert (np.diff(seen[32, :, 0]) >= 0).all()
    assert seen[32, 0, 0] <= 5
    assert seen[32, -1, 0] >= 250


def test_flip_mirrors_left_to_right_after_the_crop():
    image = noise(96, 64)
    plain, flipped = (np.asarray(square(image, 64, 0.2, 0.7, flip)) for flip in (False, True))
    assert (plain[:, ::-1] == flipped).all()


def test_a_tensor_is_channels_first_from_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 255, 51], [255, 0, 102]]], np.uint8))
    tensor = as_float(to_pixels(image))
    assert tensor.shape == (3, 1, 2)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert torch.equal(tensor[:2], torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]]]))
    assert torch.allclose(tensor[2], torch.tensor([[-0.6, -0.2]]))


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (480, 640), (1000, 100), (3, 500)])
@pytest.mark.parametrize("asked", [(96, 64), (64, 96), (128, 32), (64, 64)])
def test_a_sample_shows_as_much_of_the_picture_as_its_shape_allows(size, asked):
    view = View(asked[0], asked[1], 0.25, 0.75, flip=False)
    assert fit(noise(*size), view).size == asked
    left, top, width, height = box(size, view)
    assert width * asked[1] == pytest.approx(height * asked[0])
    assert width == size[0] or height == size[1], "one side is shown whole"
    assert (left, top) == pytest.approx((0.25 * (size[0] - width), 0.75 * (size[1] - height)))


def test_a_sample_of_the_pictures_own_shape_is_cropped_nowhere():
    image = noise(96, 64)
    assert box(image.size, View(48, 32, 0.9, 0.9, flip=False)) == (0, 0, 96, 64)
    assert fit(image, View(96, 64, 0.9, 0.9, flip=False)).tobytes() == image.tobytes()


def test_the_size_condition_is_what_sdxl_was_trained_with():
    # 1000 x 500 resized to cover 256 x 256 is 512 x 256, of which the crop at u = 0.25 starts at column 64.
    assert size_condition((1000, 500), View(256, 256, 0.25, 0.5, flip=False)) == [500, 1000, 0, 64, 256, 256]
    assert size_condition((500, 1000), View(256, 256, 0.5, 0.25, flip=True)) == [1000, 500, 64, 0, 256, 256]


def test_pixels_are_bytes_until_they_are_asked_for_as_floats():
    pixels = to_pixels(noise(5, 4))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 4, 5))
    assert torch.equal(as_float(torch.stack([pixels, pixels]))[1], as_float(pixels))
