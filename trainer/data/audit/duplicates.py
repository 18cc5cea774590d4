"""Records with the same picture: the same bytes, the same pixels in other bytes, or one that looks the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.audit.near import alike, distance, popcount
from trainer.data.record import Records

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainer.data.audit.album import Album

Group = list[int]  # records, ascending: two at least


@dataclass(frozen=True)
class Near:
    """A group of records that look alike, and by how much they differ from the first of them at most."""

    records: Group
    bits: int
    rms: float


@dataclass(frozen=True)
class Duplicates:
    """Groups by the first of their records. Of a finer kind one record alone, the first, is compared by the coarser."""

    same_bytes: list[Group]
    same_pixels: list[Group]
    near: list[Near]
    plain: int  # pictures too plain to be compared by their looks
    listed_again: int  # records that the source itself lists again, as a mix with repeats does


def find_duplicates(records: Records, album: Album) -> Duplicates:
    """Among the pictures that can be read. What the source lists twice on purpose is no duplicate."""
    once = _listed_once(records)
    readable = album.readable(once)
    same_bytes, first = _equal(readable, album.contents)
    same_pixels, first = _equal(first, album.pixels)
    compared = first[~album.plain[first]]
    return Duplicates(
        same_bytes, same_pixels, _near(compared, album), len(first) - len(compared), len(album) - len(once)
    )


def _listed_once(records: Records) -> NDArray[np.int64]:
    if type(records).held_out_by is Records.held_out_by:  # by its key, which no other record has
        return np.arange(len(records))
    first: dict[str, int] = {}
    for index in range(len(records)):
        first.setdefault(records.held_out_by(index), index)
    return np.fromiter(first.values(), np.int64, len(first))


def _equal(members: NDArray[np.int64], digests: NDArray[np.uint8]) -> tuple[list[Group], NDArray[np.int64]]:
    """The groups of `members` with equal rows in `digests` [N, bytes], and the first of each, grouped or alone."""
    rows = np.ascontiguousarray(digests[members]).view(f"V{digests.shape[1]}").ravel()
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    return _groups(members, first[inverse]), members[np.sort(first)]


def _near(members: NDArray[np.int64], album: Album) -> list[Near]:
    found = []
    for group in _groups(members, alike(album.hashes[members], album.cells[members])):
        first, others = group[:1] * (len(group) - 1), group[1:]
        bits = int(popcount(album.hashes[first] ^ album.hashes[others]).max())
        found.append(Near(group, bits, float(distance(album.cells[first], album.cells[others]).max())))
    return found


def _groups(members: NDArray[np.int64], roots: NDArray[np.int64]) -> list[Group]:
    """The members that share a root with another one."""
    order = np.argsort(roots, kind="stable")
    cuts = np.flatnonzero(np.diff(roots[order])) + 1
    return sorted(members[part].tolist() for part in np.split(order, cuts) if len(part) > 1)
