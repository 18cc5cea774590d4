"""Pictures and captions encoded once, instead of at every step that trains on them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from trainer.data.buckets import HELD_OUT, LEFT_OUT, OUT_OF_SCALE
from trainer.data.captions import possible_captions
from trainer.data.record import Records, Source
from trainer.data.roll import TRAINED, Roll
from trainer.data.transforms import TRANSFORM, View
from trainer.errors import UserError
from trainer.registry import Part
from trainer.rng import uniform

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trainer.cached.build import Encode, Ranks, Wanted
    from trainer.cached.lookup import Lookup
    from trainer.cached.store import Store
    from trainer.data.loader import Encoded
    from trainer.latents import OnlineVae
    from trainer.models.base import Components, ModelFamily

CAPTIONS_OF_A_RECORD = 2**20  # at most, so that a caption has a number
EMPTY_CAPTION = -1  # its number, whatever the records


@dataclass(frozen=True)
class Variants:
    """The views of each record that a cache keeps, by variant: crops, and of each crop as it is and flipped."""

    source: Source
    records: Records
    roll: Roll
    crops: int
    most_held_out: int

    @property
    def count(self) -> int:
        """How many variants a record has at most."""
        return self.crops * (1 + self.source.random_flip)

    def code(self, index: int) -> int:
        """What becomes of the record: its bucket's number, or one of the codes for records that have none."""
        return TRAINED if self.roll.codes is None else int(self.roll.codes[index])

    def of(self, index: int) -> list[View]:
        """The views of a record, none of one that is neither trained on nor among the first held-out ones."""
        code = self.code(index)
        if code in (LEFT_OUT, OUT_OF_SCALE) or (code == HELD_OUT and index not in self.held_out):
            return []
        return [self.view(index, variant) for variant in range(1 if code == HELD_OUT else self.count)]

    def view(self, index: int, variant: int) -> View:
        """A function of the record's key and the variant, so that runs share it; of a held-out record its centre."""
        code, side = self.code(index), self.source.image_size
        if code == HELD_OUT:
            return View(side, side, 0.5, 0.5, flip=False)
        width, height = self.roll.buckets[code] if self.roll.buckets else (side, side)
        crop, flip = divmod(variant, 1 + self.source.random_flip)
        if self.source.center_crop:
            return View(width, height, 0.5, 0.5, bool(flip))
        key = int.from_bytes(hashlib.blake2b(self.records[index].key.encode(), digest_size=8).digest(), "little")
        return View(width, height, uniform(crop, "cached_crop_x", key), uniform(crop, "cached_crop_y", key), bool(flip))

    def chosen(self, index: int, u_variant: float, flip: bool) -> int:
        """The variant for a sample whose crop is chosen by `u_variant` in [0, 1)."""
        if self.code(index) == HELD_OUT:
            return 0
        return int(u_variant * self.crops) * (1 + self.source.random_flip) + flip

    @cached_property
    def held_out(self) -> set[int]:
        """The held-out records that the loss is taken over."""
        return set(islice(self.roll.held_out, self.most_held_out))


@dataclass(frozen=True)
class Job:
    """What a run wants encoded, and the networks that do it. Rank 0 alone knows `contents` and `sizes`."""

    source: Source
    records: Records
    roll: Roll
    most_held_out: int
    family: ModelFamily
    components: Components
    vae: Callable[[], OnlineVae]  # loads it
    text_encoder: Callable[[], Any]  # loads it, on its device
    device: Any
    contents: Iterable[str] | None  # sha256 of each picture, by index; read several times
    sizes: np.ndarray[Any, Any] | None  # [N, 2] uint32: width and height of each picture

    def variants(self, crops: int) -> Variants:
        """The views to keep, with so many crops of each record."""
        return Variants(self.source, self.records, self.roll, crops, self.most_held_out)

    def captions(self, index: int, variants: Variants) -> list[str]:
        """Everything that a sample of the record may be captioned with, but for the empty caption."""
        if not variants.of(index):
            return []
        captions = possible_captions(self.source, self.records[index].captions)
        return list(dict.fromkeys(caption for caption in captions if caption))

    def moments_of(self, shown: Iterable[list[tuple[int, View]]]) -> Iterator[Tensor]:
        """Mean and standard deviation of the posteriors of each list of views, [n, 2, C, h, w] float32 on the CPU."""
        import torch

        from trainer.data.loader import Pictures, read_ahead

        vae = self.vae()
        with contextlib.closing(read_ahead(Pictures(self.records), shown, self.source.num_workers)) as pictures:
            for pixels in pictures:
                yield torch.stack(vae.posterior(pixels.to(self.device)), dim=1).cpu()

    def conds_of(self, captions: Iterable[list[str]]) -> Iterator[Tensor]:
        """What the text encoder makes of each list of captions, [n, L, D] float32 on the CPU."""
        import torch

        encoder = self.text_encoder()
        for some in captions:
            tokens, _ = self.family.tokenize(self.components.tokenizer, some)
            with torch.no_grad(), torch.autocast(torch.device(self.device).type, enabled=False):
                yield self.family.encode_text(encoder, tokens.to(self.device)).float().cpu()


class EncodingCache(Part, home="trainer.encoder_cache", default_kind="disk"):
    """Section `cache`: what the frozen encoders answered, kept. Times and noise stay as random as ever."""

    text: bool = Field(
        default=True, description="Keep the text encoder's outputs too; false, or a trained text encoder, keeps none."
    )

    def check(self, source: Source, text_encoder_learns: bool) -> None:
        """Raise UserError if a record gives more pictures or captions than a cache can keep."""
        if self.keeps_text(text_encoder_learns) and source.caption_shuffle_tags:
            raise UserError(
                "a cache cannot keep a caption in every order of its tags",
                "data.caption_shuffle_tags",
                "turn it off, or cache.text",
            )

    def keeps_text(self, text_encoder_learns: bool) -> bool:
        """Whether the text encoder's outputs are kept."""
        return self.text and not text_encoder_learns

    @abstractmethod
    def encode(self, job: Job, with_text: bool, ranks: Ranks) -> Encoded:
        """Encode what is not kept yet, on all ranks, and say how to find it. Every rank calls it.

        Raises UserError for a picture that cannot be read or a cache that does not fit, StorageFailed for one that
        cannot be written.
        """


class Disk(EncodingCache):
    """In a folder that runs may share: nothing that is kept is encoded again, nothing stale can be found."""

    kind = "disk"

    dir: str = Field(
        min_length=1, description="The folder; with several machines, one that all of them see. It only grows."
    )
    dtype: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp16", description="How values are kept; one that fp16 cannot hold is an error that names the record."
    )
    crops: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Random crops kept of each record, one of which is drawn per sample; with data.center_crop 1.",
    )

    def check(self, source: Source, text_encoder_learns: bool) -> None:
        super().check(source, text_encoder_learns)
        if source.center_crop and self.crops > 1:
            raise UserError("with data.center_crop there is one crop of a record", "cache.crops", "leave it out")
        if not source.center_crop and self.crops == 1:
            raise UserError(
                "a cache of one crop would show every record in one random place for ever",
                "cache.crops",
                "keep 2 or more, or set data.center_crop to true",
            )

    def encode(self, job: Job, with_text: bool, ranks: Ranks) -> Encoded:
        from trainer.cached.build import build
        from trainer.cached.lookup import Lookup, write_indexed

        variants, store = job.variants(self.crops), self.latent_store(job)

        def shown(chunk: list[Wanted]) -> list[tuple[int, View]]:
            return [
                (index, variants.view(index, each)) for index, each in (divmod(w.index, variants.count) for w in chunk)
            ]

        build(
            store,
            _latents(job, variants),
            lambda chunks: job.moments_of(map(shown, chunks)),
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

        def caption(number: int) -> str:
            index, which = divmod(number, CAPTIONS_OF_A_RECORD)
            return "" if number == EMPTY_CAPTION else job.captions(index, variants)[which]

        store = self.text_store(job)
        build(
            store,
            _texts(job, variants),
            lambda chunks: job.conds_of([caption(entry.index) for entry in chunk] for chunk in chunks),
            ranks,
            name=lambda entry: f"the caption {caption(entry.index)!r}",
        )
        return Lookup(ranks.from_main(lambda: write_keyed(store, (entry.key for entry in _texts(job, variants)))))

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


class Memory(EncodingCache):
    """In memory, encoded anew at each start: nothing can be stale, nothing is left behind. For data that fits."""

    kind = "memory"

    def check(self, source: Source, text_encoder_learns: bool) -> None:
        super().check(source, text_encoder_learns)
        if not source.center_crop:
            raise UserError(
                "a cache in memory keeps one crop of a record, not a random one",
                "data.center_crop",
                "set it to true, or keep several crops on disk: cache.kind=disk",
            )

    def encode(self, job: Job, with_text: bool, ranks: Ranks) -> Encoded:
        variants = job.variants(crops=1)
        wanted: dict[tuple[int, ...], list[Wanted]] = {}
        for entry in _wanted_latents(job, variants, ("" for _ in range(len(job.records)))):
            wanted.setdefault(entry.shape, []).append(entry)
        texts = list({entry.key: entry for entry in _texts(job, variants)}.values()) if with_text else []
        _refuse_if_too_large([*(entry for some in wanted.values() for entry in some), *texts], ranks)
        started = time.monotonic()

        def shown(chunk: list[Wanted]) -> list[tuple[int, View]]:
            return [
                (index, variants.view(index, each)) for index, each in (divmod(w.index, variants.count) for w in chunk)
            ]

        def caption(number: int) -> str:
            index, which = divmod(number, CAPTIONS_OF_A_RECORD)
            return "" if number == EMPTY_CAPTION else job.captions(index, variants)[which]

        moments = {}
        for some in wanted.values():
            moments |= _shared(some, lambda chunks: job.moments_of(map(shown, chunks)), ranks)
        conds = _shared(texts, lambda chunks: job.conds_of([caption(w.index) for w in c] for c in chunks), ranks)
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


def _latents(job: Job, variants: Variants) -> Iterator[Wanted]:
    """What a run wants of the VAE; rank 0 alone can tell."""
    assert job.contents is not None, "rank 0 knows what the pictures hold"
    return _wanted_latents(job, variants, job.contents)


def _wanted_latents(job: Job, variants: Variants, contents: Iterable[str]) -> Iterator[Wanted]:
    from trainer.cached.build import Wanted

    for index, content in enumerate(contents):
        for variant, view in enumerate(variants.of(index)):
            shape = 2, *job.family.latent_shape(job.components.vae_config, view.width, view.height)
            yield Wanted(picture_key(content, view), shape, index * variants.count + variant)


def _latent_keys(job: Job, variants: Variants) -> Iterator[bytes | None]:
    """The key of every variant of every record, None for one that is not kept."""
    assert job.contents is not None, "rank 0 knows what the pictures hold"
    for index, content in enumerate(job.contents):
        keys: list[bytes | None] = [picture_key(content, view) for view in variants.of(index)]
        yield from keys + [None] * (variants.count - len(keys))


def _texts(job: Job, variants: Variants) -> Iterator[Wanted]:
    """What a run wants of the text encoder: the empty caption, and each caption of each record that it uses."""
    from trainer.cached.build import Wanted

    tokens, _ = job.family.tokenize(job.components.tokenizer, [""])
    shape = tokens.shape[1] * tokens.shape[2], job.components.text_config.hidden_size
    yield Wanted(caption_key(""), shape, EMPTY_CAPTION)
    for index in range(len(job.records)):
        for number, caption in enumerate(job.captions(index, variants)):
            assert number < CAPTIONS_OF_A_RECORD, f"record {index} has {number} captions"
            yield Wanted(caption_key(caption), shape, index * CAPTIONS_OF_A_RECORD + number)


def picture_key(content: str, view: View) -> bytes:
    """16 bytes that change with any byte of the picture and anything of how it is shown."""
    return hashlib.blake2b(f"{TRANSFORM} {content} {tuple(view)}".encode(), digest_size=16).digest()


def caption_key(caption: str) -> bytes:
    """16 bytes that change with any character of the caption."""
    return hashlib.blake2b(caption.encode(), digest_size=16).digest()


def _write_sizes(folder: Path, sizes: np.ndarray[Any, Any] | None) -> str:
    """The path of a file with the pictures' sizes, named by what it holds."""
    import numpy as np

    from trainer.cached.tensor_files import write_parts

    assert sizes is not None, "rank 0 knows the sizes of the pictures"
    data = np.ascontiguousarray(sizes, "<u4")
    path = folder / "sizes" / f"{hashlib.sha256(data.data).hexdigest()[:32]}"
    try:
        path.parent.mkdir(exist_ok=True)
        write_parts(path, [data.data.cast("B")])  # also if it is there: it may be damaged
    except OSError as error:
        raise UserError(f"nothing can be written to the cache: {error.strerror}", str(path.parent)) from error
    return str(path)


def _refuse_if_too_large(wanted: list[Wanted], ranks: Ranks) -> None:
    import psutil

    size = sum(4 * math.prod(entry.shape) for entry in wanted)
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
    shares, ranks_ = (
        ranks.gather(list(encode(chunks[ranks.rank :: ranks.world_size])) if chunks else []),
        ranks.world_size,
    )
    found = {}
    for number, chunk in enumerate(chunks):
        values = shares[number % ranks_][number // ranks_]
        found |= {entry.index: value for entry, value in zip(chunk, values, strict=True)}
    return found
