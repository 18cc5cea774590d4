"""Where a run finds its entries: a table in a mapped file, made by rank 0 once all are there, and its reader."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.cached.store import ABSENT, KEY, KEY_BYTES, Shard, Store, open_shard, unwritable
from trainer.cached.tensor_files import DamagedError, content_name, header, map_tensors, raw, write_parts
from trainer.errors import UserError

KEPT = 8  # lookups of earlier runs; those that a process has open stay too


def write_indexed(store: Store, keys: Iterable[bytes | None], variants: int = 1) -> Path:
    """A lookup by index: `keys` of all variants of entry 0, then of entry 1, and so on; None for one that is absent.

    Raises UserError for a key that the store does not hold.
    """
    every, absent = bytearray(), []
    for number, key in enumerate(keys):
        if key is None:
            absent.append(number)
        every += bytes(KEY_BYTES) if key is None else key
    wanted = np.frombuffer(every, KEY)
    there = np.ones(len(wanted), bool)
    there[absent] = False
    assert len(wanted) % variants == 0, f"{len(wanted)} keys are not {variants} for each entry"
    places, names = _places(store, wanted, there)
    return _write(store, names, {"places": places.reshape(-1, variants)})


def write_keyed(store: Store, keys: Iterable[bytes]) -> Path:
    """A lookup by key. Raises UserError for a key that the store does not hold."""
    every = np.unique(np.frombuffer(bytearray().join(keys), KEY))
    places, names = _places(store, every, np.ones(len(every), bool))
    return _write(store, names, {"places": places.reshape(-1, 1), "keys": every.view("u1").reshape(-1, KEY_BYTES)})


def _places(store: Store, keys: np.ndarray[Any, Any], there: np.ndarray[Any, Any]) -> tuple[np.ndarray, list[str]]:
    contents = store.survey(lambda line: None)
    places = contents.find(keys)
    if lost := int((places[there] == ABSENT).sum()):
        raise UserError(
            f"{lost:,} entries are no longer in the cache", str(store.folder), "start again: they are rebuilt"
        )
    places[~there] = ABSENT
    # Only the shards that are used, so that the same lookup has the same name whatever else is in the folder.
    used, number = np.unique(places[there] >> np.uint64(32), return_inverse=True)
    places[there] = (number.astype(np.uint64) << np.uint64(32)) + (places[there] & np.uint64(2**32 - 1))
    return places, [contents.names[shard] for shard in used.tolist()]


def _write(store: Store, names: list[str], tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    metadata = {"recipe": store.recipe, "shards": json.dumps(names)}
    types = {name: ("U8" if name == "keys" else "U64", values.shape) for name, values in tensors.items()}
    parts = [header(metadata, types), *map(raw, tensors.values())]
    path = store.folder / "lookups" / f"{content_name(parts)}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        write_parts(path, parts)  # also if it is there: it may be damaged, and now it is the newest
        _prune(path.parent)
    except OSError as error:
        if not _is_whole(path, parts):  # a folder that is whole may be read-only
            raise unwritable(error, path.parent) from error
    return path


def _is_whole(path: Path, parts: list[bytes | memoryview]) -> bool:
    """Whether the file is there and holds these bytes."""
    try:
        return path.read_bytes() == b"".join(parts)
    except OSError:
        return False


def _prune(folder: Path) -> None:
    """Remove all but the newest; what a killed run left half written grows old like the rest."""
    newest = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            newest.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(newest, reverse=True)[KEPT:]:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class Lookup:
    """The entries of a run, read through memory maps: of a size in memory that no number of entries changes.

    Pickles as its path, and opens each shard when it is first read in a process, forked or spawned.
    """

    def __init__(self, path: str | Path):
        """Raises UserError for a lookup that is gone or damaged."""
        self.path = Path(path)
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, descriptor)
            with contextlib.suppress(OSError):  # keeps `_prune` away, where the file system has locks
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            mapped = map_tensors(self.path)
            data = [tensor.data for tensor in mapped.tensors.values()]
            if content_name([mapped.header, *data]) != self.path.stem:
                raise DamagedError("it is not what was written")
        except (DamagedError, OSError) as error:
            raise UserError(
                f"the cache's lookup cannot be read: {error}", str(self.path), "start again: it is written anew"
            ) from error
        self._places = mapped.tensors["places"].array("<u8")
        self._keys = mapped.tensors["keys"].array("u1").view(KEY).ravel() if "keys" in mapped.tensors else None
        self._recipe = mapped.metadata["recipe"]
        self._names: list[str] = json.loads(mapped.metadata["shards"])
        self._shards: list[Shard | None] = [None] * len(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lookup, (self.path,)

    def __len__(self) -> int:
        return len(self._places)

    def at(self, index: int, variant: int = 0) -> torch.Tensor:
        """An entry, float32. Raises KeyError if there is none, UserError if it was damaged."""
        return self._read(self._place(index, variant))

    def of(self, key: bytes) -> torch.Tensor:
        """An entry of a lookup by key, float32. Raises KeyError if there is none, UserError if it was damaged."""
        row = self._row_of(key)
        if row is None:
            raise KeyError(key)
        return self._read(int(self._places[row, 0]))

    def _place(self, index: int, variant: int) -> int:
        place = self._places[index, variant]
        if place == ABSENT:
            raise KeyError((index, variant))
        return int(place)

    def _row_of(self, key: bytes) -> int | None:
        assert self._keys is not None, "a lookup by index has no keys"
        wanted = np.frombuffer(key, KEY)[0]
        row = int(self._keys.searchsorted(wanted))
        return row if row < len(self._keys) and self._keys[row] == wanted else None

    def _read(self, place: int) -> torch.Tensor:
        shard = self._shard(place >> 32)
        try:
            return shard.row(place & (2**32 - 1))
        except DamagedError as error:
            raise self._damaged(place >> 32, error) from error

    def _shard(self, number: int) -> Shard:
        shard = self._shards[number]
        if shard is None:
            try:
                shard = self._shards[number] = open_shard(self._shard_path(number), self._recipe)
            except (DamagedError, OSError) as error:
                raise self._damaged(number, error) from error
        return shard

    def _shard_path(self, number: int) -> Path:
        return self.path.parent.parent / self._names[number]

    def _damaged(self, number: int, error: Exception) -> UserError:
        what = error.strerror if isinstance(error, OSError) else error
        return UserError(
            f"the cache is damaged: {what}",
            str(self._shard_path(number)),
            "delete that file and start again: its entries are encoded anew",
        )
