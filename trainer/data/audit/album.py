"""What was seen of every picture, in some 250 bytes each: columns for all of them, words for those with a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.audit.picture import FORMATS, Seen
from trainer.data.looks import NOTHING

if TYPE_CHECKING:
    from trainer.data.record import Records


class Album:
    """Row i is of record i."""

    def __init__(self, records: int):
        self.sizes = np.zeros((records, 2), np.uint32)  # width and height, 0 if it cannot be read
        self.traits = np.zeros(records, np.uint8)
        self.formats = np.full(records, len(FORMATS), np.uint8)  # place in FORMATS
        self.contents = np.zeros((records, 32), np.uint8)
        self.pixels = np.zeros((records, 16), np.uint8)
        self.hashes = np.zeros(records, np.uint64)
        self.plain = np.ones(records, bool)
        self.cells = np.zeros((records, 192), np.uint8)
        self.faults: dict[int, str] = {}
        self.over_limit: set[int] = set()
        self.drawn: set[int] = set()  # without a content of their own

    @classmethod
    def of(cls, records: Records, seen: Iterable[tuple[int, Seen]], each: Callable[[], None]) -> Album:
        """All that is `seen`, in any order; `each` is called after every record."""
        album = cls(len(records))
        for index, one in seen:
            album.put(index, one)
            each()
        if album.drawn:  # what a picture is drawn from, its source alone knows
            for index, content in enumerate(records.contents()):
                if index in album.drawn:
                    album.contents[index] = _bytes(bytes.fromhex(content))
        return album

    def put(self, index: int, seen: Seen) -> None:
        """Fill a row."""
        self.sizes[index] = seen.width, seen.height
        self.traits[index] = seen.traits
        if seen.format in FORMATS:
            self.formats[index] = FORMATS.index(seen.format)
        if seen.content:
            self.contents[index] = _bytes(bytes.fromhex(seen.content))
        else:
            self.drawn.add(index)
        self.pixels[index] = _bytes(seen.pixels)
        self.hashes[index], self.plain[index] = seen.gist.hash, seen.gist.plain
        self.cells[index] = _bytes(seen.gist.cells)
        if seen.fault is not None:
            self.faults[index] = seen.fault
        if seen.over_limit:
            self.over_limit.add(index)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[str]:
        """The content of every record, as `Records.contents` gives it."""
        return (row.tobytes().hex() for row in self.contents)

    def readable(self, among: Sequence[int] | np.ndarray) -> np.ndarray:
        """Those of `among` that were decoded, int64."""
        among = np.asarray(among, np.int64)
        return among[self.sizes[among, 0] > 0]

    def opened(self, among: Sequence[int] | np.ndarray) -> np.ndarray:
        """Those of `among` whose bytes could be read, int64, whether or not they are a picture."""
        among = np.asarray(among, np.int64)
        return among[(self.contents[among] != _bytes(bytes.fromhex(NOTHING))).any(axis=1)]


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)
