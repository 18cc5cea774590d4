"""Pictures that look alike: the same one packed anew, resized, brightened, or cut by a few pixels.

Two steps. A difference hash of 64 bits (dHash; Krawetz 2013, "Kind of like that") proposes: for 8 rows of 9 gray means,
whether each is darker than its right neighbour by more than noise. A mean of 8 x 8 cells in colour decides, for to a
hash two red circles and a green one are the same. A picture with too few clear steps from cell to cell, such as one
colour or a plain fade, has a hash that says nothing: it is compared with no other, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

MOST_BITS = 6  # of 64 in which the hashes of two pictures that look alike may differ
MOST_RMS = 10.0  # levels of 255 by which their cells may differ in the root mean square, once equally bright
CLEAR_STEP = 2.0  # levels between neighbours, below which noise decides
LEAST_STEPS = 8  # clear ones of 64, below which a picture is too plain for its hash to say anything
CELLS = 8
BITS = 64
AT_ONCE = 1 << 20  # pairs of hashes
CONFIRMED_AT_ONCE = 1 << 14  # pairs of cells
MOST_ALIKE = 2048  # hashes with a chunk in common that are compared each with each
DEEPEST = 2  # how often the rest is cut into chunks again


class Gist(NamedTuple):
    """A picture in 200 bytes."""

    hash: int  # 64 bits
    plain: bool  # its hash says nothing
    cells: bytes  # mean RGB of 8 x 8 cells


def gist_of(image: Image) -> Gist:
    """What an RGB picture looks like from afar; its shape does not count."""
    import numpy as np
    from PIL.Image import Resampling

    small = image.resize((CELLS * (CELLS + 1), CELLS * CELLS), Resampling.BOX, reducing_gap=2.0)
    pixels = np.asarray(small, np.float32)
    gray = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    steps = np.diff(gray.reshape(CELLS, CELLS, CELLS + 1, CELLS).mean(axis=(1, 3)), axis=1)
    bits = np.packbits(steps > CLEAR_STEP)
    cells = pixels.reshape(CELLS, CELLS, CELLS, CELLS + 1, 3).mean(axis=(1, 3))
    plain = int((np.abs(steps) > CLEAR_STEP).sum()) < LEAST_STEPS
    return Gist(int.from_bytes(bits.tobytes(), "big"), plain, cells.round().astype(np.uint8).tobytes())


def alike(
    hashes: NDArray[np.uint64], cells: NDArray[np.uint8], bits: int = MOST_BITS, rms: float = MOST_RMS
) -> NDArray[np.int64]:
    """For each picture, [N] int64, the first one of its group; a group is all that hang together by pairs that look
    alike. `hashes` [N] and `cells` [N, 192] are the pictures' gists."""
    import numpy as np

    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    roots = np.arange(len(hashes))
    # Of equal hashes each is compared with the first, and not with all, of which there may be many.
    _join(roots, cells, np.arange(len(hashes)), first[inverse], rms)
    for one, other in close_pairs(unique, bits):
        _join(roots, cells, first[one], first[other], rms)
    return _roots(roots, np.arange(len(roots)))


def _join(
    roots: NDArray[np.int64],
    cells: NDArray[np.uint8],
    one: NDArray[np.int64],
    other: NDArray[np.int64],
    rms: float,
) -> None:
    """Hang the root of one under the root of the other, the lower index above, for each pair that looks alike."""
    import numpy as np

    for start in range(0, len(one), CONFIRMED_AT_ONCE):
        a, b = one[start : start + CONFIRMED_AT_ONCE], other[start : start + CONFIRMED_AT_ONCE]
        confirmed = (a != b) & (distance(cells[a], cells[b]) <= rms)
        a, b = a[confirmed], b[confirmed]
        while len(a):
            roots[a], roots[b] = root_a, root_b = _roots(roots, a), _roots(roots, b)
            apart = root_a != root_b
            a, b, root_a, root_b = a[apart], b[apart], root_a[apart], root_b[apart]
            np.minimum.at(roots, np.maximum(root_a, root_b), np.minimum(root_a, root_b))


def _roots(roots: NDArray[np.int64], members: NDArray[np.int64]) -> NDArray[np.int64]:
    here = roots[members]
    while (above := roots[here]).tobytes() != here.tobytes():
        here = above
    return here


def distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Root mean square of the difference of cells [N, 192], in levels, without what is only brighter or darker."""
    import numpy as np

    difference = a.astype(np.float32) - b.astype(np.float32)
    difference -= difference.mean(axis=1, keepdims=True)
    return np.sqrt(np.square(difference).mean(axis=1))


def close_pairs(hashes: NDArray[np.uint64], bits: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The places of all pairs of `hashes`, no two of them equal, that differ in at most `bits` bits; some more often.

    By pigeonhole (multi-index hashing; Norouzi et al. 2012): of bits + 1 chunks such a pair has one in common. Where
    too many have a chunk in common, as with pictures that share a sky, the other bits are cut into chunks in turn,
    DEEPEST times. Where even then too many are left, of millions of drawings perhaps, each is compared with the
    MOST_ALIKE that follow it in numerical order, and pairs may be missed: the work stays bounded.
    """
    import numpy as np

    yield from _close(hashes, np.arange(len(hashes)), list(range(BITS)), bits, 0)


def _close(
    hashes: NDArray[np.uint64], members: NDArray[np.int64], open_bits: list[int], bits: int, depth: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    import numpy as np

    if len(members) <= MOST_ALIKE or len(open_bits) <= bits:
        yield from _each_with_each(hashes, members, bits)
        return
    if depth == DEEPEST:
        in_order = members[np.argsort(hashes[members])]
        yield from _within_runs(hashes, in_order, np.full(len(members), 2), np.zeros(len(members), np.uint64), bits)
        return
    for number in range(bits + 1):
        chunk = open_bits[number :: bits + 1]  # not side by side: a white edge would make many chunks equal
        mask = np.uint64(sum(1 << bit for bit in chunk))
        left = [bit for bit in open_bits if bit not in chunk]
        values = hashes[members] & mask
        order = np.argsort(values, kind="stable")
        ordered, values = members[order], values[order]
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
        lengths = np.diff(np.r_[starts, len(values)])
        for start, length in zip(starts[lengths > MOST_ALIKE], lengths[lengths > MOST_ALIKE], strict=True):
            yield from _close(hashes, ordered[start : start + length], left, bits, depth + 1)
        yield from _within_runs(hashes, ordered, np.repeat(lengths, lengths), values, bits)


def _within_runs(
    hashes: NDArray[np.uint64],
    ordered: NDArray[np.int64],
    lengths: NDArray[np.int64],
    values: NDArray[np.uint64],
    bits: int,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Close pairs within each run of equal `values`, but for those too long: all runs at once, by shifts."""
    import numpy as np

    places = np.flatnonzero((lengths > 1) & (lengths <= MOST_ALIKE))
    sorted_hashes = hashes[ordered]
    shift = 1
    while len(places) and shift <= MOST_ALIKE:
        places = places[places + shift < len(values)]
        places = places[values[places] == values[places + shift]]
        for start in range(0, len(places), AT_ONCE):
            here = places[start : start + AT_ONCE]
            near = popcount(sorted_hashes[here] ^ sorted_hashes[here + shift]) <= bits
            if near.any():
                yield ordered[here[near]], ordered[here[near] + shift]
        shift += 1


def _each_with_each(
    hashes: NDArray[np.uint64], members: NDArray[np.int64], bits: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    import numpy as np

    block = max(1, AT_ONCE // max(1, len(members)))
    for start in range(0, len(members), block):
        rows = members[start : start + block]
        near = popcount(hashes[rows][:, None] ^ hashes[members][None, :]) <= bits
        one, other = np.nonzero(near)
        later = other > one + start
        if later.any():
            yield rows[one[later]], members[other[later]]


def popcount(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """How many bits of each are set (Warren, "Hacker's Delight", section 5-1; numpy has it only from 2.0 on)."""
    import numpy as np

    ones, twos, fours = (np.uint64(mask) for mask in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    words = words - ((words >> np.uint64(1)) & ones)
    words = (words & twos) + ((words >> np.uint64(2)) & twos)
    return (((words + (words >> np.uint64(4))) & fours) * np.uint64(0x0101010101010101)) >> np.uint64(56)
