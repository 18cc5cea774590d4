"""What a source of captioned pictures hands out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from trainer.data.fingerprint import leaves, merkle_root
from trainer.registry import Part

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Record:
    """One captioned picture: `key` names it for good, whatever machine or order it is read in."""

    key: str
    captions: tuple[str, ...]


def silent(line: str) -> None:
    """Say nothing."""


class Records(ABC):
    """An opened source: random access by record index. Small to pickle, so that loader workers share it."""

    empty_captions: int = 0  # records with a blank caption: they train the unconditional model

    @abstractmethod
    def __len__(self) -> int:
        """How many records there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """The key and captions of a record, without decoding its picture."""

    @abstractmethod
    def image(self, index: int) -> Image:
        """The decoded picture, upright, RGB, of any size; raises UserError naming the record if it cannot be read."""

    @abstractmethod
    def contents(self, fresh: bool = False, say: Callable[[str], None] = silent) -> Iterator[str]:
        """By index, a sha256 (64 hex digits) of what each picture is made from: one changed pixel changes it.

        `fresh` trusts nothing that was remembered of an earlier start. `say` hears of what takes over 2 s. Raises
        UserError naming the record if it cannot be read.
        """

    def fingerprint(self, contents: Iterable[str] | None = None) -> str:
        """64 hex digits that change with any pixel, any caption, any key and their order, and with nothing else.

        `contents` are what `contents()` gives, where the caller has it. Raises what that raises.
        """
        return merkle_root(leaves(self, self.contents() if contents is None else contents))


class Source(Part, home="trainer.data.sources"):
    """Section `data`: where records come from, and how each becomes a training sample."""

    image_size: int = Field(ge=32, le=8192, multiple_of=8, description="Side of the square training crop, pixels.")
    num_workers: int = Field(
        default=2, ge=0, le=256, description="Loader processes per rank; 0 loads inside the training process."
    )
    center_crop: bool = Field(default=False, description="Crop the centre instead of a random place drawn per sample.")
    random_flip: bool = Field(default=False, description="Mirror half of the samples left to right, drawn per sample.")
    caption_dropout: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Fraction of samples trained with an empty caption, for classifier-free guidance.",
    )
    validation_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Fraction of records never trained on, chosen by a hash of each record's key.",
    )

    @abstractmethod
    def open(self) -> Records:
        """Index the records without decoding any picture; raises UserError with file, line and fix."""
