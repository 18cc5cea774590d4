"""Pictures are decoded upright, as RGB, over white, and nothing dangerous is decoded at all."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.image_file import read_image
from trainer.errors import UserError

BOMB_LIMIT_BYTES = 50 * 2**20


@pytest.fixture
def upright() -> Image.Image:
    return letters("abc/def")


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def webp_header(width: int, height: int) -> bytes:
    """A WebP file that claims a size and holds no picture."""
    bits = 0x2F | (width - 1) << 8 | (height - 1) << 22
    body = b"WEBPVP8L" + struct.pack("<I", 16) + bits.to_bytes(5, "little") + bytes(11)
    return b"RIFF" + struct.pack("<I", len(body)) + body


# How `abc / def` as stored is to be shown, by the EXIF standard's sides of the first row and first column.
SHOWN = {
    1: "abc/def",
    2: "cba/fed",
    3: "fed/cba",
    4: "def/abc",
    5: "ad/be/cf",
    6: "da/eb/fc",
    7: "fc/eb/da",
    8: "cf/be/ad",
}


def letters(text: str) -> Image.Image:
    """One gray block of 8 pixels a letter, far enough apart to survive JPEG."""
    rows = np.array([[(ord(letter) - ord("a")) * 50 for letter in row] for row in text.split("/")], np.uint8)
    return Image.fromarray(rows.repeat(8, axis=0).repeat(8, axis=1)).convert("RGB")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    letters("abc/def").save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    seen, expected = pixels(read_image(tmp_path / f"a.{suffix}")), pixels(letters(SHOWN[orientation]))
    assert seen.shape == expected.shape
    assert np.abs(seen - expected).mean() < 5


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_lose_the_picture(tmp_path, upright):
    upright.save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert (pixels(read_image(tmp_path / "a.png")) == pixels(upright)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_alpha_is_laid_over_white(tmp_path, mode, suffix):
    image = Image.new(mode, (8, 8), (0,) * (len(mode) - 1) + (0,))
    image.paste((0,) * (len(mode) - 1) + (255,), (0, 0, 2, 8))
    image.paste((0,) * (len(mode) - 1) + (128,), (2, 0, 4, 8))
    image.save(tmp_path / f"a.{suffix}", lossless=True)
    row = pixels(read_image(tmp_path / f"a.{suffix}"))[0]
    assert row[0].tolist() == [0, 0, 0]
    assert np.abs(row[2] - 127).max() <= 1
    assert row[7].tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_a_transparent_palette_colour_becomes_white(tmp_path, suffix):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 0, 0, 250])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / f"a.{suffix}", transparency=1)
    assert pixels(read_image(tmp_path / f"a.{suffix}")).tolist() == [[[200, 10, 20], [255, 255, 255]]]
    image.save(tmp_path / f"b.{suffix}")
    assert pixels(read_image(tmp_path / f"b.{suffix}")).tolist() == [[[200, 10, 20], [0, 0, 250]]]


def test_half_transparent_palette_colours_are_mixed_with_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=bytes([255, 128]))
    row = pixels(read_image(tmp_path / "a.png"))[0]
    assert row[0].tolist() == [0, 0, 0]
    assert row[1].tolist() == [127, 127, 127]


def test_one_transparent_colour_of_rgb_and_gray_becomes_white(tmp_path):
    Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert pixels(read_image(tmp_path / "rgb.png")).tolist() == [[[9, 8, 7], [255, 255, 255]]]
    Image.fromarray(np.array([[9, 40]], np.uint8)).save(tmp_path / "gray.png", transparency=40)
    assert pixels(read_image(tmp_path / "gray.png")).tolist() == [[[9, 9, 9], [255, 255, 255]]]


def test_sixteen_bit_gray_keeps_its_range(tmp_path):
    values = np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixels(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 0, 1, 127, 128, 255]


def test_sixteen_bit_gray_with_a_transparent_value_is_laid_over_white(tmp_path):
    rows = b"\0" + struct.pack(">3H", 0x1000, 0x2000, 0x2001)
    (tmp_path / "a.png").write_bytes(png(3, 1, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 0x2000))))
    assert pixels(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0x10, 255, 0x20]


def test_sixteen_bit_colour_is_read_by_its_high_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0x10FF, 0x8000, 0xFFFF)))
    assert pixels(read_image(tmp_path / "a.png"))[0, 0].tolist() == [0x10, 0x80, 0xFF]


def test_cmyk_jpeg_is_converted(tmp_path):
    for colour, cmyk in {
        (255, 0, 0): (0, 255, 255, 0),
        (0, 0, 255): (255, 255, 0, 0),
        (0, 0, 0): (0, 0, 0, 255),
    }.items():
        Image.new("CMYK", (16, 16), cmyk).save(tmp_path / "a.jpg")
        assert np.abs(pixels(read_image(tmp_path / "a.jpg"))[8, 8] - colour).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L"])
@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_black_and_white_and_gray_become_rgb(tmp_path, mode, suffix):
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    assert pixels(read_image(tmp_path / f"a.{suffix}"))[0, :, 1].tolist() == [0, 255]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, suffix):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], lossless=True)
    assert pixels(read_image(tmp_path / f"a.{suffix}"))[4, 4].tolist() == [255, 0, 0]


def test_the_content_decides_and_not_the_suffix(tmp_path, upright):
    upright.save(tmp_path / "a.jpg", format="PNG")
    assert (pixels(read_image(tmp_path / "a.jpg")) == pixels(upright)).all()


NOT_PICTURES = {
    b"": "empty",
    b"\n<!DOCTYPE html><html>not found</html>": "HTML",
    b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
    b"II*\0\x08\0\0\0": "TIFF",
    b"\0\0\0\x20ftypavif\0\0\0\0": "avif",
    b"%!PS-Adobe-3.0 EPSF-3.0\n": "25 21 50 53",
}


@pytest.mark.parametrize("content", NOT_PICTURES, ids=list(NOT_PICTURES.values()))
def test_what_is_no_picture_is_refused_by_what_it_is(tmp_path, content):
    (tmp_path / "cat.png").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_image(tmp_path / "cat.png")
    assert NOT_PICTURES[content] in error.value.what
    assert error.value.where == str(tmp_path / "cat.png")
    assert error.value.fix


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_a_truncated_picture_is_refused(tmp_path, suffix, kept):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / f"a.{suffix}")
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=rf"a\.{suffix}"):
        read_image(tmp_path / f"a.{suffix}")


def test_damage_anywhere_is_either_a_picture_or_a_user_error(tmp_path, upright):
    rng = np.random.default_rng(0)
    for suffix, refused in {"PNG": 100, "JPEG": 1, "WEBP": 20, "GIF": 1}.items():
        packed = io.BytesIO()
        upright.save(packed, suffix)
        errors = []
        for _ in range(150):
            content = bytearray(packed.getvalue())
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            (tmp_path / "a").write_bytes(content)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of Pillow, about odd metadata
                    assert read_image(tmp_path / "a").mode == "RGB"
            except UserError as error:
                errors.append(str(error))
        assert all(str(tmp_path / "a") in error for error in errors)
        assert len(errors) >= refused, suffix


def test_files_that_cannot_be_opened_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="directory"):
        read_image(tmp_path)


def test_the_pixel_limit_is_inclusive(tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=100).size == (10, 10)
    with pytest.raises(UserError, match=r"10 x 10 = 100 pixels is over the limit of 99"):
        read_image(tmp_path / "a.png", max_pixels=99)


READ_IN_A_FRESH_PROCESS = """
import resource, sys
from trainer.data.image_file import read_image
from trainer.errors import UserError
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image(sys.argv[1])
except UserError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


@pytest.mark.parametrize("side", [12_000, 20_000])
def test_a_decompression_bomb_is_refused_without_memory(tmp_path, side):
    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    assert len(bomb) < 50_000
    assert_refused_in_little_memory(tmp_path, bomb)


@pytest.mark.parametrize("side", [12_000, 16_383])
def test_a_webp_bomb_is_refused_without_memory(tmp_path, side):
    assert_refused_in_little_memory(tmp_path, webp_header(side, side))


def assert_refused_in_little_memory(tmp_path: Path, bomb: bytes) -> None:
    (tmp_path / "bomb").write_bytes(bomb)
    command = [sys.executable, "-c", READ_IN_A_FRESH_PROCESS, str(tmp_path / "bomb")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    grown, _, error = done.stdout.partition(" ")
    unit = 1 if sys.platform == "darwin" else 1024
    assert "limit" in error
    assert int(grown) * unit < BOMB_LIMIT_BYTES
    assert done.stderr == ""  # no warning of Pillow's beside our one error


def test_reading_changes_no_global_of_pillow(tmp_path, upright):
    from PIL import ImageFile

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    upright.save(tmp_path / "a.png")
    read_image(tmp_path / "a.png", max_pixels=10_000)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
