"""What there is to know of one record's picture, from one reading of it."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING, NamedTuple

from trainer.data.audit.near import Gist, gist_of
from trainer.data.image_file import ORIENTATION, SHRINK, UPRIGHT, decode
from trainer.data.index import IndexedRecords
from trainer.data.looks import NOTHING
from trainer.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainer.data.record import Records

PNG_BITS = 24  # the byte of a PNG that says how many bits a channel has: Pillow hands out 16 of RGB as 8
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
# Bits of `Seen.traits`, what a picture is besides pixels.
ROTATED, TRANSPARENT, ANIMATED, GRAYSCALE, SIXTEEN_BIT, CMYK = (1 << bit for bit in range(6))


class Seen(NamedTuple):
    """A picture; of one with a fault, or that is drawn and not stored, some of it is empty."""

    content: str  # as in Look; "" if the picture is drawn
    fault: str | None = None
    over_limit: bool = False  # the fault is that it has too many pixels
    width: int = 0
    height: int = 0
    format: str = ""  # one of FORMATS
    traits: int = 0
    pixels: bytes = bytes(16)  # blake2b of the decoded pixels and their size
    gist: Gist = Gist(0, True, bytes(192))


def inspect(records: Records, index: int) -> Seen:
    """What record `index` is. Never raises: whatever reading it raises is its fault."""
    try:
        stored = records.data(index)
    except UserError as error:
        return Seen(NOTHING, error.what)
    except Exception as error:  # noqa: BLE001 (a record's own trouble must not end the reading of all others)
        return Seen(NOTHING, _told(error))
    content = "" if stored is None else hashlib.sha256(stored).hexdigest()
    try:
        if stored is not None and isinstance(records, IndexedRecords):
            image = decode(io.BytesIO(stored), "", records.max_pixels)  # as its `image` does, without reading twice
        else:
            image = records.image(index)
        kind, traits = ("", 0) if stored is None else _header(stored)
        return Seen(
            content,
            width=image.width,
            height=image.height,
            format=kind,
            traits=traits,
            pixels=_pixels(image),
            gist=gist_of(image),
        )
    except UserError as error:
        return Seen(content, error.what, over_limit=error.fix == SHRINK)
    except Exception as error:  # noqa: BLE001
        return Seen(content, _told(error))


def _told(error: Exception) -> str:
    return f"reading it failed: {type(error).__name__}: {error}".rstrip(": ")


def _header(stored: bytes) -> tuple[str, int]:
    """Format and traits of a picture file that was decoded: it is whole, and no bomb."""
    import warnings

    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(stored), formats=FORMATS) as image:
            kind = image.format or ""
            traits = _mode_traits(image.mode)
            if image.mode.startswith("I") or (kind == "PNG" and stored[PNG_BITS] == 16):
                traits |= SIXTEEN_BIT
            if kind == "MPO":  # a JPEG that carries further ones, as phones write them
                kind = "JPEG"
            elif getattr(image, "is_animated", False):
                traits |= ANIMATED
            if _orientation(image) in UPRIGHT:
                traits |= ROTATED
            # Many a picture has an alpha channel and not one transparent pixel.
            if image.has_transparency_data and _least_alpha(image) < 255:
                traits |= TRANSPARENT
    return kind, traits


def _mode_traits(mode: str) -> int:
    if mode.startswith("I") or mode in ("1", "L", "LA", "La", "F"):
        return GRAYSCALE
    return CMYK if mode == "CMYK" else 0


def _orientation(image: Image) -> object:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # noqa: BLE001 (as in `decode`: a block that cannot be read asks for nothing)
        return None


def _least_alpha(image: Image) -> int:
    if image.mode.startswith("I"):  # one gray value is transparent: too rare to look for
        return 0
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return int(lowest)  # pyright: ignore[reportArgumentType]


def _pixels(image: Image) -> bytes:
    digest = hashlib.blake2b(f"{image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()
