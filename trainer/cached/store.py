"""A folder of entries that were computed once: shards that never change, found by what is in them.

    <cache folder>/<name>-<first 16 hex digits of the recipe's hash>/
        recipe.json             all that an entry depends on beside its key, in the clear
        shard-<hash of its keys>.safetensors
        lookups/                where a run finds its entries
        lock                    held by the run that adds shards

The folder's listing is its only catalogue: a shard is there, whole, or it is not. Each byte of a shard is covered: the
header is the only one that its shape allows, the keys hash to the name of the file, and each row has its CRC. The
recipe's hash is in the folder's name and in every shard, so what another recipe made is never read.

A folder only grows, by the bytes of each new entry: entries that no run wants any more stay until the folder is deleted
by hand, which is safe at any time that no run reads it. A run that adds few entries adds one small shard per shape.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.cached.tensor_files import DamagedError, Stored, header, map_tensors, raw, write_parts
from trainer.errors import RunEnd, StorageFailed, UserError
from trainer.files import sweep_temp_files

Say = Callable[[str], None]

FORMAT = 1
KEY_BYTES, CRC_BYTES = 16, 8
KEY = "S16"  # numpy's type whose order is that of the bytes
DTYPES = {"fp32": ("F32", torch.float32), "fp16": ("F16", torch.float16), "bf16": ("BF16", torch.bfloat16)}
ABSENT = np.uint64(2**64 - 1)
PAUSES_SECONDS = (0.5, 2.0, 8.0)  # between attempts to write a shard

_SHARD_NAME = re.compile(r"shard-([0-9a-f]{32})\.safetensors")


class Store:
    """The folder of one recipe; making one touches no disk."""

    def __init__(self, parent: str | Path, name: str, recipe: Mapping[str, Any], dtype: str):
        """`recipe` is all that an entry depends on beside its key, as JSON can hold it; `dtype` fp32, fp16 or bf16."""
        full = {**recipe, "format": FORMAT, "dtype": dtype}
        self.recipe_text = json.dumps(full, sort_keys=True, indent=2, allow_nan=False) + "\n"
        self.recipe = hashlib.sha256(self.recipe_text.encode()).hexdigest()
        self.dtype = dtype
        self.folder = Path(parent) / f"{name}-{self.recipe[:16]}"

    def create(self) -> None:
        """Make the folder, if it is not there; raises UserError if that cannot be done."""
        path, text = self.folder / "recipe.json", self.recipe_text.encode()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_bytes() != text:
                write_parts(path, [text])
        except OSError as error:
            raise UserError(f"no cache can be kept here: {error.strerror}", str(self.folder)) from error

    @contextlib.contextmanager
    def locked(self, say: Say) -> Iterator[None]:
        """Within it no other process adds shards; waits for one that does, and says so once. May raise UserError.

        A POSIX record lock, as it drops with its process, and forked loader workers, which may outlive that, do not
        inherit it. No process may hold it twice.
        """
        path = self.folder / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"nothing can be added to the cache: {error.strerror}", str(path)) from error
        try:
            if not _try_lock(descriptor):
                say(f"cache  waiting for another run that is building {self.folder}")
                while not _try_lock(descriptor):
                    time.sleep(0.2)
            sweep_temp_files(self.folder)
            yield
        finally:
            os.close(descriptor)

    def sweep(self) -> None:
        """Remove what killed builds left half written, unless a build is going on."""
        with contextlib.suppress(OSError, UserError):  # a folder that may only be read is as good
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if _try_lock(descriptor):
                    sweep_temp_files(self.folder)
            finally:
                os.close(descriptor)

    def write_shard(self, keys: np.ndarray[Any, Any], payload: torch.Tensor) -> None:
        """Keep rows [n, ...] in the store's dtype under keys [n, 16] uint8; raises StorageFailed if that fails."""
        crc32 = np.array([zlib.crc32(row) for row in _row_bytes(payload)], np.int64)
        path = self.folder / shard_name(keys)
        parts = [
            shard_header(self.recipe, self.dtype, len(keys), tuple(payload.shape[1:])),
            *(raw(crc32), raw(keys), _bytes_of(payload)),
        ]
        for pause in (*PAUSES_SECONDS, None):
            try:
                write_parts(path, parts)
                return
            except OSError as error:
                if pause is None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise StorageFailed(
                        f"{path} could not be written: {error.strerror}; a restart encodes only what is not kept yet"
                    ) from error
                time.sleep(pause)

    def shard(self, name: str) -> Shard:
        """A shard of this store; raises DamagedError, or OSError if it cannot be read."""
        return open_shard(self.folder / name, self.recipe)

    def survey(self, say: Say, remove_damaged: bool = False) -> Contents:
        """What is kept; each damaged shard is left out, with a line. Raises UserError for a folder that cannot be read.

        Rows are not read: a damaged one is found when it is.
        """
        names, keys, places = [], [], []
        for name, shard in shards_of(self.folder, self.recipe):
            if isinstance(shard, str):
                say(f"cache  {name} is damaged ({shard}): its entries count as not encoded")
                if remove_damaged:
                    (self.folder / name).unlink(missing_ok=True)
                continue
            keys.append(np.array(shard.keys).view(KEY).ravel())
            places.append((np.uint64(len(names)) << np.uint64(32)) + np.arange(len(shard), dtype=np.uint64))
            names.append(name)
        return Contents.of(names, keys, places)


def unwritable(error: OSError, folder: Path) -> RunEnd:
    """What ends a run that cannot write a small file of a cache."""
    what = f"nothing can be written to the cache in {folder}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFailed(what)
    return UserError(what, "cache.dir", "change the folder's permissions, or give another one")


@dataclass(frozen=True)
class Contents:
    """What a store holds at one moment."""

    names: list[str]  # of shards, sorted
    keys: np.ndarray[Any, Any]  # [n] S16, sorted
    places: np.ndarray[Any, Any]  # [n] uint64 of each key: the shard's number times 2**32, plus the row

    @classmethod
    def of(cls, names: list[str], keys: list[np.ndarray[Any, Any]], places: list[np.ndarray[Any, Any]]) -> Contents:
        every = np.concatenate([np.empty(0, KEY), *keys])
        order = np.argsort(every, kind="stable")
        return cls(names, every[order], np.concatenate([np.empty(0, np.uint64), *places])[order])

    def find(self, keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The place of each of keys [n] S16, [n] uint64; ABSENT for what is not kept."""
        if not len(self.keys):
            return np.full(len(keys), ABSENT)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.places[at], ABSENT)


class Shard:
    """A mapped shard: n rows of one shape."""

    def __init__(self, path: Path, dtype: str, crc32: Stored, keys: Stored, payload: Stored):
        self.path, self.shape = path, payload.shape[1:]
        self.keys, self._crc32, self._payload = keys.array("u1"), crc32.array("<i8"), payload.data
        self._dtype = DTYPES[dtype][1]
        self._row_bytes = len(payload.data) // max(1, len(self.keys))

    def __len__(self) -> int:
        return len(self.keys)

    def row(self, row: int) -> torch.Tensor:
        """A row, float32, in memory of its own; raises DamagedError if it is not what was written."""
        data = bytearray(self._payload[row * self._row_bytes : (row + 1) * self._row_bytes])
        if zlib.crc32(data) != self._crc32[row]:
            raise DamagedError(f"row {row} is not what was written")
        return torch.frombuffer(data, dtype=self._dtype).view(self.shape).float()

    def faults(self) -> Iterator[str]:
        """What is wrong with its rows, one line for each."""
        for row in range(len(self)):
            if zlib.crc32(self._payload[row * self._row_bytes : (row + 1) * self._row_bytes]) != self._crc32[row]:
                yield f"row {row} is not what was written"


def open_shard(path: Path, recipe: str) -> Shard:
    """The shard at `path`; raises DamagedError unless header, size, recipe and keys are right. Rows are not read."""
    header_bytes, metadata, tensors = map_tensors(path)
    if metadata.get("recipe") != recipe:
        raise DamagedError("another recipe made it")
    dtype = metadata.get("dtype", "")
    payload = tensors.get("payload")
    if payload is None or dtype not in DTYPES or not payload.shape:
        raise DamagedError("it is no shard of a cache")
    if header_bytes != shard_header(recipe, dtype, payload.shape[0], payload.shape[1:]):
        raise DamagedError("its header is not what was written")
    shard = Shard(path, dtype, **tensors)
    if shard_name(shard.keys) != path.name:
        raise DamagedError("its keys are not those that its name is made of")
    return shard


def shards_of(folder: Path, recipe: str) -> Iterator[tuple[str, Shard | str]]:
    """Each shard of a folder, by name, or what is wrong with it; raises UserError if it cannot be read at all."""
    try:
        for name in sorted(filter(_SHARD_NAME.fullmatch, os.listdir(folder))):
            try:
                yield name, open_shard(folder / name, recipe)
            except DamagedError as error:
                yield name, str(error)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"the cache cannot be read: {error.strerror}", error.filename or str(folder)) from error


def verify_store(folder: str | Path, say: Say) -> Iterator[tuple[str, str | None]]:
    """Each shard of the folder with what is wrong with it, or None: every byte is read. Raises UserError for no cache.

    Safe while runs read the folder or add to it. `say` hears how far it is.
    """
    folder = Path(folder)
    try:
        recipe = hashlib.sha256((folder / "recipe.json").read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"this is no cache: {error.strerror}", str(folder / "recipe.json")) from error
    if not folder.name.endswith(f"-{recipe[:16]}"):
        raise UserError(
            "the recipe is not the one that the folder is named by",
            str(folder / "recipe.json"),
            "delete that file: the next run that uses the cache writes it anew",
        )
    said = time.monotonic()
    for count, (name, shard) in enumerate(shards_of(folder, recipe)):
        yield name, shard if isinstance(shard, str) else next(shard.faults(), None)
        if time.monotonic() > said + 10:
            said = time.monotonic()
            say(f"cache  {count + 1:,} shards read")


def shard_name(keys: np.ndarray[Any, Any]) -> str:
    """The file name of a shard of keys [n, 16] uint8."""
    return f"shard-{hashlib.sha256(raw(keys)).hexdigest()[:32]}.safetensors"


def shard_header(recipe: str, dtype: str, count: int, shape: tuple[int, ...]) -> bytes:
    """The header of a shard of `count` rows of `shape`. Rows come last, so that a survey reads the file's front."""
    return header(
        {"format": str(FORMAT), "recipe": recipe, "dtype": dtype},
        {
            "crc32": ("I64", (count,)),
            "keys": ("U8", (count, KEY_BYTES)),
            "payload": (DTYPES[dtype][0], (count, *shape)),
        },
    )


def _row_bytes(payload: torch.Tensor) -> Iterator[memoryview]:
    data = _bytes_of(payload)
    size = len(data) // max(1, len(payload))
    return (data[start : start + size] for start in range(0, len(data), size))


def _bytes_of(payload: torch.Tensor) -> memoryview:
    return payload.contiguous().view(-1).view(torch.uint8).numpy().data


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"the file system of the cache has no locks: {error.strerror}") from error
        return False
    return True
