"""Prompt adherence: how often a picture shows what its prompt asked for, word by word.

Prompts are captions of the `shapes` source, whose pictures can be read back by measuring (data/shape_reading.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.data.shape_reading import Reading, read
from trainer.data.sources.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Combination,
    Shapes,
    combinations,
    held_out,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainer.sampler import Sampler

CHOICES = {"background": BACKGROUNDS, "colour": COLOURS, "shape": SHAPES, "size": SIZES}
WORDS = tuple(CHOICES)


@dataclass(frozen=True)
class Question:
    """A prompt, what its picture has to show, and the place of its starting noise."""

    prompt: str
    meant: Combination
    place: int


def questions(meant: Sequence[Combination], count: int, first_place: int = 0) -> list[Question]:
    """`count` questions that take the combinations in turn, each with noise of its own."""
    chosen = [meant[index % len(meant)] for index in range(count)]
    return [Question(each.caption, each, first_place + index) for index, each in enumerate(chosen)]


def asked_of(source: Shapes, count: int) -> dict[str, list[Question]]:
    """`count` questions about the combinations that the source draws, `seen`, and, if there are any, `held_out`."""
    held = held_out(source.held_out_fraction)
    seen = [each for each in combinations() if each not in set(held)]
    return {"seen": questions(seen, count)} | ({"held_out": questions(held, count, first_place=count)} if held else {})


def answers(sampler: Sampler, asked: Sequence[Question], seed: int) -> list[Reading]:
    """What the sampler's pictures show."""
    return [read(picture) for picture in pictures(sampler, asked, seed)]


def pictures(sampler: Sampler, asked: Sequence[Question], seed: int) -> list[Image]:
    """One picture a question."""
    return sampler.draw([each.prompt for each in asked], seed, [each.place for each in asked])


def shares_right(asked: Sequence[Question], read_back: Sequence[Reading]) -> dict[str, float]:
    """The share of pictures in [0, 1] that are right in each word, and in all of them; and their number `n`."""
    pairs = [(each.meant, reading) for each, reading in zip(asked, read_back, strict=True)]
    right = {word: sum(getattr(a, word) == getattr(b, word) for a, b in pairs) / len(pairs) for word in WORDS}
    return {**right, "all": sum(tuple(a) == tuple(b) for a, b in pairs) / len(pairs), "n": len(pairs)}


def mistakes(asked: Sequence[Question], read_back: Sequence[Reading]) -> list[dict[str, Any]]:
    """The pictures that are wrong in some word: prompt, place of the noise, and what was read instead."""
    wrong = []
    for each, reading in zip(asked, read_back, strict=True):
        seen = {word: getattr(reading, word) for word in WORDS if getattr(reading, word) != getattr(each.meant, word)}
        if seen:
            wrong.append({"prompt": each.prompt, "place": each.place, "read": seen})
    return wrong


def chance() -> dict[str, float]:
    """The shares that a blind guess among the words gets right."""
    right = {word: 1 / len(choices) for word, choices in CHOICES.items()}
    return {**right, "all": math.prod(right.values())}


def table(rows: dict[str, dict[str, float]]) -> str:
    """The shares as percentages, one line a row."""
    columns, width = (*WORDS, "all"), max(map(len, rows))
    lines = [f"  {'':{width}}" + "".join(f"{word:>12}" for word in columns)]
    for name, shares in rows.items():
        lines.append(f"  {name:{width}}" + "".join(f"{shares[word]:>12.1%}" for word in columns))
    return "\n".join(lines)
