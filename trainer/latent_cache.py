"""Pictures encoded once, instead of at every step that trains on them."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from typing import TYPE_CHECKING

from trainer.data.record import Source
from trainer.errors import UserError
from trainer.registry import Part

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.loader import Samples
    from trainer.latents import OnlineVae
    from trainer.runtime import Runtime

CHUNK = 32  # records encoded together: always the same ones, so that no number of ranks can change a bit


class LatentCache(Part, home="trainer.latent_cache"):
    """Section `cache`: the VAE's answer to every record, kept. Captions, times and noise stay as random as ever."""

    def check(self, source: Source) -> None:
        """Raise UserError if a record gives another picture each time it is read: a cache would keep one of them."""
        if source.random_flip:
            raise UserError(
                "a cache keeps one picture of a record, not two", "data.random_flip", "turn one of them off"
            )
        if not source.center_crop:
            raise UserError(
                "a cache keeps one crop of a record, not a random one",
                "data.center_crop",
                "set it to true, or no `cache`",
            )

    @abstractmethod
    def moments(self, samples: Samples, vae: OnlineVae, runtime: Runtime) -> Tensor:
        """Mean and standard deviation of every record's posterior, [N, 2, C, h, w] float32 on the CPU.

        Every rank calls it and gets all of it. Raises UserError for a picture that cannot be read.
        """


class Memory(LatentCache):
    """In memory, encoded anew at each start: nothing can be stale, nothing is left behind. For data that fits."""

    kind = "memory"

    def moments(self, samples: Samples, vae: OnlineVae, runtime: Runtime) -> Tensor:
        import psutil
        import torch

        from trainer.data.loader import Pictures, read_ahead

        count, shape = len(samples.records), (2, *samples.latent_shape)
        size = count * math.prod(shape) * 4
        free = psutil.virtual_memory().available
        if size > free // 2:
            raise UserError(
                f"the cache takes {size / 2**20:.2f} MiB; half of {free / 2**20:.2f} MiB is free for it",
                "cache",
                "leave the section out, or use fewer records",
            )
        runtime.say(
            f"cache  {count} records x {' x '.join(map(str, shape))} x 4 bytes = {size / 2**20:.1f} MiB; encoding them"
        )
        started = time.monotonic()
        chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        pictures = read_ahead(Pictures(samples), chunks[runtime.rank :: runtime.world_size], samples.source.num_workers)
        mine = [torch.stack(vae.posterior(pixels.to(runtime.device)), dim=1).cpu() for pixels in pictures]
        shares, ranks = runtime.gather(mine), runtime.world_size
        runtime.say(f"cache  encoded in {time.monotonic() - started:.0f} s")
        return torch.cat([shares[chunk % ranks][chunk // ranks] for chunk in range(len(chunks))])
