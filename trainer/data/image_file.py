"""Decoding one picture file that a stranger may have made.

What a file holds is told by its first bytes, never by its suffix, and only the decoders listed here are ever run: PNG,
JPEG, WebP, BMP and GIF. TIFF is left out on purpose: libtiff has by far the longest record of memory-safety advisories
and web-scale data does not need it. Of an animation the first frame is read. Colour profiles are not applied.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

from trainer.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

MAX_PIXELS = 89_478_485  # Pillow's own warning level: a quarter of a GiB as RGB
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")  # to recognise pictures by name, not to decode them
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # Pillow's name of the transposition that undoes each EXIF orientation; 1 is upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
SHRINK = "shrink it, remove its line from the metadata, or raise data.max_pixels"
REPLACE = "replace the file or remove its line from the metadata"


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image:
    """The picture in a file, as `decode` gives it; raises UserError as that does, and for an unreadable file."""
    where = os.fspath(path)
    try:
        with open(path, "rb") as file:
            return decode(file, where, max_pixels)
    except OSError as error:
        raise UserError(f"picture cannot be read: {error.strerror}", where, REPLACE) from error


def decode(file: BinaryIO, where: str, max_pixels: int = MAX_PIXELS) -> Image:
    """The picture that an open file holds: upright, RGB, 8 bits a channel, transparency laid over white.

    Raises UserError naming `where` and the reason; a picture over `max_pixels` is refused from its header alone.
    """
    from PIL import Image

    try:
        image = _open(file, where)
        width, height = image.size
        if width * height > max_pixels:
            raise UserError(too_large(width, height, max_pixels), where, SHRINK)
        image.load()
        return _to_rgb(_upright(image))
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # WebP's header is checked by Pillow itself, at twice MAX_PIXELS
        raise UserError(f"picture is over the pixel limit: {error}", where, SHRINK) from error
    except Exception as error:  # damaged files make the decoders raise anything from SyntaxError to struct.error
        if isinstance(error, OSError) and error.errno:  # the decoders' own OSErrors carry no number
            raise UserError(f"picture cannot be read: {error.strerror}", where, REPLACE) from error
        raise UserError(f"picture is damaged: {str(error) or type(error).__name__}", where, REPLACE) from error


def too_large(width: int, height: int, max_pixels: int) -> str:
    """Why a picture of this size is refused."""
    return f"picture of {width} x {height} = {width * height:,} pixels is over the limit of {max_pixels:,}"


def _open(file: BinaryIO, where: str) -> ImageFile:
    """The header of a picture, without its pixels."""
    head = file.read(32)
    opener = _opener(head)
    if opener is None:
        raise UserError(f"not a picture that can be read: {_what(head)}", where, REPLACE)
    file.seek(0)
    # The plug-ins are called by name: Image.open would warn on stderr above half of its own limit, and that limit is
    # a global of Pillow, where ours is an argument.
    return opener(file)


def _opener(head: bytes) -> Callable[[BinaryIO], ImageFile] | None:
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if head.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile
    if head.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile
    return None


def _what(head: bytes) -> str:
    """What a file that is no picture of ours seems to be."""
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; `git lfs pull` fetches the picture"
    if head.lstrip().startswith(b"<"):
        return "it holds HTML or XML, often the error page of a failed download"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "TIFF is not read; convert it to PNG"
    if head[4:8] == b"ftyp":
        return f"{head[8:12].decode('ascii', 'replace')!r} (AVIF, HEIC or video) is not read; convert it to PNG"
    return f"it starts with the bytes {head[:8].hex(' ')}; PNG, JPEG, WebP, BMP and GIF are read"


def _upright(image: Image) -> Image:
    """The picture turned as its EXIF orientation asks; an unreadable EXIF block asks for nothing, as in viewers."""
    from PIL import Image

    try:
        orientation = image.getexif().get(ORIENTATION)
    except (SyntaxError, ValueError, LookupError, TypeError, OSError, ArithmeticError, struct.error):
        return image
    name = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image.transpose(Image.Transpose[name]) if name else image


def _to_rgb(image: Image) -> Image:
    """The picture as 8-bit RGB, transparent parts over white."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return _gray16_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray16_to_rgb(image: Image) -> Image:
    """16-bit gray by its high byte, which is also how Pillow reads 16-bit RGB; its own convert() would clip at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    gray = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")
