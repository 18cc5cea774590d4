"""Slots in, batches out. Workers read, decode, crop and draw everything random, off the critical path."""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from trainer.data.plan import BatchPlan
from trainer.data.record import Records, Source
from trainer.data.topology import Topology
from trainer.data.transforms import fit, to_tensor
from trainer.errors import UserError
from trainer.rng import normal, randint, uniform

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.timesteps import TimestepLaw

Tokenize = Callable[[Sequence[str]], "tuple[Tensor, int]"]


@dataclass(frozen=True)
class Batch:
    """One micro batch of B samples: everything the step needs, nothing left to draw."""

    slots: list[int]
    keys: list[str]
    captions: list[str]  # as trained on: chosen among the record's, or dropped
    digest: int  # of slots, keys and captions; the sum of them over ranks and micro batches names what a step was fed
    captions_cut: int  # captions too long for the text encoder
    pixels: Tensor | None  # [B, 3, H, W] float32 in [-1, 1]; None if the latents come from a cache
    moments: Tensor | None  # [B, 2, C, h, w] float32 from the cache: mean and standard deviation of the posterior
    tokens: Tensor  # [B, chunks, 77] int64
    t: Tensor  # [B] float32 in [0, 1)
    eps: Tensor  # [B, C, h, w] standard normal: the noise
    posterior_eps: Tensor  # [B, C, h, w] standard normal: samples the VAE's posterior

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; copies from pinned memory do not wait."""
        moved = {f.name: value for f in fields(self) if torch.is_tensor(value := getattr(self, f.name))}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in moved.items()})

    def pin_memory(self) -> Batch:
        """Called by the loader's pinning thread."""
        pinned = {f.name: value for f in fields(self) if torch.is_tensor(value := getattr(self, f.name))}
        return replace(self, **{name: value.pin_memory() for name, value in pinned.items()})


class Samples(torch.utils.data.Dataset[Any]):
    """The micro batch of any list of slots. A function of the slots alone: not of rank, worker, or call order."""

    def __init__(
        self,
        source: Source,
        records: Records,
        plan: BatchPlan,
        timesteps: TimestepLaw,
        tokenize: Tokenize,
        latent_shape: tuple[int, int, int],
        global_batch: int,
        seed: int,
        moments: Tensor | None = None,
    ):
        self.source, self.records, self.plan, self.timesteps = source, records, plan, timesteps
        self.tokenize, self.latent_shape, self.global_batch, self.seed = tokenize, latent_shape, global_batch, seed
        self.moments = moments  # [N, 2, C, h, w] of all records, if they are encoded already

    def __getitem__(self, slots: Sequence[int]) -> Batch | UserError:
        # Returned, not raised: a DataLoader turns a worker's exception into another one with a traceback in its text.
        try:
            return self.batch(list(slots))
        except UserError as error:
            return error

    def batch(self, slots: list[int]) -> Batch:
        """The samples of `slots`; raises UserError for a picture that cannot be read."""
        indices = [self.plan.record(slot) for slot in slots]
        captions = [self.caption(slot, index) for slot, index in zip(slots, indices, strict=True)]
        keys = [self.records[index].key for index in indices]
        tokens, cut = self.tokenize(captions)
        return Batch(
            slots=slots,
            keys=keys,
            captions=captions,
            digest=digest(slots, keys, captions),
            captions_cut=cut,
            pixels=None if self.moments is not None else torch.stack(list(map(self.pixels, slots, indices))),
            moments=None if self.moments is None else self.moments[indices],
            tokens=tokens,
            t=torch.tensor(self.timesteps.draw(self.seed, slots, self.global_batch), dtype=torch.float32),
            eps=normal(self.seed, "noise", slots, self.latent_shape),
            posterior_eps=normal(self.seed, "posterior", slots, self.latent_shape),
        )

    def caption(self, slot: int, index: int) -> str:
        """One of the record's captions, or the empty one where dropout falls on this slot."""
        if uniform(self.seed, "caption_dropout", slot) < self.source.caption_dropout:
            return ""
        captions = self.records[index].captions
        return captions[randint(self.seed, "caption", slot, len(captions))]

    def pixels(self, slot: int, index: int) -> Tensor:
        """The record's picture, resized and cropped, [3, image_size, image_size] float32 in [-1, 1]."""
        centre = self.source.center_crop
        u_x = 0.5 if centre else uniform(self.seed, "crop_x", slot)
        u_y = 0.5 if centre else uniform(self.seed, "crop_y", slot)
        flip = self.source.random_flip and uniform(self.seed, "flip", slot) < 0.5
        return to_tensor(fit(self.records.image(index), self.source.image_size, u_x, u_y, flip))


def digest(slots: Sequence[int], keys: Sequence[str], captions: Sequence[str]) -> int:
    """A number of 64 bits for what these slots were fed: the sum over the samples, so that no order or cut matters."""
    total = 0
    for sample in zip(slots, keys, captions, strict=True):
        name = "\0".join(map(str, sample)).encode("utf-8", "surrogatepass")
        total += int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
    return total % 2**64


class SlotSchedule(torch.utils.data.Sampler[list[int]]):
    """The slots of every micro batch of this rank from `first_step` to `max_steps`."""

    def __init__(self, topology: Topology, first_step: int, max_steps: int):
        self.topology, self.first_step, self.max_steps = topology, first_step, max_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.max_steps):
            yield from self.topology.slots(step)


class Pictures(torch.utils.data.Dataset[Any]):
    """The pictures of any list of records, for a cache: of a source whose crop and flip do not depend on the slot."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitem__(self, indices: Sequence[int]) -> Tensor | UserError:
        try:
            return torch.stack([self.samples.pixels(0, index) for index in indices])
        except UserError as error:
            return error


def load_batches(samples: Samples, schedule: SlotSchedule, pin_memory: bool) -> Generator[Batch]:
    """The micro batches of `schedule`, in order; raises the UserError of any of them."""
    ahead = 2 * schedule.topology.accumulation
    return read_ahead(samples, schedule, samples.source.num_workers, ahead, pin_memory)


def read_ahead(
    dataset: torch.utils.data.Dataset[Any],
    order: Iterable[Sequence[int]],
    workers: int,
    ahead: int = 2,
    pin_memory: bool = False,
) -> Generator[Any]:
    """What `dataset` has for each of `order`, in order; each worker is up to `ahead` of them in front.

    Raises the UserError that the data set returned in place of any of them.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    for item in loader:
        if isinstance(item, UserError):
            item.of_one_rank = True
            raise item
        yield item


def _leave_signals_to_the_trainer(worker_id: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; a worker that died of them would end the step that
    # is being finished. Workers end when the trainer says so, or when they see that it is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    # Python ends what children are left with the SIGTERM that they ignore, and would wait for them for ever.
    for worker in multiprocessing.active_children():
        worker.kill()
