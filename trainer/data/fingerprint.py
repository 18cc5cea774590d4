"""What a source's records are, in one hash, and by name which of them are not what they were.

The fingerprint is the root of a Merkle tree of sha256 over the records. Each leaf is a record's key and the hashes of
its picture and its captions. Their order counts, because the plan of the batches names records by index.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from trainer.data.metadata import shown

if TYPE_CHECKING:
    from trainer.data.record import Records

FINGERPRINT_FORMAT = 2  # 1 was a hash of keys, captions and file sizes
MOST_LISTED = 1_000_000  # records that are remembered one by one; of more, only the fingerprint is kept
NAMED = 5  # changed records that a message names
FAN_OUT = 1024
DIGEST_BYTES = 32
LEAF, NODE, ROOT = b"\0", b"\1", b"\2"  # so that no node can pass for a leaf, nor a smaller tree for a larger one


class Leaf(NamedTuple):
    """One record: its key, the sha256 of its picture (64 hex digits), and that of its captions (the first 32)."""

    key: str
    content: str
    captions: str


class Digests:
    """Hex digests of sha256, kept in 32 bytes each."""

    def __init__(self, digests: Iterable[str]):
        self._bytes = bytearray()
        for digest in digests:
            self._bytes += bytes.fromhex(digest)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self._bytes), DIGEST_BYTES):
            yield self._bytes[start : start + DIGEST_BYTES].hex()


def leaves(records: Records, contents: Iterable[str]) -> Iterator[Leaf]:
    """The records by index; `contents` are the hashes of their pictures, as `records.contents()` gives them."""
    for index, content in zip(range(len(records)), contents, strict=True):
        record = records[index]
        yield Leaf(record.key, content, captions_digest(record.captions))


def captions_digest(captions: Sequence[str]) -> str:
    """32 hex digits that change with any character of any caption, and with their order."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()[:32]


def merkle_root(leaves: Iterable[Leaf]) -> str:
    """64 hex digits. Nodes have 1,024 children; the root is also of the number of leaves.

    Of each level, the children of its newest node alone are kept: 32 KiB, whatever the number of leaves.
    """
    levels = [bytearray()]

    def add(level: int, digest: bytes) -> None:
        if level == len(levels):
            levels.append(bytearray())
        levels[level] += digest
        if len(levels[level]) == FAN_OUT * DIGEST_BYTES:
            close(level)

    def close(level: int) -> None:
        node = hashlib.sha256(NODE + levels[level]).digest()
        levels[level].clear()
        add(level + 1, node)

    count = 0
    for leaf in leaves:
        add(0, hashlib.sha256(LEAF + json.dumps(leaf).encode()).digest())
        count += 1
    level = 0
    while level < len(levels) - 1 or len(levels[level]) > DIGEST_BYTES:
        if levels[level]:
            close(level)
        level += 1
    return hashlib.sha256(ROOT + count.to_bytes(8, "big") + levels[level]).hexdigest()


def changed_records(before: Iterable[Leaf], after: Iterable[Leaf]) -> dict[str, str]:
    """What happened to each record, by key: `picture changed`, `captions changed`, both, `removed` or `added`.

    `moved`, if its index changed and nothing else happened to any record. Both are read side by side, so that memory
    holds only records whose partner is still to come.
    """
    gone: dict[str, Leaf] = {}
    come: dict[str, Leaf] = {}
    changes: dict[str, str] = {}
    moved: list[str] = []

    def match(old: Leaf, new: Leaf) -> None:
        picture, captions = old.content != new.content, old.captions != new.captions
        if picture or captions:
            what = "picture and captions" if picture and captions else "picture" if picture else "captions"
            changes[old.key] = f"{what} changed"

    for old, new in zip_longest(before, after):
        if old is not None and new is not None and old.key == new.key:
            match(old, new)
            continue
        if old is not None:
            gone[old.key] = old
        if new is not None:
            come[new.key] = new
        for leaf in (old, new):
            if leaf is not None and leaf.key in gone and leaf.key in come:
                match(gone.pop(leaf.key), come.pop(leaf.key))
                moved.append(leaf.key)
    changes |= dict.fromkeys(gone, "removed") | dict.fromkeys(come, "added")
    return changes or dict.fromkeys(moved, "moved")


def counted(changes: dict[str, str]) -> str:
    """How often each thing happened: `2 removed, 1 captions changed`."""
    return ", ".join(f"{count:,} {what}" for what, count in Counter(changes.values()).most_common())


def named(changes: dict[str, str]) -> str:
    """How many records changed, and the first few by name: `6 records: 'a.png' removed, ... and 1 more`."""
    first = ", ".join(f"{shown(key)} {what}" for key, what in list(changes.items())[:NAMED])
    more = f" and {len(changes) - NAMED:,} more" if len(changes) > NAMED else ""
    return f"{len(changes):,} record{'s' * (len(changes) != 1)}: {first}{more}"
