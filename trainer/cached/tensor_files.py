"""Tensors in files: in the safetensors format, whole or not there at all, and read through a memory map."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from trainer.files import open_atomic

ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I64": 8, "U64": 8}
LONGEST_HEADER_BYTES = 100_000_000  # what the library that set the format refuses to read beyond


class DamagedError(Exception):
    """The file is not what was written."""


class Stored(NamedTuple):
    """A tensor in a mapped file."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    data: memoryview

    def array(self, dtype: str) -> np.ndarray[Any, Any]:
        """Its values as numpy's `dtype`, of its shape, still in the file."""
        return np.frombuffer(self.data, dtype).reshape(self.shape)


class Mapped(NamedTuple):
    """A file of tensors in memory that the kernel fills and takes back as it likes."""

    header: bytes  # with the eight bytes of its length
    metadata: dict[str, str]
    tensors: dict[str, Stored]


def header(metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file whose tensors, name to (dtype, shape), follow in this order.

    The library's own writer is not used: it needs a second copy of all the data, and the order of its metadata is that
    of a hash table, so equal tensors need not make equal files.
    """
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + ITEM_BYTES[dtype] * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def map_tensors(path: str | Path) -> Mapped:
    """The tensors of a safetensors file; raises OSError if it cannot be read, DamagedError if it is none.

    The map holds no file descriptor, unlike Python's own: a process may have thousands of them.
    """
    size = os.stat(path).st_size
    if size < 8:
        raise DamagedError(f"it has {size} bytes")
    view = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy().data
    length = 8 + int.from_bytes(view[:8], "little")
    if length > min(size, LONGEST_HEADER_BYTES):
        raise DamagedError("its header is cut off")
    head = bytes(view[:length])
    end = length
    tensors = {}
    try:
        table = json.loads(head[8:])
        metadata = {str(name): str(value) for name, value in table.pop("__metadata__").items()}
        for name, entry in table.items():
            dtype, shape, (start, stop) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
            if stop - start != ITEM_BYTES[dtype] * math.prod(shape) or length + start != end:
                raise DamagedError(f"its header is wrong about {name}")
            end = length + stop
            tensors[name] = Stored(dtype, shape, view[length + start : end])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError("its header cannot be read") from error
    if end != size:
        raise DamagedError(f"it has {size:,} bytes, not {end:,}")
    return Mapped(head, metadata, tensors)


def write_parts(path: str | Path, parts: Iterable[bytes | memoryview]) -> None:
    """Makes `parts`, one after the other, the content of `path` in one durable step; an error leaves it as it was."""
    with open_atomic(path) as file:
        for part in parts:
            file.write(part)


def raw(array: np.ndarray[Any, Any]) -> memoryview:
    """The bytes of an array, without a copy if it lies in one piece."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def content_name(parts: Iterable[bytes | memoryview]) -> str:
    """32 hex digits that name these bytes."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.hexdigest()[:32]
