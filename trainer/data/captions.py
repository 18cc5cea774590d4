"""From a record's captions to the one that a slot trains on. All chance is of the slot alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from trainer.rng import Permutation, randint, uniform

if TYPE_CHECKING:
    from trainer.data.record import Source

PLACE = "{caption}"  # where a template wants the caption


def caption_of(source: Source, captions: Sequence[str], seed: int, slot: int) -> str:
    """What this slot trains on: the empty caption where dropout falls on it, else one of `captions`, dressed up.

    In this order: one is chosen, its tags are shuffled, it is put into one of the templates, and prefix and suffix are
    added. A caption without words stays empty: it trains the unconditional model.
    """
    if uniform(seed, "caption_dropout", slot) < source.caption_dropout:
        return ""
    caption = captions[randint(seed, "caption", slot, len(captions))]
    if source.caption_shuffle_tags:
        caption = shuffled(caption, source.caption_tag_separator, source.caption_keep_tags, seed, slot)
    template = PLACE
    if source.caption_templates:
        template = source.caption_templates[randint(seed, "caption_template", slot, len(source.caption_templates))]
    return dressed(source, template, caption)


def shuffled(caption: str, separator: str, keep: int, seed: int, slot: int) -> str:
    """The caption with all tags but the first `keep` in an order drawn for the slot."""
    tags = [tag.strip() for tag in caption.split(separator)]
    head, rest = tags[:keep], tags[keep:]
    if rest:
        order = Permutation(len(rest), seed, "caption_tags", slot)
        rest = [rest[order[place]] for place in range(len(rest))]
    space = "" if separator.isspace() else " "
    return f"{separator}{space}".join([*head, *rest])


def dressed(source: Source, template: str, caption: str) -> str:
    """The caption in its template, with prefix and suffix; one without words stays empty."""
    if not caption.strip():
        return ""
    return f"{source.caption_prefix}{template.replace(PLACE, caption)}{source.caption_suffix}"


def possible_captions(source: Source, captions: Sequence[str]) -> Iterator[str]:
    """Everything that `caption_of` can make of `captions`, but for what shuffling tags makes of them."""
    assert not source.caption_shuffle_tags, "shuffled tags make too many captions to list"
    if source.caption_dropout > 0:
        yield ""
    for caption in captions:
        for template in source.caption_templates or (PLACE,):
            yield dressed(source, template, caption)
