"""Slots in, batches out. Workers read, decode, crop and draw everything random, off the critical path."""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch

from trainer.data.captions import caption_of
from trainer.data.plan import Plan
from trainer.data.record import Records, Source
from trainer.data.shards import SourceError
from trainer.data.topology import Topology
from trainer.data.transforms import View, fit, size_condition, to_pixels
from trainer.errors import UserError
from trainer.rng import normal, uniform

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.timesteps import TimestepLaw

Tokenize = Callable[[Sequence[str]], "tuple[Tensor, int]"]
LatentShape = Callable[[int, int], tuple[int, int, int]]
MOST_SUBSTITUTES = 100  # records tried for one slot


class Encoded(Protocol):
    """What the encoders made of records and captions before the first step. Raises UserError for what is damaged."""

    def moments(self, index: int, u_variant: float, flip: bool) -> tuple[Tensor, View, tuple[int, int]]:
        """Mean and standard deviation [2, C, h, w] float32 of a record's latents, of the view that `u_variant` in
        [0, 1) chooses among those that are kept; that view; and the picture's size."""
        ...

    def cond(self, caption: str) -> Tensor | None:
        """What the UNet attends to [L, D] float32; None if captions are not kept."""
        ...


class UnreadableError(UserError):
    """A picture that could not be read, by a fault of its own and not of a cache."""


class Substitute(NamedTuple):
    """A record that could not be read when its slot came, and the one that was read in its place."""

    slot: int
    key: str
    reason: str
    instead: str


@dataclass(frozen=True)
class Batch:
    """One micro batch of B samples: everything the step needs, nothing left to draw."""

    slots: list[int]
    keys: list[str]
    captions: list[str]  # as trained on: chosen among the record's, or dropped
    digest: int  # of slots, keys and captions; the sum of them over ranks and micro batches names what a step was fed
    captions_cut: int  # captions too long for the text encoder
    substitutes: list[Substitute]
    pixels: Tensor | None  # [B, 3, H, W] uint8; None if the latents come from a cache
    moments: Tensor | None  # [B, 2, C, h, w] float32 from the cache: mean and standard deviation of the posterior
    text: Tensor  # [B, chunks, 77] int64 token ids, or from the cache [B, L, D] float32, what the UNet attends to
    sizes: Tensor  # [B, 6] int64: original height and width, crop top and left, height and width, as SDXL is told
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
        plan: Plan,
        timesteps: TimestepLaw,
        tokenize: Tokenize,
        latent_shape: LatentShape,
        global_batch: int,
        seed: int,
        encoded: Encoded | None = None,
    ):
        self.source, self.records, self.plan, self.timesteps = source, records, plan, timesteps
        self.tokenize, self.latent_shape, self.global_batch, self.seed = tokenize, latent_shape, global_batch, seed
        self.encoded = encoded

    def __getitem__(self, slots: Sequence[int]) -> Batch | UserError:
        # Returned, not raised: a DataLoader turns a worker's exception into another one with a traceback in its text.
        try:
            return self.batch(list(slots))
        except UserError as error:
            return error

    def batch(self, slots: list[int]) -> Batch:
        """The samples of `slots`, all of one bucket; raises UserError for a picture that cannot be read."""
        substitutes: list[Substitute] = []
        samples = [self._sample(slot, substitutes) for slot in slots]
        records = [self.records[index] for index, *_ in samples]
        keys = [record.key for record in records]
        captions = [
            caption_of(self.source, record.captions, self.seed, slot)
            for slot, record in zip(slots, records, strict=True)
        ]
        tokens, cut = self.tokenize(captions)
        conds = [] if self.encoded is None else [c for c in map(self.encoded.cond, captions) if c is not None]
        shape = self.latent_shape(*self.size(slots[0]))
        stacked = torch.stack([tensor for _, tensor, _ in samples])
        return Batch(
            slots=slots,
            keys=keys,
            captions=captions,
            digest=digest(slots, keys, captions),
            captions_cut=cut,
            substitutes=substitutes,
            pixels=stacked if self.encoded is None else None,
            moments=None if self.encoded is None else stacked,
            text=torch.stack(conds) if conds else tokens,
            sizes=torch.tensor([sizes for *_, sizes in samples]),
            t=torch.tensor(self.timesteps.draw(self.seed, slots, self.global_batch), dtype=torch.float32),
            eps=normal(self.seed, "noise", slots, shape),
            posterior_eps=normal(self.seed, "posterior", slots, shape),
        )

    def size(self, slot: int) -> tuple[int, int]:
        """Width and height of this slot's crop, pixels."""
        return self.plan.bucket(slot) or (self.source.image_size, self.source.image_size)

    def view(self, slot: int) -> View:
        """What this slot shows of its picture."""
        width, height = self.size(slot)
        centre = self.source.center_crop
        u_x = 0.5 if centre else uniform(self.seed, "crop_x", slot)
        u_y = 0.5 if centre else uniform(self.seed, "crop_y", slot)
        return View(width, height, u_x, u_y, self._flip(slot))

    def _flip(self, slot: int) -> bool:
        return self.source.random_flip and uniform(self.seed, "flip", slot) < 0.5

    def _sample(self, slot: int, substitutes: list[Substitute]) -> tuple[int, Tensor, list[int]]:
        """The index of the record that this slot reads, its pixels or moments, and its sizes.

        A picture that has become unreadable since the start is, where the policy allows it, replaced by another record
        of the same bucket that the slot alone decides, so that no rank and no restart replaces it by a third one.
        """
        index = self.plan.record(slot)
        for turn in range(MOST_SUBSTITUTES):
            try:
                return index, *self._input(slot, index)
            except UnreadableError as error:
                if self.source.on_bad == "error":
                    raise
                instead = self.plan.substitute(slot, uniform(self.seed, f"substitute/{turn}", slot))
                if instead == index:
                    continue
                keys = self.records[index].key, self.records[instead].key
                substitutes.append(Substitute(slot, keys[0], f"{self.records.where(index)}: {error.what}", keys[1]))
                index = instead
        raise UserError(
            f"{self.records.where(index)} cannot be read, and nothing of its shape was found to take its place",
            "data",
            "is the storage there? or allow fewer buckets",
        )

    def _input(self, slot: int, index: int) -> tuple[Tensor, list[int]]:
        if self.encoded is None:
            view = self.view(slot)
            try:
                image = self.records.image(index)
            except SourceError:
                raise
            except UserError as error:
                raise UnreadableError(error.what, error.where, error.fix) from error
            return to_pixels(fit(image, view)), size_condition(image.size, view)
        moments, view, size = self.encoded.moments(index, uniform(self.seed, "variant", slot), self._flip(slot))
        return moments, size_condition(size, view)


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


def load_batches(samples: Samples, schedule: SlotSchedule, pin_memory: bool) -> Generator[Batch]:
    """The micro batches of `schedule`, in order; raises the UserError of any of them."""
    ahead = 2 * schedule.topology.accumulation
    return read_ahead(samples, schedule, samples.source.num_workers, ahead, pin_memory)


class HandsOut(Protocol):
    """What a loader's workers ask: for each item what it is, or the UserError that it met."""

    def __getitem__(self, item: Any, /) -> Any: ...


def read_ahead(
    dataset: HandsOut,
    order: Iterable[Sequence[Any]],
    workers: int,
    ahead: int = 2,
    pin_memory: bool = False,
) -> Generator[Any]:
    """What `dataset` has for each of `order`, in order; each worker is up to `ahead` of them in front.

    Raises the UserError that the data set returned in place of any of them.
    """
    loader = torch.utils.data.DataLoader(
        cast("torch.utils.data.Dataset[Any]", dataset),
        sampler=order,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=partial(_begin_worker if pin_memory else _begin_worker_by_value, os.getpid()),
    )
    for item in loader:
        if isinstance(item, UserError):
            item.of_one_rank = True
            raise item
        yield item


def _begin_worker(trainer_pid: int, worker_id: int) -> None:
    # PyTorch's workers end when they get another parent, and take who it is now for the first one.
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != trainer_pid:
        os._exit(1)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; a worker that died of them would end the step that
    # is being finished. Workers end when the trainer says so, or when they see that it is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _begin_worker_by_value(trainer_pid: int, worker_id: int) -> None:
    _begin_worker(trainer_pid, worker_id)
    # PyTorch would put each tensor into shared memory, and the trainer would fetch its file descriptor from a thread of
    # this process: messages and a handshake for every tensor, each waiting for this interpreter's lock while a step
    # waits for them. Through the pipe all of a batch is one message. Not so where a thread of the trainer reads and
    # pins: no step waits for it, and it would wait for ever for the rest of a message whose worker was killed.
    ForkingPickler.register(torch.Tensor, _by_value)
    # A worker would not end before what it wrote is read: never, if the trainer was killed.
    multiprocessing.util.Finalize(None, os._exit, (0,), exitpriority=100)


def _by_value(tensor: Tensor) -> tuple[Callable[[Any], Tensor], tuple[Any]]:
    return torch.from_numpy, (tensor.numpy(),)


@atexit.register
def _end_workers() -> None:
    # Python ends what children are left with the SIGTERM that they ignore, and would wait for them for ever.
    for worker in multiprocessing.active_children():
        worker.kill()
