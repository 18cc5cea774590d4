"""What a device can do at best: products of matrices, copies, and attention at a UNet's shapes by every backend."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_device import Marks
from networks import TOKENS, Network
from row_file import Row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

REPEATS = 10  # of which the median counts
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def milliseconds(device: torch.device, act: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The median time of `act`, after two that are not looked at."""
    marks = Marks(device)
    marks.add()
    for _ in range(2 + repeats):
        act()
        marks.add()
    return statistics.median(marks.gaps()[0][2:])


def matmul(device: torch.device, dtype: torch.dtype) -> Row:
    """TFLOP/s of a product of two square matrices of random numbers: of zeros it would be faster than any real one."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    ms = milliseconds(device, lambda: a @ b)
    return {"size": size, "ms": round(ms, 4), "tflops": round(2 * size**3 / ms / 1e9, 3)}


def copy(device: torch.device) -> Row:
    """GB/s read and written by a copy within the device's memory."""
    count = 2**30 if device.type == "cuda" else 2**24  # bytes; more than any cache
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = milliseconds(device, lambda: target.copy_(source))
    return {"bytes": count, "ms": round(ms, 4), "gb_per_second": round(2 * count / ms / 1e6, 1)}


def ceilings(device: torch.device, shape: Network, batch: int, pixels: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The name of each figure, and what measures it."""
    yield "matmul bf16", lambda: matmul(device, torch.bfloat16)
    yield "matmul fp32", lambda: matmul(device, torch.float32)
    yield "copy", lambda: copy(device)
    for (level, (heads, width, tokens)), (to, keys), backend in itertools.product(
        enumerate(attention_shapes(shape, pixels)), (("itself", None), ("text", TOKENS)), BACKENDS
    ):
        size = (batch, heads, tokens, width), keys or tokens
        name = f"attention level {level} to {to}, {backend}"
        yield name, lambda size=size, backend=backend: attention(device, *size, backend)


def attention_shapes(shape: Network, pixels: int) -> list[tuple[int, int, int]]:
    """Heads, width of a head, and tokens of every resolution at which the UNet attends."""
    channels, heads = shape.unet["block_out_channels"], shape.unet["attention_head_dim"]  # the number, by a misnomer
    side = shape.latents(1, pixels)[-1]
    found = []
    for level, (width, kind) in enumerate(zip(channels, shape.unet["down_block_types"], strict=True)):
        count = heads if isinstance(heads, int) else heads[level]
        if "CrossAttn" in kind or level == len(channels) - 1:  # the middle attends at the last one
            found.append((count, width // count, (side // 2**level) ** 2))
    return found


def attention(device: torch.device, size: tuple[int, int, int, int], keys: int, backend: str) -> Row:
    """Milliseconds of attention in bf16, and of it with its backward, whose TFLOP/s; queries [B, heads, L, D]."""
    batch, heads, tokens, width = size
    row: Row = {"batch": batch, "heads": heads, "width": width, "queries": tokens, "keys": keys}
    q, k, v = (
        torch.randn(batch, heads, length, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        for length in (tokens, keys, keys)
    )
    gradient = torch.randn_like(q)

    def forward() -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return scaled_dot_product_attention(q, k, v)

    try:
        forward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return row | {"unavailable": str(error).split(". ")[0]}  # this backend has no kernel for it here
    row["forward_ms"] = round(milliseconds(device, forward, 5), 4)
    row["ms"] = round(milliseconds(device, lambda: torch.autograd.grad(forward(), (q, k, v), gradient), 5), 4)
    flop = 4 * batch * heads * tokens * keys * width  # of the two products of a forward; a backward has twice as many
    row["tflops"] = round(3 * flop / row["ms"] / 1e9, 4)
    return row
