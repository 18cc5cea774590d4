"""What the captions of a data set come to, in words and in the tokens of the run's own tokenizer."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.data.captions import PLACE, dressed

if TYPE_CHECKING:
    from trainer.data.record import Records, Source

AT_ONCE = 4096  # captions given to the tokenizer
BINS = 15  # of token counts, up to what the text encoder reads
MOST_REPEATED = 20
FAULTS = {"not_utf8": ("is not UTF-8", "surrogate pair"), "empty": ("caption is empty",)}  # by what the fault says


class Cut(NamedTuple):
    """A record one of whose captions is too long for the text encoder."""

    record: int
    tokens: int  # of the longest of its captions
    cut: int  # how many of them are cut


@dataclass
class Tokens:
    """How long the captions are that a run would train on."""

    room: int  # tokens that the text encoder reads of a caption, without start and end
    captions: int = 0  # each record's, in each template
    lost: int = 0  # tokens beyond the room, of all captions
    longest: tuple[int, int] = (0, 0)  # tokens, and the record
    lengths: Counter[int] = field(default_factory=Counter)  # captions by their number of tokens
    cut: list[Cut] = field(default_factory=list)

    @property
    def captions_cut(self) -> int:
        """How many captions are longer than the room."""
        return sum(cut.cut for cut in self.cut)

    def histogram(self) -> list[dict[str, Any]]:
        """How many captions have `from` to `to` tokens; the last row, without a `to`, has those that are cut."""
        width = -(-self.room // BINS)
        rows: list[dict[str, Any]] = [
            {"from": start, "to": min(start + width - 1, self.room), "captions": 0}
            for start in range(1, self.room + 1, width)
        ]
        rows.append({"from": self.room + 1, "to": None, "captions": 0})
        for tokens, count in self.lengths.items():
            rows[min(max(0, tokens - 1) // width, len(rows) - 2) if tokens <= self.room else -1]["captions"] += count
        return rows


class Repeated(NamedTuple):
    """A caption that several records have."""

    record: int  # the first that has it
    caption: str
    records: int


@dataclass
class Captions:
    """The captions as they are written; those without words are not counted."""

    written: int
    distinct: int
    repeated: list[Repeated]  # the most frequent


def count_captions(records: Records, faulty: set[int]) -> Captions:
    """How many captions there are, and how many different ones; `faulty` records have none."""
    counts: Counter[bytes] = Counter()
    first: dict[bytes, int] = {}
    for index in range(len(records)):
        for caption in dict.fromkeys(_with_words(records, index, faulty)):
            digest = _digest(caption)
            counts[digest] += 1
            first.setdefault(digest, index)
    repeated = []
    for digest, count in counts.most_common(MOST_REPEATED):
        if count > 1:
            index = first[digest]
            caption = next(each for each in records[index].captions if _digest(each) == digest)
            repeated.append(Repeated(index, caption, count))
    return Captions(counts.total(), len(counts), repeated)


def count_tokens(
    source: Source,
    records: Records,
    faulty: set[int],
    lengths_of: Callable[[Sequence[str]], Sequence[int]],
    room: int,
) -> Tokens:
    """Lengths in tokens, with templates, prefix and suffix; `lengths_of` says how many tokens each text has.

    Shuffling the tags of a caption is left out: it moves tokens and hardly changes their number.
    """
    tokens = Tokens(room)
    waiting: list[tuple[int, str]] = []
    templates = source.caption_templates or (PLACE,)

    def count() -> None:
        cut: dict[int, list[int]] = {}
        for (index, _), length in zip(waiting, lengths_of([text for _, text in waiting]), strict=True):
            tokens.captions += 1
            tokens.lengths[length] += 1
            tokens.lost += max(0, length - room)
            tokens.longest = max(tokens.longest, (length, index), key=lambda each: each[0])
            if length > room:
                cut.setdefault(index, []).append(length)
        tokens.cut += [Cut(index, max(lengths), len(lengths)) for index, lengths in cut.items()]
        waiting.clear()

    for index in range(len(records)):
        for caption in _with_words(records, index, faulty):
            waiting += [(index, dressed(source, template, caption)) for template in templates]
        if len(waiting) >= AT_ONCE:
            count()
    if waiting:
        count()
    return tokens


def fault_class(told: str) -> str:
    """`not_utf8`, `empty` or `missing`, by what `Records.caption_faults` says of a record."""
    return next((name for name, ends in FAULTS.items() if any(end in told for end in ends)), "missing")


def _with_words(records: Records, index: int, faulty: set[int]) -> Iterator[str]:
    if index not in faulty:
        yield from (caption for caption in records[index].captions if caption.strip())


def _digest(caption: str) -> bytes:
    return hashlib.blake2b(caption.encode(), digest_size=8).digest()
