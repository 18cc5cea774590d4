"""One look at each of many picture files: taken by several threads, and remembered from one start to the next.

A look reads the whole file, hashes it and decodes it once, so that what cannot be trained on is known before the first
step. The memory is an SQLite file in the user's cache folder. Whatever is wrong with it costs its use, never the run.
SQLite does not check its pages, so each row carries a mark of its own: a row that was damaged is a row that is not
there. Only pictures that can be read are remembered.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from trainer.data.record import Look
from trainer.errors import UserError

BLOCK = 16  # files looked at by one thread in a row, and asked of the memory at once
LOOK_AHEAD = 64  # blocks
RACY_NS = 2_000_000_000  # FAT's clock, the coarsest, ticks every 2 s: a younger file can change and keep its mtime
SAVE_EVERY_SECONDS = 5.0  # a start that is killed loses no more than that
ANNOUNCED_AFTER_SECONDS, SAID_EVERY_SECONDS = 2.0, 10.0
LOCKED_SECONDS = 5.0  # how long another process may keep the memory to itself before we do without
NOTHING = "0" * 64  # the content of a file that cannot be opened

Say = Callable[[str], None]


class Seen(NamedTuple):
    """What a file held when it was read."""

    path: str
    size: int
    mtime_ns: int
    sha256: str
    width: int
    height: int


def look_at_files(paths: Iterable[str], count: int, max_pixels: int, fresh: bool, say: Say) -> Iterator[Look]:
    """A look at each of `count` files, in their order; `fresh` reads also those that are remembered.

    A remembered look counts if the file's size and mtime are still those. `say` hears of what takes over 2 s.
    """
    memory, progress = LookMemory(default_place(), say), Progress(count, say)
    pool = ThreadPoolExecutor(thread_name_prefix="look")
    waiting: deque[Future[list[tuple[Look, Seen | None]]]] = deque()

    def done() -> Iterator[Look]:
        for look, new in waiting.popleft().result():
            if new is not None:
                memory.remember(new)
            yield look
        progress.count(BLOCK)

    try:
        paths = iter(paths)
        while block := list(itertools.islice(paths, BLOCK)):
            waiting.append(pool.submit(_look_at_block, block, memory.known(block), max_pixels, fresh))
            if len(waiting) > LOOK_AHEAD:
                yield from done()
        while waiting:
            yield from done()
        progress.end()
    finally:
        pool.shutdown(cancel_futures=True)
        memory.close()


def look_at_each(data: Callable[[int], bytes], count: int, max_pixels: int, say: Say) -> Iterator[Look]:
    """A look at each of `count` pictures, in their order; `data` gives the stored bytes of one, or raises UserError."""

    def look(index: int) -> Look:
        try:
            stored = data(index)
        except UserError as error:
            return Look(NOTHING, 0, 0, error.what)
        return look_at(stored, max_pixels)

    progress, waiting = Progress(count, say), deque[Future[Look]]()
    with ThreadPoolExecutor(thread_name_prefix="look") as pool:
        for index in range(count):
            waiting.append(pool.submit(look, index))
            if len(waiting) > LOOK_AHEAD:
                yield waiting.popleft().result()
                progress.count(1)
        while waiting:
            yield waiting.popleft().result()
            progress.count(1)
    progress.end()


def forget_look(path: str) -> None:
    """Have the next look at this file read it, whatever its size and mtime are."""
    memory = LookMemory(default_place(), lambda line: None)
    memory.forget(path)
    memory.close()


def look_at(data: bytes, max_pixels: int) -> Look:
    """What a picture file of these bytes is."""
    return _look(data, hashlib.sha256(data).hexdigest(), max_pixels)


def _look(data: bytes, sha256: str, max_pixels: int) -> Look:
    from trainer.data.image_file import decode

    try:
        width, height = decode(io.BytesIO(data), "", max_pixels).size
    except UserError as error:
        return Look(sha256, 0, 0, error.what)
    return Look(sha256, width, height)


def _look_at_block(
    paths: Sequence[str], known: dict[str, Seen], max_pixels: int, fresh: bool
) -> list[tuple[Look, Seen | None]]:
    """A look at each file, and what of it is worth remembering."""
    return [_look_at_file(path, known.get(path), max_pixels, fresh) for path in paths]


def _look_at_file(path: str, known: Seen | None, max_pixels: int, fresh: bool) -> tuple[Look, Seen | None]:
    try:
        if known is not None and not fresh:
            there = os.stat(path)
            if (there.st_size, there.st_mtime_ns) == (known.size, known.mtime_ns):
                return _remembered(known, max_pixels), None
        now = time.time_ns()
        with open(path, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            data = file.readall()
            after = os.fstat(file.fileno())
    except OSError as error:
        return Look(NOTHING, 0, 0, f"picture cannot be read: {error.strerror}"), None
    sha256 = hashlib.sha256(data).hexdigest()
    same = known is not None and known.sha256 == sha256
    look = _remembered(known, max_pixels) if known is not None and same else _look(data, sha256, max_pixels)
    unchanged = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    old = before.st_mtime_ns < now - RACY_NS
    if look.fault is not None or not (unchanged and old):
        return look, None
    return look, Seen(path, before.st_size, before.st_mtime_ns, sha256, look.width, look.height)


def _remembered(known: Seen, max_pixels: int) -> Look:
    from trainer.data.image_file import too_large

    if known.width * known.height > max_pixels:
        return Look(known.sha256, 0, 0, too_large(known.width, known.height, max_pixels))
    return Look(known.sha256, known.width, known.height)


class LookMemory:
    """Looks by absolute path, shared by all runs of a user, several at once if need be.

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

    def known(self, paths: Sequence[str]) -> dict[str, Seen]:
        """What is remembered of `paths`."""
        if self._database is None:
            return {}
        try:
            rows = self._database.execute(
                f"SELECT * FROM looks WHERE path IN ({', '.join('?' * len(paths))})",
                [os.fsencode(path) for path in paths],
            ).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return {}
        found = {}
        for *row, mark in rows:
            if mark == _mark(row):
                path, size, mtime_ns, sha256, width, height = row
                found[os.fsdecode(path)] = Seen(os.fsdecode(path), size, mtime_ns, sha256.hex(), width, height)
        return found

    def remember(self, seen: Seen) -> None:
        """Keep a look, in place of an older one of the same path; it is on disk after some seconds or at the end."""
        row = [os.fsencode(seen.path), seen.size, seen.mtime_ns, bytes.fromhex(seen.sha256), seen.width, seen.height]
        self._new.append((*row, _mark(row)))
        if time.monotonic() - self._saved > SAVE_EVERY_SECONDS:
            self._save()

    def forget(self, path: str) -> None:
        """Know nothing of a file any more."""
        if self._database is not None:
            try:
                with self._database:
                    self._database.execute("DELETE FROM looks WHERE path = ?", [os.fsencode(path)])
            except sqlite3.Error as error:
                self._give_up(error)

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
                self._database.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?, ?, ?, ?, ?, ?)", new)
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._database = None
        at = f" ({self.place})" if self.place else ""
        self._say(f"note   looks at pictures are not remembered: {error}{at}")


def cache_folder() -> str | None:
    """Where this user's caches lie; None if there is no home to keep them in."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # unset, or, by the XDG specification, to be ignored
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "difftrain") if os.path.isabs(cache) else None


def default_place() -> str | None:
    """Where the looks at this user's pictures are remembered; None if there is no home to keep them in."""
    folder = cache_folder()
    return os.path.join(folder, "looks.sqlite") if folder else None


def _open(place: str | None) -> sqlite3.Connection:
    if place is None:
        raise OSError("there is no home folder")
    os.makedirs(os.path.dirname(place), exist_ok=True)
    # No write-ahead log: its shared memory does not work on a home that several machines mount.
    database = sqlite3.connect(place, timeout=LOCKED_SECONDS)
    try:
        database.execute(
            "CREATE TABLE IF NOT EXISTS looks (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 BLOB, "
            "width INTEGER, height INTEGER, mark BLOB) WITHOUT ROWID"
        )
    except sqlite3.Error:
        database.close()
        raise
    return database


def _mark(row: Sequence[Any]) -> bytes:
    """What a row carries to show that it is as it was written; the types of its values count too."""
    return hashlib.blake2b(repr(tuple(row)).encode("utf-8", "backslashreplace"), digest_size=16).digest()


class Progress:
    """Lines for people, of looks that take over 2 s."""

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
            self._say(f"data   looking at {self._total:,} pictures; the next start reads only those that changed")
        self._announced, self._next = True, now + SAID_EVERY_SECONDS
        self._say(f"data   {self._done:,} of {self._total:,} pictures read in {now - self._started:.0f} s")

    def end(self) -> None:
        """All are done."""
        if self._announced:
            self._say(f"data   {self._total:,} pictures read in {time.monotonic() - self._started:.0f} s")
