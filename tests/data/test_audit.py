"""Reading every record survives any of them, and pictures that look alike are found without comparing all pairs."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from trainer.data.audit import near
from trainer.data.audit.album import Album
from trainer.data.audit.captions import count_captions, count_tokens
from trainer.data.audit.duplicates import find_duplicates
from trainer.data.audit.near import alike, close_pairs, distance, gist_of, popcount
from trainer.data.audit.reading import read_all
from trainer.data.looks import NOTHING
from trainer.data.record import Look, Record, Records, Source, silent
from trainer.data.sources.shapes import ShapeRecords
from trainer.errors import UserError


class Dangerous(Records):
    """Pictures of which some cannot be read without harm."""

    def __init__(self, count: int, harm: dict[int, str] | None = None):
        self.count, self.harm = count, harm or {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        return Record(f"{index}.png", ("words",))

    def data(self, index: int) -> bytes:
        match self.harm.get(index):
            case "crash":
                os._exit(139)
            case "hang":
                time.sleep(1000)
            case "raise":
                raise ZeroDivisionError("of a plug-in")
            case "refuse":
                raise UserError("the disk says no")
        packed = io.BytesIO()
        Image.new("RGB", (8, 8), (index % 256, 0, 0)).save(packed, "PNG")
        return packed.getvalue()

    def image(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.data(index))).convert("RGB")

    def looks(self, fresh: bool = False, say: object = silent) -> Iterator[Look]:
        raise NotImplementedError


@pytest.mark.parametrize("workers", [0, 2])
def test_each_record_is_reported_once_whatever_reading_it_raises(workers: int):
    records = Dangerous(70, {3: "raise", 40: "refuse"})
    seen = list(read_all(records, workers))
    assert sorted(index for index, _ in seen) == list(range(70))
    faults = {index: one.fault for index, one in seen if one.fault}
    assert faults == {3: "reading it failed: ZeroDivisionError: of a plug-in", 40: "the disk says no"}
    assert {one.content for index, one in seen if index in faults} == {NOTHING}


@pytest.mark.slow
def test_a_record_that_ends_or_hangs_its_reader_costs_no_other_record():
    records = Dangerous(70, {0: "crash", 1: "crash", 20: "hang", 69: "crash"})
    started = time.monotonic()
    seen = list(read_all(records, workers=2, stuck_seconds=8.0))
    assert sorted(index for index, _ in seen) == list(range(70))
    faults = {index: one.fault for index, one in seen if one.fault}
    crashed = "reading it ended the process that did so (exit code 139)"
    assert faults == {0: crashed, 1: crashed, 69: crashed, 20: "reading it took over 8 s"}
    assert time.monotonic() - started < 60


def test_contents_are_those_that_fingerprints_are_made_of():
    records = ShapeRecords(6, 32)
    album = Album.of(records, read_all(records, 0), lambda: None)
    assert list(album) == list(records.contents())
    assert records.fingerprint(album) == records.fingerprint()


# Pictures that look alike


def picture(seed: int, side: int = 160) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    return Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)


def packed_anew(image: Image.Image, quality: int) -> Image.Image:
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=quality)
    return Image.open(packed).convert("RGB")


VERSIONS = {
    "packed": lambda image: packed_anew(image, 30),
    "small": lambda image: image.resize((48, 48), Image.Resampling.LANCZOS),
    "another shape": lambda image: image.resize((200, 120), Image.Resampling.BICUBIC),
    "brighter": lambda image: image.point(lambda level: min(255, level + 15)),
    "cut by 1 %": lambda image: image.crop((1, 1, 159, 159)),
}


def near_groups(images: list[Image.Image]) -> list[int]:
    gists = [gist_of(image) for image in images]
    cells = np.frombuffer(b"".join(gist.cells for gist in gists), np.uint8).reshape(len(images), -1)
    return alike(np.array([gist.hash for gist in gists], np.uint64), cells).tolist()


@pytest.mark.parametrize("version", VERSIONS)
def test_another_version_of_a_picture_looks_like_it(version: str):
    images = [picture(seed) for seed in range(8)]
    assert near_groups([*images, *map(VERSIONS[version], images)]) == [*range(8), *range(8)]


def test_pictures_that_differ_in_colour_alone_do_not_look_alike():
    disc = Image.new("L", (96, 96))
    for x in range(96):
        for y in range(96):
            if (x - 48) ** 2 + (y - 48) ** 2 < 900:
                disc.putpixel((x, y), 255)
    images = []
    for colour in ((200, 60, 60), (60, 130, 60)):  # about equally bright
        images.append(Image.new("RGB", (96, 96), "white"))
        images[-1].paste(colour, mask=disc)
    assert popcount(np.array([gist_of(images[0]).hash ^ gist_of(images[1]).hash], np.uint64))[0] <= near.MOST_BITS
    assert near_groups(images) == [0, 1]


def test_a_plain_picture_is_said_to_be_too_plain():
    noise = np.random.default_rng(0).normal(128, 3, (96, 96, 3)).clip(0, 255).astype(np.uint8)
    fade = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None, None], (96, 96, 3))
    for plain in (Image.new("RGB", (9, 200), "red"), Image.fromarray(noise), Image.fromarray(np.array(fade))):
        assert gist_of(plain).plain
    assert not gist_of(picture(0)).plain


def pairs_of(hashes: np.ndarray, bits: int) -> set[tuple[int, int]]:
    found = {
        (min(a, b), max(a, b)) for one, other in close_pairs(hashes, bits) for a, b in zip(one, other, strict=True)
    }
    return {(int(a), int(b)) for a, b in found}


@pytest.mark.parametrize("most_alike", [100, 2048])
@pytest.mark.parametrize("bits", [0, 3, 6])
def test_close_pairs_are_all_those_that_comparing_each_with_each_finds(
    bits: int, most_alike: int, monkeypatch: pytest.MonkeyPatch
):
    rng = np.random.default_rng(bits)
    few = rng.integers(0, 2**64, 40, np.uint64)
    some = np.repeat(few, 10)
    for _ in range(7):  # clusters, and many with most bits in common
        some ^= np.where(rng.random(400) < 0.6, np.uint64(1) << rng.integers(0, 64, 400, np.uint64), np.uint64(0))
    hashes = np.unique(np.r_[some, rng.integers(0, 2**9, 200, np.uint64) << np.uint64(20)])
    apart = popcount(np.bitwise_xor(hashes[:, None], hashes[None, :], dtype=np.uint64))
    expected = {(int(a), int(b)) for a, b in zip(*np.nonzero(apart <= bits), strict=True) if a < b}
    assert bits == 0 or len(expected) > 100
    monkeypatch.setattr(near, "MOST_ALIKE", most_alike)
    assert pairs_of(hashes, bits) == expected


def test_hashes_that_are_nearly_all_the_same_take_bounded_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(near, "MOST_ALIKE", 20)
    hashes = np.arange(1024, dtype=np.uint64) << np.uint64(30)
    compared = [0]

    def counting(words: np.ndarray) -> np.ndarray:
        compared[0] += words.size
        return popcount(words)

    monkeypatch.setattr(near, "popcount", counting)
    assert {(index, index + 1) for index in range(0, 1024, 2)} <= pairs_of(hashes, 3)
    assert compared[0] < 1024 * 1024


def test_popcount_counts_bits():
    words = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    words[:2] = 0, 2**64 - 1
    assert popcount(words).tolist() == [int(word).bit_count() for word in words]


def test_the_first_record_of_a_group_names_it():
    cells = np.zeros((6, 192), np.uint8)
    hashes = np.array([7, 2**40, 7, 2**40 + 1, 3, 2**63 - 1], np.uint64)
    assert alike(hashes, cells, bits=1).tolist() == [0, 1, 0, 1, 0, 5]
    cells[3, :96] = 255
    assert alike(hashes, cells, bits=1).tolist() == [0, 1, 0, 3, 0, 5]


def test_what_is_only_brighter_is_at_no_distance():
    cells = np.arange(192, dtype=np.uint8)[None]
    assert distance(cells, cells + np.uint8(20))[0] == pytest.approx(0, abs=1e-3)
    assert distance(cells, np.zeros_like(cells))[0] > 50


class Twice(Dangerous):
    """Each picture is listed again, as by a source with repeats."""

    def held_out_by(self, index: int) -> str:
        return f"{index // 2}.png"

    def data(self, index: int) -> bytes:
        return super().data(index // 2)


def test_what_the_source_lists_again_is_no_duplicate():
    records = Twice(10)
    found = find_duplicates(records, Album.of(records, read_all(records, 0), lambda: None))
    assert (found.same_bytes, found.same_pixels, found.listed_again) == ([], [], 5)


# Captions


class Captioned(Dangerous):
    def __init__(self, captions: list[tuple[str, ...]]):
        super().__init__(len(captions))
        self.captions = captions

    def __getitem__(self, index: int) -> Record:
        return Record(f"{index}.png", self.captions[index])


def test_captions_are_counted_as_trained_on():
    source = Source.parse(
        {
            "kind": "shapes",
            "image_size": 32,
            "caption_prefix": "see ",
            "caption_templates": ["{caption}", "a {caption} here"],
        }
    )
    records = Captioned([("one two",), ("",), ("x", "one two"), ("a b c d e",)])
    counted = count_tokens(source, records, {1}, lambda texts: [len(text.split()) for text in texts], room=5)
    assert counted.captions == 8
    assert dict(counted.lengths) == {3: 2, 5: 2, 2: 1, 4: 1, 6: 1, 8: 1}
    assert [tuple(cut) for cut in counted.cut] == [(3, 8, 2)]
    assert (counted.captions_cut, counted.lost, counted.longest) == (2, 4, (8, 3))
    assert [row["captions"] for row in counted.histogram()] == [0, 1, 2, 1, 2, 2]
    written = count_captions(records, {1})
    assert (written.written, written.distinct) == (4, 3)
    assert [(each.record, each.caption, each.records) for each in written.repeated] == [(0, "one two", 2)]
