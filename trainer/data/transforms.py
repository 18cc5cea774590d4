"""From a picture of any size to a training sample. All chance comes in as arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

TRANSFORM = 1  # counts up when `fit`, `as_float` or the reading of files change a pixel, so that caches know


class View(NamedTuple):
    """What a sample shows of its picture: the most of it that has the shape of the view, and where that is."""

    width: int  # pixels
    height: int
    u_x: float  # in [0, 1): from left to right; 0.5 is the centre
    u_y: float  # in [0, 1): from top to bottom
    flip: bool  # mirrored left to right, after the crop


def box(size: tuple[int, int], view: View) -> tuple[float, float, float, float]:
    """Left, top, width and height of what the view shows, in pixels of a picture of `size` (width, height)."""
    width, height = size
    if width * view.height >= height * view.width:  # wider than the view: all of its height is shown
        shown_width, shown_height = height * view.width / view.height, float(height)
    else:
        shown_width, shown_height = float(width), width * view.height / view.width
    return view.u_x * (width - shown_width), view.u_y * (height - shown_height), shown_width, shown_height


def fit(image: Image, view: View) -> Image:
    """What the view shows, resized to its pixels; a picture smaller than the view is enlarged."""
    from PIL import Image

    width, height = image.size
    left, top, shown_width, shown_height = box(image.size, view)
    if (shown_width, shown_height) == (view.width, view.height):  # whole pixels: nothing is resampled or blurred
        left, top = int(view.u_x * (width - view.width + 1)), int(view.u_y * (height - view.height + 1))
        shown = image.crop((left, top, left + view.width, top + view.height))
    else:
        # One pass computes only the pixels that are kept; the filter still sees the picture beyond the crop's edge.
        # Lanczos keeps the most detail that the small picture can hold without aliasing, for 1.4 times the time of
        # bicubic. Beyond a factor of six, averaging whole blocks first changes values by a few levels at most.
        area = (left, top, left + shown_width, top + shown_height)
        shown = image.resize((view.width, view.height), Image.Resampling.LANCZOS, box=area, reducing_gap=3.0)
    return shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else shown


def size_condition(size: tuple[int, int], view: View) -> list[int]:
    """SDXL's micro-conditioning (Podell et al. 2023, section 2.2): original height and width, the crop's top and left
    in pixels of the resized picture, and height and width of the sample."""
    left, top, shown_width, _ = box(size, view)
    scale = view.width / shown_width
    return [size[1], size[0], round(top * scale), round(left * scale), view.height, view.width]


def to_pixels(image: Image) -> Tensor:
    """An RGB picture as [3, H, W] uint8: a quarter of the bytes that workers would hand over as floats."""
    import numpy as np
    import torch

    assert image.mode == "RGB", f"a picture of mode {image.mode}"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # np.array copies: the picture's own buffer is read-only


def as_float(pixels: Tensor) -> Tensor:
    """Pixels [..., H, W] uint8 as the VAE takes them: float32 in [-1, 1], on their device."""
    import torch

    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
