"""Pictures and captions encoded once, instead of at every step that trains on them."""

from __future__ import annotations

import contextlib
import hashlib
import io
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from trainer.data.buckets import HELD_OUT, LEFT_OUT, OUT_OF_SCALE
from trainer.data.captions import possible_captions
from trainer.data.image_file import MAX_PIXELS, decode
from trainer.data.looks import forget_look
from trainer.data.record import Records, Source
from trainer.data.roll import TRAINED, Roll
from trainer.data.transforms import TRANSFORM, View, as_float
from trainer.errors import UserError
from trainer.registry import Part
from trainer.rng import uniform

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from trainer.cached.build import Ranks, Wanted
    from trainer.data.loader import Encoded
    from trainer.latents import OnlineVae
    from trainer.models.base import Components, ModelFamily

CAPTIONS_OF_A_RECORD = 2**20  # at most, so that a caption has a number
MOST_PIXELS = 2**20  # that the VAE encodes at once: four pictures of 512 px
EMPTY_CAPTION = -1  # its number, whatever the records


class Shown(NamedTuple):
    """A record in one view, and the key under which what the VAE makes of it is kept."""

    record: int  # its index
    view: View
    key: bytes


class Pictures:
    """The pictures of any list of `Shown`, stacked; a data set for a loader, whose workers return their UserErrors."""

    def __init__(self, records: Records):
        self.records = records

    def __getitem__(self, shown: Iterable[Shown]) -> Tensor | UserError:
        import torch

        from trainer.data.transforms import fit, to_pixels

        try:
            return torch.stack([to_pixels(fit(self.image(each), each.view)) for each in shown])
        except UserError as error:
            return error

    def image(self, shown: Shown) -> Image:
        """The picture, if it is the one that its key was made of; raises UserError if it is another one by now."""
        where, data = self.records.where(shown.record), self.records.data(shown.record)
        if data is None:  # drawn, not stored
            return self.records.image(shown.record)
        if shown.key and picture_key(hashlib.sha256(data).hexdigest(), shown.view) != shown.key:
            forget_look(where)
            raise UserError("picture changed since it was looked at", where, "start again")
        try:
            return decode(io.BytesIO(data), where, 2 * MAX_PIXELS)  # its size was seen to when it was looked at
        except UserError:
            forget_look(where)
            raise


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

    def shown(self, chunk: Iterable[Wanted]) -> list[Shown]:
        """Which record in which view each entry that `wanted_latents` gives stands for."""
        return [Shown(w.index // self.count, self.view(*divmod(w.index, self.count)), w.key) for w in chunk]

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

    def caption(self, number: int, variants: Variants) -> str:
        """The caption that `wanted_texts` gives this number."""
        index, which = divmod(number, CAPTIONS_OF_A_RECORD)
        return "" if number == EMPTY_CAPTION else self.captions(index, variants)[which]

    def captions_of(self, chunk: Iterable[Wanted], variants: Variants) -> list[str]:
        """The captions that entries of `wanted_texts` stand for."""
        return [self.caption(entry.index, variants) for entry in chunk]

    def moments_of(self, shown: Iterable[list[Shown]]) -> Iterator[Tensor]:
        """Mean and standard deviation of the posteriors of each list of views, [n, 2, C, h, w] float32 on the CPU.

        All views of a list have one size. The VAE is given MOST_PIXELS at once, whatever the ranks and the list.
        """
        import torch

        from trainer.data.loader import read_ahead

        vae, ahead = self.vae(), deque[int]()

        def parts() -> Iterator[list[Shown]]:
            for chunk in shown:
                size = max(1, MOST_PIXELS // (chunk[0].view.width * chunk[0].view.height))
                cut = [chunk[start : start + size] for start in range(0, len(chunk), size)]
                ahead.append(len(cut))
                yield from cut

        done: list[Tensor] = []
        with contextlib.closing(read_ahead(Pictures(self.records), parts(), self.source.num_workers)) as pictures:
            for pixels in pictures:
                try:
                    done.append(torch.stack(vae.posterior(as_float(pixels.to(self.device))), dim=1).cpu())
                except torch.OutOfMemoryError as error:
                    count, _, height, width = pixels.shape
                    raise UserError(
                        f"out of memory encoding {count} pictures of {width} x {height} pixels",
                        "cache",
                        "set model.vae_precision=bf16, or lower data.image_size",
                    ) from error
                if len(done) == ahead[0]:
                    ahead.popleft()
                    yield torch.cat(done)
                    done = []

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

    crops: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Random crops kept of each record, one of which is drawn per sample; 1 with data.center_crop.",
    )
    text: bool = Field(
        default=True, description="Keep the text encoder's outputs too; false, or a trained text encoder, keeps none."
    )

    def check(self, source: Source, text_encoder_learns: bool) -> None:
        """Raise UserError if a record gives more pictures or captions than a cache can keep."""
        if source.center_crop and self.crops > 1:
            raise UserError("with data.center_crop there is one crop of a record", "cache.crops", "leave it out")
        if not source.center_crop and self.crops == 1:
            raise UserError(
                "a cache of one crop would show every record in one random place for ever",
                "cache.crops",
                "keep 2 or more, or set data.center_crop to true",
            )
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


def wanted_latents(job: Job, variants: Variants, contents: Iterable[str] | None) -> Iterator[Wanted]:
    """What a run wants of the VAE."""
    from trainer.cached.build import Wanted

    assert contents is not None, "rank 0 alone knows what the pictures hold"
    for index, content in enumerate(contents):
        for variant, view in enumerate(variants.of(index)):
            shape = 2, *job.family.latent_shape(job.components.vae_config, view.width, view.height)
            yield Wanted(picture_key(content, view), shape, index * variants.count + variant)


def wanted_texts(job: Job, variants: Variants) -> Iterator[Wanted]:
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
