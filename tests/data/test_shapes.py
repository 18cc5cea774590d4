"""The built-in pictures show what their captions say, and held-out combinations never occur."""

import math
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from trainer.data.dummy import write_dummy_imagefolder
from trainer.data.image_file import read_image
from trainer.data.sources.imagefolder import ImageFolder, ImageFolderRecords
from trainer.data.sources.shapes import (
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    SHAPES,
    SIZE_JITTER,
    SIZES,
    Combination,
    Place,
    ShapeRecords,
    Shapes,
    combinations,
    draw,
    held_out,
    place,
)
from trainer.errors import UserError

ROOT = Path(__file__).parents[2]


def shapes(**fields: object) -> ShapeRecords:
    return Shapes.model_validate(fields).open()


def read_back(folder: Path) -> ImageFolderRecords:
    return ImageFolder.model_validate({"data_root": str(folder), "image_size": 64}).open()


def mask(combination: Combination, image_size: int, at: Place) -> np.ndarray:
    """Where the shape is, by nearest colour, [image_size, image_size] bool."""
    pixels = np.asarray(draw(combination, image_size, at)).astype(int)
    ink, paper = np.array(COLOURS[combination.colour]), np.array(BACKGROUNDS[combination.background])
    return np.square(pixels - ink).sum(-1) < np.square(pixels - paper).sum(-1)


def test_there_are_288_combinations_with_288_captions():
    assert (len(COLOURS), len(SHAPES), len(SIZES), len(BACKGROUNDS)) == (8, 6, 2, 3)
    assert len({combination.caption for combination in combinations()}) == 288


def test_a_caption_reads_as_promised():
    assert Combination("large", "red", "circle", "white").caption == "a large red circle on a white background"
    record = ShapeRecords(10, 64)[3]
    assert record.captions == (ShapeRecords(10, 64).combination(3).caption,)


def test_colours_and_backgrounds_are_far_apart():
    everything = {**COLOURS, **BACKGROUNDS}
    assert min(math.dist(everything[a], everything[b]) for a in everything for b in everything if a != b) >= 119


def test_a_picture_has_the_colours_of_its_caption():
    for index, combination in enumerate(combinations()):
        at = place(combination, 0, index)
        seen = Counter(draw(combination, 64, at).get_flattened_data())
        assert [colour for colour, _ in seen.most_common(1)] == [BACKGROUNDS[combination.background]]
        assert seen[COLOURS[combination.colour]] >= 40, combination


def test_every_shape_lies_inside_the_picture():
    for combination in combinations():
        for index in range(60):
            at = place(combination, 1, index)
            c, s = math.cos(math.radians(at.degrees)), math.sin(math.radians(at.degrees))
            for x, y in OUTLINES[combination.shape][0]:
                assert 0.039 < at.x + at.radius * (c * x - s * y) < 0.961
                assert 0.039 < at.y + at.radius * (s * x + c * y) < 0.961


@pytest.mark.parametrize("image_size", [32, 64, 200])
def test_the_frame_of_every_picture_is_background(image_size):
    for index, combination in enumerate(combinations()):
        pixels = np.asarray(draw(combination, image_size, place(combination, 2, index)))
        frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (frame == BACKGROUNDS[combination.background]).all(), combination


def test_a_large_shape_covers_over_twice_a_small_one_of_its_kind():
    for shape in SHAPES:
        smallest = Place(0.5, 0.5, SIZES["large"] * (1 - SIZE_JITTER))
        largest = Place(0.5, 0.5, SIZES["small"] * (1 + SIZE_JITTER))
        large = mask(Combination("large", "red", shape, "white"), 64, smallest).sum()
        small = mask(Combination("small", "red", shape, "white"), 64, largest).sum()
        assert large > 2 * small, shape


def test_each_of_the_six_shapes_matches_its_own_template_best():
    """By the overlap of the masks: each drawn shape matches the upright template of its own kind best."""

    def template(shape: str, size: str, at: Place) -> np.ndarray:
        return mask(Combination(size, "red", shape, "white"), 64, at)

    for size in SIZES:
        for shape in SHAPES:
            for index in range(25):
                at = place(Combination(size, "red", shape, "white"), 3, index)
                seen = template(shape, size, at)
                overlap = {}
                for other in SHAPES:
                    expected = template(other, size, Place(at.x, at.y, at.radius))
                    overlap[other] = (seen & expected).sum() / (seen | expected).sum()
                assert max(overlap, key=overlap.__getitem__) == shape, (size, overlap)


def test_only_the_ring_has_a_hole():
    for shape in SHAPES:
        seen = mask(Combination("small", "blue", shape, "gray"), 64, Place(0.5, 0.5, SIZES["small"]))
        assert seen[32, 32] == (shape != "ring"), shape


@pytest.mark.parametrize("image_size", [64, 256])
def test_edges_are_antialiased_and_the_shape_is_where_it_was_asked(image_size):
    at = Place(0.4, 0.55, 0.25)
    gray = np.asarray(draw(Combination("large", "yellow", "circle", "black"), image_size, at))[..., 0] / 255
    assert len(np.unique(gray)) > 8
    assert abs(gray.mean() - math.pi * at.radius**2) < 0.002
    rows, columns = (np.indices(gray.shape) + 0.5) / image_size
    assert abs((columns * gray).sum() / gray.sum() - at.x) < 0.1 / image_size
    assert abs((rows * gray).sum() / gray.sum() - at.y) < 0.1 / image_size


def test_one_record_shows_the_same_scene_at_any_size():
    small, large = (ShapeRecords(50, size) for size in (64, 256))
    for index in range(50):
        shrunk = np.asarray(large.image(index).reduce(4)).astype(int)
        assert np.abs(shrunk - np.asarray(small.image(index))).mean() < 1.5


def test_a_record_is_a_function_of_its_index_alone():
    records = shapes(num_images=100)
    backwards = [records.image(index).tobytes() for index in reversed(range(100))]
    again = pickle.loads(pickle.dumps(shapes(num_images=5000)))
    assert [again.image(index).tobytes() for index in range(100)] == backwards[::-1]
    assert len({records[index].key for index in range(100)}) == 100
    assert len(set(backwards)) == 100


def test_another_seed_draws_other_places():
    assert ShapeRecords(1, 64, seed=1).image(0).tobytes() != ShapeRecords(1, 64, seed=2).image(0).tobytes()


def test_held_out_combinations_never_occur_in_training():
    records = shapes(num_images=2000, held_out_fraction=0.1)
    seen = {records.combination(index) for index in range(2000)}
    held = set(held_out(0.1))
    assert len(held) == 29
    assert not seen & held
    assert seen | held == set(combinations())


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_every_word_still_occurs_in_training(fraction):
    held = held_out(fraction)
    assert len(held) == len(set(held)) == round(288 * fraction)
    trained = set(combinations()) - set(held)
    for position, words in enumerate((SIZES, COLOURS, SHAPES, BACKGROUNDS)):
        assert {combination[position] for combination in trained} == set(words)


def test_even_a_fraction_that_leaves_almost_nothing_keeps_every_word():
    trained = set(combinations()) - set(held_out(1.0))
    assert {word for combination in trained for word in combination} == {*SIZES, *COLOURS, *SHAPES, *BACKGROUNDS}


def test_a_smaller_fraction_is_held_out_of_a_larger_one_too():
    assert set(held_out(0.05)) < set(held_out(0.2))


def test_every_training_combination_is_drawn_equally_often():
    records = ShapeRecords(259 * 4, 64, 0.1)
    assert set(Counter(records.combination(index) for index in range(len(records))).values()) == {4}


def test_the_first_few_records_are_a_mixed_lot():
    first = [ShapeRecords(8, 64).combination(index) for index in range(8)]
    assert all(len({combination[position] for combination in first}) > 1 for position in range(4))


def test_indices_outside_are_refused():
    with pytest.raises(IndexError):
        ShapeRecords(4, 64)[4]
    with pytest.raises(IndexError):
        ShapeRecords(4, 64).image(-1)


def test_the_fingerprint_tells_what_is_drawn_but_not_how_large():
    base = shapes(num_images=100).fingerprint()
    assert shapes(num_images=100, image_size=128).fingerprint() == base
    for changed in ({"num_images": 101}, {"data_seed": 1}, {"held_out_fraction": 0}):
        assert shapes(**{"num_images": 100, **changed}).fingerprint() != base


def test_the_dummy_folder_is_read_back_as_it_was_drawn(tmp_path):
    assert write_dummy_imagefolder(tmp_path / "a" / "b", 5, 40) == 6
    records = read_back(tmp_path / "a" / "b")
    drawn = ShapeRecords(5, 40)
    assert [records[i].captions for i in range(5)] == [drawn[i].captions for i in range(5)]
    assert [records.image(i).tobytes() for i in range(5)] == [drawn.image(i).tobytes() for i in range(5)]


def test_writing_the_dummy_folder_again_changes_nothing(tmp_path):
    write_dummy_imagefolder(tmp_path, 4, 32)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert write_dummy_imagefolder(tmp_path, 4, 32) == 0
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


def test_the_dummy_folder_is_finished_after_a_kill(tmp_path):
    write_dummy_imagefolder(tmp_path, 4, 32)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "000002.png").unlink()
    (tmp_path / ".dummy-imagefolder-tmp-1").write_bytes(b"half a pict")
    assert write_dummy_imagefolder(tmp_path, 4, 32) == 2
    assert len(read_back(tmp_path)) == 4


@pytest.mark.parametrize("name", ["notes.txt", "metadata.jsonl", "000001.png", "000009.png", "metadata.csv"])
def test_the_dummy_folder_leaves_files_of_others_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(UserError, match=name):
        write_dummy_imagefolder(tmp_path, 4, 32)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"mine")]


def test_edited_captions_and_pictures_of_another_size_are_not_overwritten(tmp_path):
    write_dummy_imagefolder(tmp_path, 2, 32)
    with pytest.raises(UserError, match=r"000000\.png"):
        write_dummy_imagefolder(tmp_path, 2, 64)
    assert read_image(tmp_path / "000000.png").size == (32, 32)
    edited = (tmp_path / "metadata.jsonl").read_text().replace(" a ", " my ")
    (tmp_path / "metadata.jsonl").write_text(edited)
    with pytest.raises(UserError, match=r"metadata\.jsonl"):
        write_dummy_imagefolder(tmp_path, 2, 32)
    assert (tmp_path / "metadata.jsonl").read_text() == edited


def test_the_script_runs_from_any_folder(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = str(ROOT / "scripts" / "make_dummy_imagefolder.py")
        return subprocess.run([sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True)

    arguments = ("--output-dir", "./data/smoke", "--num-images", "4", "--image-size", "64")
    assert run(*arguments).returncode == 0
    assert len(read_back(tmp_path / "data/smoke")) == 4
    (tmp_path / "data/smoke/mine.txt").touch()
    refused = run(*arguments)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "mine.txt" in refused.stderr
    assert run("--output-dir", "x", "--num-images", "0", "--image-size", "64").returncode == 2
