from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.data.transforms import View
from trainer.encoder_cache.base import EncodingCache, Job, Variants, caption_key, wanted_latents, wanted_texts
from trainer.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trainer.cached.build import Encode, Ranks, Wanted
    from trainer.data.loader import Encoded


class Memory(EncodingCache):
    """In memory, encoded anew at each start: nothing can be stale, nothing is left behind. For data that fits."""

    kind = "memory"

    def encode(self, job: Job, with_text: bool, ranks: Ranks) -> Encoded:
        return in_memory(job, self.crops, with_text, ranks)


def in_memory(job: Job, crops: int, with_text: bool, ranks: Ranks) -> InMemory:
    """All that `job` wants, encoded by all ranks, in the memory of each; raises UserError if it does not fit."""
    variants = job.variants(crops)
    wanted: dict[tuple[int, ...], list[Wanted]] = {}
    for entry in wanted_latents(job, variants, ("" for _ in range(len(job.records)))):
        wanted.setdefault(entry.shape, []).append(replace(entry, key=b""))  # nothing is kept under a key
    texts = list({entry.key: entry for entry in wanted_texts(job, variants)}.values()) if with_text else []
    everything = [*(entry for some in wanted.values() for entry in some), *texts]
    ranks.from_main(lambda: _refuse_if_too_large(everything, ranks))
    started = time.monotonic()
    moments = {}
    for some in wanted.values():
        moments |= _shared(some, lambda chunks: job.moments_of(map(variants.shown, chunks)), ranks)
    conds = _shared(texts, lambda chunks: job.conds_of(job.captions_of(chunk, variants) for chunk in chunks), ranks)
    sizes = ranks.from_main(lambda: job.sizes)
    ranks.say(f"cache  encoded in {time.monotonic() - started:.0f} s")
    by_key = {entry.key: conds[entry.index] for entry in texts}
    assert sizes is not None, "rank 0 knows the sizes of the pictures"
    return InMemory(variants, moments, by_key if with_text else None, sizes)


class InMemory:
    """Reads what `Memory` keeps."""

    def __init__(
        self,
        variants: Variants,
        moments: dict[int, Tensor],
        conds: dict[bytes, Tensor] | None,
        sizes: np.ndarray[Any, Any],
    ):
        self._variants, self._moments, self._conds, self._sizes = variants, moments, conds, sizes

    def moments(self, index: int, u_variant: float, flip: bool) -> tuple[Tensor, View, tuple[int, int]]:
        variant = self._variants.chosen(index, u_variant, flip)
        width, height = map(int, self._sizes[index])
        moments = self._moments[index * self._variants.count + variant]
        return moments, self._variants.view(index, variant), (width, height)

    def cond(self, caption: str) -> Tensor | None:
        return None if self._conds is None else self._conds[caption_key(caption)]


def _refuse_if_too_large(wanted: list[Wanted], ranks: Ranks) -> None:
    import psutil

    size = sum(4 * math.prod(entry.shape) for entry in wanted) * ranks.local_world_size  # each rank has a whole copy
    free = psutil.virtual_memory().available
    if size > free // 2:
        raise UserError(
            f"the cache takes {size / 2**20:.2f} MiB; half of {free / 2**20:.2f} MiB is free for it",
            "cache",
            "leave the section out, use fewer records, or keep it on disk: cache.kind=disk",
        )
    ranks.say(f"cache  {len(wanted):,} entries in float32 = {size / 2**20:.1f} MiB; encoding them")


def _shared(wanted: list[Wanted], encode: Encode, ranks: Ranks) -> dict[int, Tensor]:
    """What `encode` makes of `wanted`, entries of one shape, by their index; the ranks share the work."""
    from trainer.cached.build import CHUNK

    chunks = [wanted[start : start + CHUNK] for start in range(0, len(wanted), CHUNK)]
    shares = ranks.gather(list(encode(chunks[ranks.rank :: ranks.world_size])) if chunks else [])
    found = {}
    for number, chunk in enumerate(chunks):
        values = shares[number % ranks.world_size][number // ranks.world_size]
        found |= {entry.index: value for entry, value in zip(chunk, values, strict=True)}
    return found
