"""An audit in a few lines, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.data.audit.findings import CLASSES


def summary(found: Mapping[str, Any]) -> Iterator[str]:
    """What a person wants to know first: the verdict, and each thing that was found at all with its number."""
    timing, duplicates, captions = found["timing"], found["duplicates"], found["captions"]
    yield (
        f"audit  {found['data']['records']:,} records read in {timing['read_seconds']:.1f} s, "
        f"{timing['records_per_second']:,.0f} a second"
    )
    for name, count in found["counts"].items():
        if count:
            yield f"{count:>9,}  {name.replace('_', ' ')}: {CLASSES[name]}"
    for name, what in DUPLICATES.items():
        if groups := duplicates[name]:
            extra = sum(len(group["records"]) - 1 for group in groups)
            yield f"{extra:>9,}  {name.replace('_', ' ')}: {what}{in_groups(groups)}"
    tokens = captions["tokens"]
    if tokens and tokens["cut"]:
        longest = f"the longest has {tokens['longest']['tokens']:,}"
        yield f"captions {tokens['cut']:,} cut at {tokens['room']} tokens, {tokens['lost']:,} tokens lost; {longest}"
    if captions["not_counted"]:
        yield f"note   {captions['not_counted']}"
    if found["run"] and found["run"]["why"]:
        yield f"note   not compared record by record: {found['run']['why']}"
    yield found["verdict"]["sentence"]


DUPLICATES = {
    "same_bytes": "copies of another record's picture",
    "same_pixels": "the pixels of another one in other bytes",
    "near": "look like another one",
}


def in_groups(groups: Sequence[Any]) -> str:
    """How many groups there are, as the end of a sentence; nothing of none."""
    return f", in {len(groups):,} group{'s' * (len(groups) != 1)}" if groups else ""
