"""The sha256 of many files: taken by several threads, and remembered from one start to the next.

The memory is an SQLite file in the user's cache folder. Whatever is wrong with it costs its use, never the run. SQLite
does not check its pages, so each row carries a mark of its own: a row that was damaged is a row that is not there.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from trainer.errors import UserError

BLOCK = 16  # files looked at by one thread in a row, and asked of the memory at once
LOOK_AHEAD = 64  # blocks
RACY_NS = 2_000_000_000  # FAT's clock, the coarsest, ticks every 2 s: a younger file can change and keep its mtime
SAVE_EVERY_SECONDS = 5.0  # a start that is killed loses no more than that
ANNOUNCED_AFTER_SECONDS, SAID_EVERY_SECONDS = 2.0, 10.0
LOCKED_SECONDS = 5.0  # how long another process may keep the memory to itself before we do without

Say = Callable[[str], None]


class Hashed(NamedTuple):
    """What a file held when it was read."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


def file_hashes(paths: Iterable[str], count: int, fresh: bool, say: Say) -> Iterator[str]:
    """The sha256 of each of `count` files, 64 hex digits, in their order; `fresh` reads also those that are remembered.

    A remembered hash counts if the file's size and mtime are still those. `say` hears of what takes over 2 s. Raises
    UserError, naming the file, for one that cannot be read.
    """
    memory, progress = HashMemory(default_place(), say), _Progress(count, say)
    pool = ThreadPoolExecutor(thread_name_prefix="hash")
    waiting: deque[Future[list[tuple[Hashed, bool]]]] = deque()

    def done() -> Iterator[str]:
        for hashed, is_new in waiting.popleft().result():
            if is_new:
                memory.remember(hashed)
            yield hashed.sha256
        progress.count(BLOCK)

    try:
        paths = iter(paths)
        while block := list(itertools.islice(paths, BLOCK)):
            waiting.append(pool.submit(_hash_block, block, {} if fresh else memory.known(block)))
            if len(waiting) > LOOK_AHEAD:
                yield from done()
        while waiting:
            yield from done()
        progress.end()
    finally:
        pool.shutdown(cancel_futures=True)
        memory.close()


def _hash_block(paths: Sequence[str], known: dict[str, Hashed]) -> list[tuple[Hashed, bool]]:
    """What each file holds, and whether that is worth remembering."""
    return [_hash_file(path, known.get(path)) for path in paths]


def _hash_file(path: str, known: Hashed | None) -> tuple[Hashed, bool]:
    try:
        if known is not None:
            there = os.stat(path)
            if (there.st_size, there.st_mtime_ns) == (known.size, known.mtime_ns):
                return known, False
        now = time.time_ns()
        with open(path, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        fix = "replace the file or remove its line from the metadata"
        raise UserError(f"picture cannot be read: {error.strerror}", path, fix) from error
    unchanged = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    old = before.st_mtime_ns < now - RACY_NS
    return Hashed(path, before.st_size, before.st_mtime_ns, sha256), unchanged and old


class HashMemory:
    """Hashes by absolute path, shared by all runs of a user, several at once if need be.

    The first error ends its use, with one note to `say`: nothing is known from then on, and nothing remembered.
    """

    def __init__(self, place: str | None, say: Say):
        self.place, self._say = place, say
        self._new: list[tuple[Any, ...]] = []
        self._saved = time.monotonic()
        self._database: sqlite3.Connection | None = None
        try:
            self._database = _open(place)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def known(self, paths: Sequence[str]) -> dict[str, Hashed]:
        """What is remembered of `paths`."""
        if self._database is None:
            return {}
        try:
            rows = self._database.execute(
                f"SELECT path, size, mtime_ns, sha256, mark FROM hashes WHERE path IN ({', '.join('?' * len(paths))})",
                [os.fsencode(path) for path in paths],
            ).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return {}
        found = {}
        for *row, mark in rows:
            if mark == _mark(row):
                path, size, mtime_ns, sha256 = row
                found[os.fsdecode(path)] = Hashed(os.fsdecode(path), size, mtime_ns, sha256.hex())
        return found

    def remember(self, hashed: Hashed) -> None:
        """Keep a hash, in place of an older one of the same path; it is on disk after some seconds or at the end."""
        row = [os.fsencode(hashed.path), hashed.size, hashed.mtime_ns, bytes.fromhex(hashed.sha256)]
        self._new.append((*row, _mark(row)))
        if time.monotonic() - self._saved > SAVE_EVERY_SECONDS:
            self._save()

    def close(self) -> None:
        """Save what is new, and let go of the file."""
        self._save()
        database, self._database = self._database, None
        if database is not None:
            try:
                database.close()
            except sqlite3.Error as error:
                self._give_up(error)

    def _save(self) -> None:
        new, self._new, self._saved = self._new, [], time.monotonic()
        if self._database is None or not new:
            return
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?)", new)
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._database = None
        at = f" ({self.place})" if self.place else ""
        self._say(f"note   hashes of pictures are not remembered: {error}{at}")


def default_place() -> str | None:
    """Where the hashes of this user's pictures are remembered; None if there is no home to keep them in."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # unset, or, by the XDG specification, to be ignored
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "difftrain", "content_hashes.sqlite") if os.path.isabs(cache) else None


def _open(place: str | None) -> sqlite3.Connection:
    if place is None:
        raise OSError("there is no home folder")
    os.makedirs(os.path.dirname(place), exist_ok=True)
    # No write-ahead log: its shared memory does not work on a home that several machines mount.
    database = sqlite3.connect(place, timeout=LOCKED_SECONDS)
    try:
        database.execute(
            "CREATE TABLE IF NOT EXISTS hashes "
            "(path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 BLOB, mark BLOB) WITHOUT ROWID"
        )
    except sqlite3.Error:
        database.close()
        raise
    return database


def _mark(row: Sequence[Any]) -> bytes:
    """What a row carries to show that it is as it was written; the types of its values count too."""
    return hashlib.blake2b(repr(tuple(row)).encode("utf-8", "backslashreplace"), digest_size=16).digest()


class _Progress:
    """Lines for people, of work that takes over 2 s."""

    def __init__(self, total: int, say: Say):
        self._total, self._say, self._done = total, say, 0
        self._started = time.monotonic()
        self._next = self._started + ANNOUNCED_AFTER_SECONDS
        self._announced = False

    def count(self, done: int) -> None:
        """So many more are done."""
        self._done, now = min(self._total, self._done + done), time.monotonic()
        if now < self._next:
            return
        if not self._announced:
            self._say(f"data   hashing {self._total:,} pictures; the next start reads only those that changed")
        self._announced, self._next = True, now + SAID_EVERY_SECONDS
        self._say(f"data   {self._done:,} of {self._total:,} pictures hashed in {now - self._started:.0f} s")

    def end(self) -> None:
        """All are done."""
        if self._announced:
            self._say(f"data   {self._total:,} pictures hashed in {time.monotonic() - self._started:.0f} s")
