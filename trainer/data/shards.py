"""Large files, here or in an object store, read by byte range and, where there is room, kept whole on this machine.

A remote shard is reached over fsspec. Each process opens its own connections, because a client's threads do not live on
in a forked loader worker. What fails on the network is tried again, after a wait that doubles and is told.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

from trainer.data.index import file_identity
from trainer.data.looks import cache_folder
from trainer.errors import UserError

Option = str | int | float | bool

PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}  # and the library that each needs
INSTALL = 'pip install "difftrain[cloud]"'
MARKS = ("ETag", "etag", "LastModified", "Last-Modified", "updated")  # as the clients of fsspec spell them
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.5  # doubles with each attempt: 7.5 s in all
RANGE_BYTES = 16 << 20  # of one request while a whole shard is read
USED_AGAIN_SECONDS = 60  # how often the use of a kept shard is written down
SECRET = re.compile(r"key|secret|token|passw|credential|signature|^sig$|connection_string", re.IGNORECASE)
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or ~/.aws/credentials",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS in the environment, or `gcloud auth application-default login`",
}
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"}
NOT_AGAIN = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, TypeError)

_file_systems: dict[str, Any] = {}
_opening = threading.Lock()


def forget_connections() -> None:
    """A client's threads do not live on in a forked process, which opens its own."""
    global _opening
    _opening = threading.Lock()
    _file_systems.clear()
    if asyn := sys.modules.get("fsspec.asyn"):
        asyn.reset_lock()


os.register_at_fork(after_in_child=forget_connections)


class SourceError(UserError):
    """Where the pictures come from is gone, has changed or does not answer: no fault of a picture, to be left out."""


@dataclass(frozen=True)
class Shard:
    """One file, and what it was when it was indexed."""

    url: str  # or a local path
    size: int
    mark: tuple[str, ...] | None  # what tells one state of the file from another; None if nothing does

    @property
    def remote(self) -> bool:
        """Whether it lies in another place than this machine's file system."""
        return protocol(self.url) is not None


@dataclass(frozen=True)
class Storage:
    """How shards are reached, and where whole ones are kept. Pickles, and opens nothing until it is asked to read."""

    options: Mapping[str, Option] = field(default_factory=dict)  # of fsspec's file system
    cache_dir: str | None = None
    cache_bytes: int = 0  # 0 keeps no shard
    started: float = field(default_factory=time.time)  # shards used since then are never thrown out

    def look(self, url: str) -> Shard:
        """What a shard is now; raises SourceError if it is not there or may not be read."""
        if protocol(url) is None:
            try:
                there = file_identity(url)
                size = os.stat(url).st_size
            except OSError as error:
                raise SourceError(f"shard cannot be read: {error.strerror}", url, "see data.shards") from error
            return Shard(url, size, None if there is None else tuple(map(str, there)))
        info = self._tried(url, lambda files: files.info(url))
        size = info.get("size")
        if not isinstance(size, int):
            raise SourceError("the server does not say how long the shard is", url, "serve it with a Content-Length")
        told = [str(info[name]) for name in MARKS if info.get(name)]
        where = json.dumps([url, dict(self.options)], sort_keys=True)
        return Shard(url, size, (where, str(size), *told) if told else None)

    def read(self, shard: Shard, start: int, length: int) -> bytes:
        """`length` bytes of a shard, from the kept copy if there is one; raises SourceError if it is shorter by now."""
        path = self.kept(shard) if shard.remote else shard.url
        if path is not None:
            try:
                with open(path, "rb") as file:
                    file.seek(start)
                    data = file.read(length)
            except FileNotFoundError:
                if not shard.remote:  # a kept copy may be thrown out at any time, by another run
                    raise self.changed(shard) from None
            except OSError as error:
                raise SourceError(f"shard cannot be read: {error.strerror}", path) from error
            else:
                if len(data) == length:
                    return data
                if not shard.remote:
                    raise self.changed(shard)
        return self.read_range(shard, start, length)

    def stream(self, shard: Shard) -> BinaryIO:
        """A shard from its first byte to its last; it is kept, if there is room, on the way."""
        path = self.kept(shard) if shard.remote else shard.url
        try:
            return open(path, "rb") if path is not None else io.BufferedReader(_Ranges(self, shard), RANGE_BYTES)
        except OSError as error:
            raise SourceError(f"shard cannot be read: {error.strerror}", path) from error

    def kept(self, shard: Shard) -> str | None:
        """The path of the whole shard on this machine, fetched if it fits; None if it is to be read by ranges.

        Files of other runs make room, least recently used first. What this run uses stays: where not all shards fit,
        taking turns would fetch a whole shard for every picture.
        """
        if not self.cache_bytes or shard.size > self.cache_bytes or shard.mark is None:
            return None
        cache = self.cache_dir or cache_folder()
        if cache is None:
            return None
        folder = self.cache_dir or os.path.join(cache, "shards")
        name = hashlib.sha256(json.dumps(shard.mark).encode()).hexdigest()[:32]
        path = os.path.join(folder, f"{name}.shard")
        try:
            if _use(path, shard.size):
                return path
            os.makedirs(folder, exist_ok=True)
            with locked(f"{path}.lock", wait=False) as alone:
                if not alone:  # another process is fetching it
                    return None
                return path if _use(path, shard.size) or self._keep(shard, path) else None
        except OSError as error:  # no room, or a folder that cannot be written, costs speed, not the run
            _say_once(f"note   shards are not kept in {folder}: {error}")
            return None

    def _keep(self, shard: Shard, path: str) -> bool:
        part = f"{path}.part"
        with locked(os.path.join(os.path.dirname(path), "lock")):
            if not _make_room(os.path.dirname(path), self.cache_bytes - shard.size, self.started, {part}):
                return False
            with open(part, "wb") as file:
                os.truncate(file.fileno(), shard.size)  # claims its place before the lock is given back
        try:
            with open(part, "r+b") as file:
                for start in range(0, shard.size, RANGE_BYTES):
                    file.write(self.read_range(shard, start, min(RANGE_BYTES, shard.size - start)))
            if self.look(shard.url) != shard:
                raise self.changed(shard)
            os.replace(part, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        return True

    def read_range(self, shard: Shard, start: int, length: int) -> bytes:
        """`length` bytes of a shard from the server itself; raises SourceError if it is shorter by now."""
        if not length:
            return b""

        def ask(files: Any) -> bytes:
            try:
                return files.cat_file(shard.url, start=start, end=start + length)
            except Exception as error:  # each client has another class for a range that lies behind the end
                if getattr(error, "errno", None) == errno.EINVAL or getattr(error, "status", None) == 416:
                    return b""
                raise

        data = self._tried(shard.url, ask)
        if len(data) > length:
            what = "the server sends whole files where a range is asked for"
            raise SourceError(what, shard.url, "use another server")
        if len(data) < length:
            raise self.changed(shard)
        return data

    def changed(self, shard: Shard) -> SourceError:
        """The error of a shard that is not what it was when it was indexed."""
        now = self.look(shard.url)
        if now.size != shard.size:
            how = f"it had {shard.size:,} bytes and has {now.size:,}"
        elif now.mark != shard.mark and shard.remote:
            how = f"it was {', '.join((shard.mark or ('?',))[2:])} and is {', '.join((now.mark or ('?',))[2:])}"
        else:
            how = "its bytes are not what they were"
        fix = "start again: it will be indexed anew; a run that read it before was trained on other data"
        return SourceError(f"the shard changed since it was indexed: {how}", shard.url, fix)

    def _tried(self, url: str, ask: Any) -> Any:
        """What `ask` gives of the file system, tried again after errors of the network; raises SourceError."""
        wait = FIRST_WAIT_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return ask(self._files(url))
            except UserError:
                raise
            except NOT_AGAIN as error:
                raise _explained(error, url) from error
            except Exception as error:  # the clients of object stores share no class of errors
                seen = " ".join(str(error).split()) or type(error).__name__
                if type(error).__name__ in NO_CREDENTIALS:
                    raise _explained(error, url) from error
                if attempt == ATTEMPTS:
                    fix = "check the network and storage_options.endpoint_url"
                    what = f"shard cannot be read after {ATTEMPTS} attempts: {seen[:300]}"
                    raise SourceError(what, url, fix) from error
                line = f"note   {url}: {seen[:300]}; attempt {attempt + 1} of {ATTEMPTS} in {wait:g} s"
                print(line, file=sys.stderr, flush=True)
                time.sleep(wait)
                wait *= 2
        raise AssertionError("the last attempt returns or raises")

    def _files(self, url: str) -> Any:
        """This process's file system for a URL."""
        name = protocol(url)
        assert name is not None, "local files are opened as such"
        key = json.dumps([name, dict(self.options)], sort_keys=True)
        with _opening:
            if key not in _file_systems:
                _file_systems[key] = _file_system(name, self.options)
            return _file_systems[key]


class _Ranges(io.RawIOBase):
    """A remote shard as a file that is read from start to end."""

    def __init__(self, storage: Storage, shard: Shard):
        self.storage, self.shard, self.at = storage, shard, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self.shard.size - self.at)
        buffer[:length] = self.storage.read_range(self.shard, self.at, length)
        self.at += length
        return length


def protocol(url: str) -> str | None:
    """`s3`, `gs`, `https` or `http`; None for a local path. Raises ValueError for what is neither."""
    if url.startswith("pipe:"):
        raise ValueError(f"{url!r} would run a command; pipes are not read")
    name, separator, _ = url.partition("://")
    if not separator:
        return None
    if "::" in url or name not in PROTOCOLS:
        raise ValueError(f"{url!r} is not read; a path, s3://, gs://, https:// or http:// is")
    return name


def check_url(url: str) -> None:
    """Raise ValueError for a URL that is not read, or that carries a secret: configs are copied into run folders."""
    if protocol(url) is None:
        return
    parts = urlsplit(url)
    if parts.password or (parts.username and "@" in parts.netloc):
        raise ValueError("a URL with a user or password in it would be copied into the run folder; use the environment")
    if named := [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if SECRET.search(name)]:
        raise ValueError(f"a URL that is signed ({named[0]}=...) would be copied into the run folder")


def check_options(options: Mapping[str, Option]) -> None:
    """Raise ValueError for options that look like secrets."""
    for name, value in options.items():
        if SECRET.search(name):
            raise ValueError(
                f"{name!r} looks like a secret, and configs are copied into run folders; leave it out: credentials are "
                f"taken from the environment or the provider's own files ({'; '.join(CREDENTIALS.values())})"
            )
        if isinstance(value, str) and "://" in value:
            try:
                parts = urlsplit(value)
            except ValueError:
                continue
            if parts.username or parts.password:
                raise ValueError(f"{name!r} holds a user or password, and configs are copied into run folders")


@contextlib.contextmanager
def locked(path: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file among this machine's processes; gives False if another has it and `wait` is off."""
    import fcntl

    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True  # closing the file gives the lock back, and so does the end of the process


def _use(path: str, size: int) -> bool:
    """Whether a whole shard is kept there; notes that it is used."""
    try:
        there = os.stat(path)
        if there.st_size != size:
            return False
        if time.time() - there.st_mtime > USED_AGAIN_SECONDS:
            os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _make_room(folder: str, room: int, started: float, mine: set[str]) -> bool:
    """Whether what is kept takes at most `room` bytes, after files that were not used since `started` are gone."""
    there = []
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):
            if path in mine or (name.endswith(".part") and _left_behind(path)):
                os.unlink(path)
            elif name.endswith((".shard", ".part")):
                stat = os.stat(path)
                there.append((stat.st_mtime, path, stat.st_size))
    used = sum(size for _, _, size in there)
    before = min(started, time.time() - 2 * USED_AGAIN_SECONDS)  # later, and another run may be using it
    old = [(path, size) for mtime, path, size in sorted(there) if mtime < before and path.endswith(".shard")]
    if used - sum(size for _, size in old) > room:
        return False
    for path, size in old:
        if used <= room:
            break
        os.unlink(path)
        used -= size
    return True


def _left_behind(part: str) -> bool:
    """Whether the process that was fetching this file has ended."""
    with locked(f"{part.removesuffix('.part')}.lock", wait=False) as alone:
        return alone


def _file_system(name: str, options: Mapping[str, Option]) -> Any:
    try:
        import fsspec

        given: dict[str, Any] = dict(options)
        if name == "gs" and given.pop("anon", False):
            given["token"] = "anon"
        # Not an instance that the parent of this process may have used, nor listings that may have aged.
        return fsspec.filesystem(name, skip_instance_cache=True, use_listings_cache=False, **given)
    except ImportError as error:
        raise UserError(f"{name}:// needs {PROTOCOLS[name]}, which is not installed", "data.shards", INSTALL) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"storage_options are refused: {error}", "data.storage_options") from error


def _explained(error: Exception, url: str) -> SourceError:
    credentials = CREDENTIALS.get(protocol(url) or "", "the server's own settings")
    if isinstance(error, FileNotFoundError):
        return SourceError("the shard does not exist", url, "see data.shards and storage_options.endpoint_url")
    if isinstance(error, PermissionError) or type(error).__name__ in NO_CREDENTIALS:
        return SourceError("the shard may not be read", url, f"credentials come from {credentials}; public: anon: true")
    seen = " ".join(str(error).split())[:300]
    return SourceError(f"the shard cannot be read: {seen}", url, "see data.storage_options")


_said: set[str] = set()


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr, flush=True)
