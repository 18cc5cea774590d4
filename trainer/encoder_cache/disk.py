from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from trainer.data.record import Source
from trainer.data.transforms import View
from trainer.encoder_cache.base import (
    EncodingCache,
    Job,
    Variants,
    caption_key,
    picture_key,
    wanted_latents,
    wanted_texts,
)
from trainer.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trainer.cached.build import Ranks
    from trainer.cached.lookup import Lookup
    from trainer.cached.store import Store
    from trainer.data.loader import Encoded


class Disk(EncodingCache):
    """In a folder that runs may share: nothing that is kept is encoded again, nothing stale can be found."""

    kind = "disk"

    dir: str = Field(
        min_length=1, description="The folder; with several machines, one that all of them see. It only grows."
    )
    dtype: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp16", description="How values are kept; one that fp16 cannot hold is an error that names the record."
    )

    def check(self, source: Source, text_encoder_learns: bool) -> None:
        super().check(source, text_encoder_learns)
        path = Path(os.path.expanduser(self.dir)).absolute()
        there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
        if not there.is_dir():
            raise UserError(f"{str(there)!r} is not a folder", "cache.dir", "give a folder, which need not exist yet")

    def encode(self, job: Job, with_text: bool, ranks: Ranks) -> Encoded:
        from trainer.cached.build import build
        from trainer.cached.lookup import Lookup, write_indexed

        variants, store = job.variants(self.crops), self.latent_store(job)
        build(
            store,
            wanted_latents(job, variants, job.contents),
            lambda chunks: job.moments_of(map(variants.shown, chunks)),
            ranks,
            name=lambda entry: job.records.where(entry.index // variants.count),
        )
        sizes = ranks.from_main(lambda: _write_sizes(store.folder, job.sizes))
        path = ranks.from_main(lambda: write_indexed(store, _latent_keys(job, variants), variants.count))
        conds = self._encode_texts(job, variants, ranks) if with_text else None
        return OnDisk(variants, Lookup(path), conds, sizes)

    def _encode_texts(self, job: Job, variants: Variants, ranks: Ranks) -> Lookup:
        from trainer.cached.build import build
        from trainer.cached.lookup import Lookup, write_keyed

        store = self.text_store(job)
        build(
            store,
            wanted_texts(job, variants),
            lambda chunks: job.conds_of(job.captions_of(chunk, variants) for chunk in chunks),
            ranks,
            name=lambda entry: f"the caption {job.caption(entry.index, variants)!r}",
        )
        return Lookup(ranks.from_main(lambda: write_keyed(store, (entry.key for entry in wanted_texts(job, variants)))))

    def latent_store(self, job: Job) -> Store:
        """Where the latents of this model are kept."""
        from trainer.cached.store import Store

        recipe = {"vae": job.components.hash_encoders()["vae"], "precision": job.family.vae_precision}
        return Store(os.path.expanduser(self.dir), "latents", recipe, self.dtype)

    def text_store(self, job: Job) -> Store:
        """Where the text encoder's outputs of this model are kept."""
        from trainer.cached.store import Store

        recipe = {"text_encoder": job.components.hash_encoders()["text_encoder"], **job.family.text_recipe()}
        return Store(os.path.expanduser(self.dir), "text", recipe, self.dtype)


class OnDisk:
    """Reads what `Disk` keeps, through memory maps that loader workers share."""

    def __init__(self, variants: Variants, moments: Lookup, conds: Lookup | None, sizes: str):
        self._variants, self._moments, self._conds, self._sizes_path = variants, moments, conds, sizes

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_sizes"}

    @cached_property
    def _sizes(self) -> np.ndarray[Any, Any]:
        import numpy as np

        return np.memmap(self._sizes_path, "<u4", mode="r").reshape(-1, 2)

    def moments(self, index: int, u_variant: float, flip: bool) -> tuple[Tensor, View, tuple[int, int]]:
        variant = self._variants.chosen(index, u_variant, flip)
        width, height = map(int, self._sizes[index])
        return self._moments.at(index, variant), self._variants.view(index, variant), (width, height)

    def cond(self, caption: str) -> Tensor | None:
        return None if self._conds is None else self._conds.of(caption_key(caption))


def _latent_keys(job: Job, variants: Variants) -> Iterator[bytes | None]:
    """The key of every variant of every record, None for one that is not kept."""
    assert job.contents is not None, "rank 0 knows what the pictures hold"
    for index, content in enumerate(job.contents):
        keys: list[bytes | None] = [picture_key(content, view) for view in variants.of(index)]
        yield from keys + [None] * (variants.count - len(keys))


def _write_sizes(folder: Path, sizes: np.ndarray[Any, Any] | None) -> str:
    """The path of a file with the pictures' sizes, named by what it holds."""
    import numpy as np

    from trainer.cached.store import unwritable
    from trainer.cached.tensor_files import write_parts

    assert sizes is not None, "rank 0 knows the sizes of the pictures"
    data = np.ascontiguousarray(sizes, "<u4")
    path = folder / "sizes" / f"{hashlib.sha256(data.data).hexdigest()[:32]}"
    try:
        if path.exists() and path.stat().st_size == data.nbytes and path.read_bytes() == data.tobytes():
            return str(path)
        path.parent.mkdir(exist_ok=True)
        write_parts(path, [data.data.cast("B")])
    except OSError as error:
        raise unwritable(error, path.parent) from error
    return str(path)
