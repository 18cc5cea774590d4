"""What a source of captioned pictures hands out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from trainer.data.buckets import Bucket, make_buckets
from trainer.data.captions import PLACE
from trainer.data.fingerprint import leaves, merkle_root
from trainer.data.metadata import shown
from trainer.registry import Part

if TYPE_CHECKING:
    from PIL.Image import Image

# What means something only with bucket_step_px, or with caption_shuffle_tags.
WITHOUT_EFFECT = (
    *("bucket_image_sizes", "bucket_max_aspect", "bucket_max_upscale", "bucket_max_downscale", "bucket_remainder"),
    *("caption_keep_tags", "caption_tag_separator"),
)


@dataclass(frozen=True)
class Record:
    """One captioned picture: `key` names it for good, whatever machine or order it is read in."""

    key: str
    captions: tuple[str, ...]


def silent(line: str) -> None:
    """Say nothing."""


class Look(NamedTuple):
    """What one look at a record's picture found."""

    content: str  # sha256 (64 hex digits) of what it is made from: one changed pixel changes it
    width: int  # pixels, upright; 0 if it cannot be read
    height: int
    fault: str | None = None  # why it cannot be read


class Records(ABC):
    """An opened source: random access by record index. Small to pickle, so that loader workers share it."""

    @abstractmethod
    def __len__(self) -> int:
        """How many records there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """The key and captions of a record, without decoding its picture; a caption that is missing is empty."""

    @abstractmethod
    def image(self, index: int) -> Image:
        """The decoded picture, upright, RGB, of any size; raises UserError naming the record if it cannot be read."""

    @abstractmethod
    def looks(self, fresh: bool = False, say: Callable[[str], None] = silent) -> Iterator[Look]:
        """By index, what each picture is made from, its size, and whether it can be read. Each is decoded once.

        What earlier starts saw is remembered; `fresh` reads every picture again. `say` hears of what takes over 2 s.
        """

    def data(self, index: int) -> bytes | None:
        """The picture as it is stored, in whatever format; None if it is drawn. Raises UserError naming the record."""
        return None

    def where(self, index: int) -> str:
        """Where a person finds the picture: a path, or a shard and what it is called in it."""
        return self[index].key

    def held_out_by(self, index: int) -> str:
        """What decides, by its hash, whether a record is held out: its key; a picture listed twice has one of them."""
        return self[index].key

    def provenance(self) -> dict[str, Any]:
        """What run_manifest.json says of where the records come from, beyond the config and the fingerprint."""
        return {}

    def notes(self) -> list[str]:
        """What the start says of how the records came together, one line each."""
        return []

    def caption_faults(self) -> Iterator[tuple[int, str]]:
        """The records without a caption of words, ascending, each with what is wrong and where it stands."""
        for index in range(len(self)):
            if fault := caption_fault(self[index].captions):
                yield index, f"{shown(self[index].key)}: {fault}"

    def contents(self, fresh: bool = False, say: Callable[[str], None] = silent) -> Iterator[str]:
        """By index, what each picture is made from: the first half of `looks`."""
        return (look.content for look in self.looks(fresh, say))

    def fingerprint(self, contents: Iterable[str] | None = None) -> str:
        """64 hex digits that change with any pixel, any caption, any key and their order, and with nothing else.

        `contents` are what `contents()` gives, where the caller has it.
        """
        return merkle_root(leaves(self, self.contents() if contents is None else contents))


def caption_fault(captions: Sequence[str]) -> str | None:
    """What is wrong with a record's captions, None if each has words in UTF-8."""
    if not captions:
        return "there is no caption"
    for caption in captions:
        if not caption.strip():
            return "the caption is empty"
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            half = caption[error.start]
            escaped = "\udc80" <= half <= "\udcff"  # how Python keeps a byte that it could not decode
            return f"byte 0x{ord(half) - 0xDC00:02x} is not UTF-8" if escaped else "it holds half of a surrogate pair"
    return None


class Source(Part, home="trainer.data.sources"):
    """Section `data`: where records come from, and how each becomes a training sample."""

    image_size: int = Field(
        ge=32,
        le=8192,
        multiple_of=8,
        description="Side of the square training crop, pixels; with buckets, its area is what their areas come up to.",
    )
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
    on_bad: Literal["error", "skip"] = Field(
        default="error",
        description="Pictures that cannot be read: `error` lists them all and ends the start, `skip` leaves them out "
        "and lists them in bad_samples.jsonl. No file is ever touched.",
    )
    max_bad_fraction: float = Field(
        default=0.1, ge=0, le=1, description="Fraction of the records that `skip` may leave out before the run ends."
    )
    on_missing_caption: Literal["error", "empty", "skip"] = Field(
        default="error",
        description="Records with a missing, empty or undecodable caption: `error` lists them all and ends the start, "
        "`empty` trains them unconditionally, or with the captions that can be used, `skip` leaves them out.",
    )
    caption_prefix: str = Field(default="", description="Put before every caption that has words.")
    caption_suffix: str = Field(default="", description="Put behind every caption that has words.")
    caption_templates: tuple[str, ...] = Field(
        default=(),
        description="Sentences with `{caption}` in them, one drawn per sample; prefix and suffix go around it.",
    )
    caption_shuffle_tags: bool = Field(
        default=False, description="Put the tags of a caption into an order drawn per sample."
    )
    caption_keep_tags: int = Field(
        default=0, ge=0, le=1000, description="First tags that shuffling leaves where they are."
    )
    caption_tag_separator: str = Field(default=",", min_length=1, description="What stands between two tags.")
    bucket_step_px: int | None = Field(
        default=None,
        ge=8,
        le=1024,
        multiple_of=8,
        description="Crop each picture to the shape nearest its own, of sides that are multiples of this and an area "
        "of at most image_size squared; a global batch is of one shape. 64 is usual; null means square crops.",
    )
    bucket_image_sizes: tuple[int, ...] = Field(
        default=(), description="Further values of image_size whose areas have buckets too."
    )
    bucket_max_aspect: float = Field(
        default=3.0, ge=1, le=32, description="Longer side over shorter side of the longest bucket."
    )
    bucket_max_upscale: float | None = Field(
        default=None,
        ge=1,
        description="Pictures that would have to be enlarged more for every bucket are left out; null: none.",
    )
    bucket_max_downscale: float | None = Field(
        default=None,
        ge=1,
        description="Pictures that would have to be shrunk more for every bucket are left out; null: none.",
    )
    bucket_remainder: Literal["run_on", "drop"] = Field(
        default="run_on",
        description="What becomes of a bucket's records that fill no whole batch in an epoch: `run_on` fills it with "
        "records of its next epoch, which are not read again in that one; `drop` leaves them out of this epoch.",
    )
    validation_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Fraction of records never trained on, chosen by a hash of each record's key.",
    )

    @field_validator("caption_templates")
    @classmethod
    def _templates_have_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [template for template in templates if PLACE not in template]:
            raise ValueError(f"{wrong[0]!r} has no {PLACE}, so it would hide every caption")
        return templates

    @field_validator("bucket_image_sizes")
    @classmethod
    def _sizes_in_range(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if wrong := [size for size in sizes if not 32 <= size <= 8192 or size % 8]:
            raise ValueError(f"{wrong[0]} is not a multiple of 8 from 32 to 8192")
        return sizes

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        needs = {"bucket_step_px": self.bucket_step_px, "caption_shuffle_tags": self.caption_shuffle_tags}
        for name in WITHOUT_EFFECT:
            needed = "bucket_step_px" if name.startswith("bucket_") else "caption_shuffle_tags"
            if not needs[needed] and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: it means nothing without {needed}")
        return self

    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes of the crops, none if all are square; raises UserError if there are too many or none fits."""
        if self.bucket_step_px is None:
            return ()
        sizes = (self.image_size, *self.bucket_image_sizes)
        return make_buckets(sizes, self.bucket_step_px, self.bucket_max_aspect)

    @abstractmethod
    def open(self) -> Records:
        """Index the records without decoding any picture; raises UserError with file, line and fix."""
