"""The checker behind prompt adherence reads real shapes right, and refuses to name what is none."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from trainer.adherence import Question, chance, mistakes, questions, shares_right
from trainer.data.shape_reading import Reading, read
from trainer.data.sources.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Combination,
    Place,
    ShapeRecords,
    combinations,
    coverage,
    draw,
    held_out,
    place,
)

UNSEEN = 975_318_642  # a data seed of no other use
WORDS = Combination._fields


def right(pairs: list[tuple[Combination, Image.Image]]) -> dict[str, float]:
    asked = [Question(meant.caption, meant, index) for index, (meant, _) in enumerate(pairs)]
    return shares_right(asked, [read(picture) for _, picture in pairs])


def fresh(count: int, image_size: int = 64) -> list[tuple[Combination, Image.Image]]:
    records = ShapeRecords(count, image_size, seed=UNSEEN)
    return [(records.combination(index), records.image(index)) for index in range(count)]


def test_five_hundred_fresh_shapes_are_read_right():
    shares = right(fresh(500))
    assert shares["n"] == 500
    assert all(shares[word] >= 0.99 for word in (*WORDS, "all")), shares


@pytest.mark.parametrize("image_size", [32, 128])
def test_other_sizes_of_picture_are_read_too(image_size: int):
    assert right(fresh(96, image_size))["all"] >= 0.95


def test_noise_of_a_few_levels_and_blurred_edges_do_not_matter():
    noise = np.random.default_rng(0)
    rough = []
    for meant, picture in fresh(96):
        small = picture.resize((40, 40), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
        levels = np.asarray(small) + noise.normal(0, 8, (64, 64, 3))
        rough.append((meant, Image.fromarray(levels.clip(0, 255).astype(np.uint8))))
    assert right(rough)["all"] >= 0.95


OTHER = {
    "colour": dict(zip(COLOURS, [*list(COLOURS)[1:], "red"], strict=True)),
    "background": {"white": "gray", "gray": "black", "black": "white"},
    "size": {"small": "large", "large": "small"},
    "shape": dict(zip(SHAPES, [*SHAPES[1:], SHAPES[0]], strict=True)),
}


def drawn(shown: Combination, index: int) -> Reading:
    """What is read of a picture of that combination at the place of that index."""
    return read(draw(shown, 64, place(shown, UNSEEN, index)))


@pytest.fixture(scope="module")
def unbroken() -> list[Reading]:
    return [drawn(meant, index) for index, meant in enumerate(combinations())]


@pytest.mark.parametrize("word", WORDS)
def test_breaking_one_word_in_some_pictures_lowers_its_figure_alone(unbroken: list[Reading], word: str):
    readings = list(unbroken)
    asked = [Question(meant.caption, meant, index) for index, meant in enumerate(combinations())]
    for index, meant in list(enumerate(combinations()))[::3]:
        readings[index] = drawn(meant._replace(**{word: OTHER[word][getattr(meant, word)]}), index)
    shares = shares_right(asked, readings)
    assert shares[word] == pytest.approx(2 / 3, abs=0.005)
    assert all(shares[other] >= 0.99 for other in WORDS if other != word), shares
    assert shares["all"] == pytest.approx(2 / 3, abs=0.01)


def test_what_shows_nothing_that_can_be_named_is_right_in_nothing():
    grain = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert read(Image.fromarray(grain))[:3] == (None, None, None)
    assert read(Image.new("RGB", (64, 64), "white")) == Reading(None, None, None, "white")
    assert read(Image.new("RGB", (64, 64), (90, 200, 90))).background is None  # neither a background nor near a colour
    assert read(Image.new("RGB", (64, 64), COLOURS["red"])).background is None, "a colour is no background"


def test_a_shape_of_no_name_keeps_its_colour_and_background():
    """Two bars far apart: every template overlaps too little."""
    picture = Image.new("RGB", (64, 64), BACKGROUNDS["black"])
    for left in (8, 48):
        picture.paste(COLOURS["cyan"], (left, 8, left + 8, 56))
    assert read(picture) == Reading(None, "cyan", None, "black")


def test_two_shapes_are_not_one():
    picture = draw(Combination("small", "red", "circle", "white"), 64, Place(0.25, 0.5, SIZES["small"]))
    assert read(picture).shape == "circle"
    picture.paste(COLOURS["red"], mask=coverage("circle", 64, Place(0.75, 0.5, SIZES["small"])))
    assert read(picture).shape is None


def test_chance_is_what_a_blind_guess_gets_right():
    guesses = Counter()
    generator = np.random.default_rng(2)
    choices = {"size": list(SIZES), "colour": list(COLOURS), "shape": list(SHAPES), "background": list(BACKGROUNDS)}
    for meant in combinations() * 20:
        guess = {word: generator.choice(choices[word]) for word in WORDS}
        guesses.update(word for word in WORDS if guess[word] == getattr(meant, word))
        guesses["all"] += all(guess[word] == getattr(meant, word) for word in WORDS)
    for word, share in chance().items():
        assert guesses[word] / (288 * 20) == pytest.approx(share, abs=0.02), word


def test_questions_take_the_combinations_in_turn_at_places_of_their_own():
    held = held_out(0.1)
    asked = questions(held, 96, first_place=96)
    assert [each.meant for each in asked[: len(held)]] == held
    assert asked[0].meant == asked[len(held)].meant
    assert [each.place for each in asked] == list(range(96, 192))
    assert all(each.prompt == each.meant.caption for each in asked)


def test_a_mistake_says_what_was_asked_and_what_was_read_instead():
    red, blue = (Combination("large", colour, "ring", "gray") for colour in ("red", "blue"))
    asked = questions([red, blue], 2)
    assert mistakes(asked, [Reading(*red), Reading(*blue)]) == []
    assert mistakes(asked, [Reading(*blue), Reading(*blue)]) == [
        {"prompt": red.caption, "place": 0, "read": {"colour": "blue"}}
    ]
