"""From what was seen of every record to what is said of it: the facts of `audit.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.audit import picture
from trainer.data.audit.captions import Captions, Tokens, count_captions, count_tokens, fault_class
from trainer.data.audit.duplicates import Duplicates, find_duplicates
from trainer.data.audit.near import LEAST_STEPS, MOST_BITS, MOST_RMS
from trainer.data.audit.policies import Facts, Outcome, outcome_of, outcomes
from trainer.data.buckets import HELD_OUT, LEFT_OUT, OUT_OF_SCALE
from trainer.data.plan import BucketPlan
from trainer.data.roll import LeftOut

if TYPE_CHECKING:
    from trainer.data.audit.album import Album
    from trainer.data.record import Records, Source

FORMAT = 1  # of the file; counts up when a reader of it would have to change
SUFFIX_OF = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}
ENLARGED = (1.0, 1.25, 1.5, 2.0, 4.0)  # the edges of the histogram of scales, and their inverses

# What a record can be found to be, in the order in which it is told, with what it means.
CLASSES = {
    "unreadable": "the picture cannot be read",
    "over_pixel_limit": "more pixels than data.max_pixels; refused from the header, not decoded",
    "caption_missing": "there is no caption",
    "caption_empty": "the caption has no words",
    "caption_not_utf8": "the caption is not UTF-8",
    "caption_cut": "the caption is longer than the text encoder reads; what is beyond is lost",
    "changed": "not what the run had",
    "out_of_scale": "left out: beyond the scale limits of every bucket",
    "too_small": "smaller than its crop, so it is enlarged",
    "extreme_aspect": "longer than data.bucket_max_aspect times its shorter side",
    "wrong_suffix": "the content is of another format than the name says; it is read by its content",
    "rotated": "turned upright by its EXIF orientation",
    "transparent": "transparent parts are laid over white",
    "animated": "an animation; the first frame is read",
    "grayscale": "gray; trained as RGB",
    "sixteen_bit": "16 bits a channel; read with 8",
    "cmyk": "made for print; converted to RGB without a colour profile",
}
TRAITS = {
    "rotated": picture.ROTATED,
    "transparent": picture.TRANSPARENT,
    "animated": picture.ANIMATED,
    "grayscale": picture.GRAYSCALE,
    "sixteen_bit": picture.SIXTEEN_BIT,
    "cmyk": picture.CMYK,
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Tokenizer:
    """The run's own: how many tokens each text has, and how many the text encoder reads."""

    lengths_of: Callable[[Sequence[str]], Sequence[int]]
    room: int


@dataclass(frozen=True)
class Asked:
    """What an audit is of."""

    source: Source
    records: Records
    global_batch: int
    seed: int


def facts(
    asked: Asked, album: Album, tokenizer: Tokenizer | str, run: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All that was found, as JSON. `tokenizer` may be why there is none. `run` has what a run's list of records says:
    `path`, whether the data `differs` from the run's, and `changes` by key, or None with `why` there are none."""
    source, records = asked.source, asked.records
    bad = [LeftOut(index, f"{records.where(index)}: {fault}") for index, fault in sorted(album.faults.items())]
    captions = dict(records.caption_faults())
    known = Facts(records, album.sizes, bad, len(captions), asked.global_batch, asked.seed)
    every = outcomes(source, known)
    configured = next(
        one for one in every if (one.on_bad, one.on_missing_caption) == (source.on_bad, source.on_missing_caption)
    )
    shown = _shown(configured, every, source, known)
    found = _Found(asked, album, shown)
    duplicates = find_duplicates(records, album)
    findings: dict[str, list[Row]] = {name: [] for name in CLASSES}
    for index, fault in sorted(album.faults.items()):
        name = "over_pixel_limit" if index in album.over_limit else "unreadable"
        findings[name].append(found.row(index, fault))
    for index, told in captions.items():
        findings[f"caption_{fault_class(told)}"].append(found.row(index, told))
    findings |= found.of_pictures()
    tokens = (
        count_tokens(source, records, set(captions), tokenizer.lengths_of, tokenizer.room)
        if isinstance(tokenizer, Tokenizer)
        else None
    )
    if tokens is not None:
        findings["caption_cut"] += [found.cut(*each, tokens.room) for each in tokens.cut]
    changes = run and run["changes"]
    if changes:
        findings["changed"] += found.changed(changes)
    counts = {name: len(rows) for name, rows in findings.items()}
    return {
        "format": FORMAT,
        "verdict": _verdict(configured, found, counts["changed"], bool(run and run["differs"])),
        "data": {
            "kind": source.kind,
            "records": len(records),
            "fingerprint": records.fingerprint(album),
            **{name: getattr(source, name) for name in ("image_size", "bucket_step_px", "on_bad", "max_bad_fraction")},
            "on_missing_caption": source.on_missing_caption,
            "formats": found.formats(),
        },
        "counts": counts,
        "findings": findings,
        "duplicates": found.duplicates(duplicates),
        "captions": _captions(found, count_captions(records, set(captions)), tokens)
        | {"not_counted": tokenizer if isinstance(tokenizer, str) else None},
        "epoch": found.epoch(),
        "scales": found.scales(),
        "policies": [_policy(one, configured) for one in every],
        "run": None
        if run is None
        else {name: run[name] for name in ("path", "differs", "why")} | {"changed": counts["changed"]},
    }


def _captions(found: _Found, written: Captions, tokens: Tokens | None) -> Row:
    """What the captions come to, in words and, where they were counted, in tokens."""
    counted = tokens and {
        "room": tokens.room,
        "captions": tokens.captions,
        "cut": tokens.captions_cut,
        "lost": tokens.lost,
        "longest": {"tokens": tokens.longest[0], **found.name(tokens.longest[1])} if tokens.captions else None,
        "histogram": tokens.histogram(),
    }
    repeated = [
        {"caption": one.caption, "records": one.records, "first": found.name(one.record)} for one in written.repeated
    ]
    return {
        "written": written.written,
        "distinct": written.distinct,
        "most_repeated": repeated,
        "tokens": counted,
    }


def _shown(configured: Outcome, every: Sequence[Outcome], source: Source, known: Facts) -> Outcome:
    """What the config makes of the records; if it refuses them, what leaving out the faulty ones would make of them."""
    if configured.plan is not None:
        return configured
    if allowed := [one for one in every if one.plan is not None]:
        return allowed[-1]
    return outcome_of(source.model_copy(update={"max_bad_fraction": 1.0}), known, "skip", "skip")


def _policy(one: Outcome, configured: Outcome) -> Row:
    roll = one.call and one.call.roll
    return {
        "on_bad": one.on_bad,
        "on_missing_caption": one.on_missing_caption,
        "configured": one is configured,
        "exit_code": one.exit_code,
        "refused": one.refused,
        "exceeds_max_bad_fraction": one.too_many_bad,
        "trained": roll and roll.trained,
        "held_out": roll and len(roll.held_out),
        "left_out": one.call and len(one.call.left_out),
        "without_caption": one.call and one.call.without_caption,
    }


def _verdict(configured: Outcome, found: _Found, changed: int, differs: bool) -> Row:
    which = f"{changed:,} records are" if changed else "The data is"
    unlike = f" {which} not what the run had." if differs else ""
    if configured.refused is not None:
        sentence = f"A run with this config would be refused: {configured.refused}."
    else:
        assert configured.call is not None
        roll, left = configured.call.roll, len(configured.call.left_out)
        parts = [f"{roll.trained:,} of {len(found.album):,} records would be trained on"]
        parts += [f"{len(roll.held_out):,} held out"] * bool(roll.held_out) + [f"{left:,} left out"] * bool(left)
        sentence = f"A run with this config could start: {', '.join(parts)}."
    return {
        "could_start": configured.refused is None,
        "exit_code": int(configured.refused is not None or differs),
        "sentence": sentence + unlike,
    }


class _Found:
    """The records of an audit in the words of its report."""

    def __init__(self, asked: Asked, album: Album, outcome: Outcome):
        self.asked, self.album, self.records, self.outcome = asked, album, asked.records, outcome
        source, roll = asked.source, outcome.call and outcome.call.roll
        self.codes = np.zeros(len(album), np.uint8) if roll is None or roll.codes is None else roll.codes
        self.codes = np.where(album.sizes[:, 0] > 0, self.codes, LEFT_OUT)
        square = (source.image_size, source.image_size)
        table = np.array([*(roll.buckets if roll else ()), *[square] * 256][:256], np.float64)
        table[HELD_OUT] = square
        self.crops = table[self.codes]  # [N, 2]
        sizes = np.maximum(album.sizes, 1).astype(np.float64)
        self.scale = (self.crops / sizes).max(axis=1)  # that makes a picture cover its crop
        self.kept = self.crops.prod(axis=1) / (sizes.prod(axis=1) * self.scale**2)  # part of it that a crop shows
        self.aspect = sizes.max(axis=1) / sizes.min(axis=1)
        self.used = ~np.isin(self.codes, (LEFT_OUT, OUT_OF_SCALE))

    def name(self, index: int) -> Row:
        """How a record is called, for programs and for people."""
        return {"index": index, "key": self.records[index].key, "where": self.records.where(index)}

    def row(self, index: int, reason: str, **more: Any) -> Row:
        """A record and what is to be said of it."""
        return self.name(index) | {"reason": reason} | more

    def formats(self) -> dict[str, int]:
        """How many pictures are of each format."""
        counts = np.bincount(self.album.formats, minlength=len(picture.FORMATS) + 1)
        return {name: int(count) for name, count in zip(picture.FORMATS, counts, strict=False) if count}

    def of_pictures(self) -> dict[str, list[Row]]:
        """What is odd about pictures that can be read."""
        return {
            "out_of_scale": list(self._out_of_scale()),
            "too_small": list(self._too_small()),
            "extreme_aspect": list(self._extreme()),
            "wrong_suffix": list(self._wrong_suffix()),
            **{
                name: [self.row(i, CLASSES[name]) for i in np.flatnonzero(self.album.traits & bit).tolist()]
                for name, bit in TRAITS.items()
            },
        }

    def _out_of_scale(self) -> Iterator[Row]:
        for index in np.flatnonzero(self.codes == OUT_OF_SCALE).tolist():
            size = self._size(index)
            yield self.row(index, f"{_px(size.values())} is beyond the scale limits of every bucket", **size)

    def _size(self, index: int) -> Row:
        width, height = self.album.sizes[index].tolist()
        return {"width": width, "height": height}

    def _too_small(self) -> Iterator[Row]:
        for index in np.flatnonzero(self.used & (self.scale > 1)).tolist():
            size, scale = self._size(index), float(self.scale[index])
            reason = f"{_px(size.values())} is enlarged {scale:.2f} times to cover {_px(self.crops[index])}"
            yield self.row(index, reason, scale=round(scale, 4), **size)

    def _extreme(self) -> Iterator[Row]:
        for index in np.flatnonzero(self.aspect > self.asked.source.bucket_max_aspect).tolist():
            size, aspect, kept = self._size(index), float(self.aspect[index]), float(self.kept[index])
            crop = f"; a crop of {_px(self.crops[index])} shows {kept:.0%} of it" if self.used[index] else ""
            told = round(aspect, 4), round(kept, 4)
            yield self.row(
                index, f"{_px(size.values())} is {aspect:.2f} : 1{crop}", aspect=told[0], kept=told[1], **size
            )

    def _wrong_suffix(self) -> Iterator[Row]:
        for index in np.flatnonzero(self.album.formats < len(picture.FORMATS)).tolist():
            key = self.records[index].key
            suffix = f".{key.rpartition('.')[2].lower()}"
            seen = picture.FORMATS[self.album.formats[index]]
            if SUFFIX_OF.get(suffix, seen) != seen:
                yield self.row(index, f"it is called {suffix} but is {seen}", format=seen)

    def cut(self, index: int, tokens: int, captions: int, room: int) -> Row:
        """A record whose longest caption has so many tokens; so many of its captions are cut."""
        several = f"; {captions} of its captions are cut" if captions > 1 else ""
        reason = f"{tokens:,} tokens, of which the last {tokens - room:,} are not read{several}"
        return self.row(index, reason, tokens=tokens, captions=captions)

    def changed(self, changes: Mapping[str, str]) -> Iterator[Row]:
        """What became of the records that a run had; those that are gone have no index."""
        index_of = {self.records[index].key: index for index in range(len(self.records))}
        for key, what in changes.items():
            if key in index_of:
                yield self.row(index_of[key], what)
            else:
                yield {"index": None, "key": key, "where": None, "reason": what}

    def duplicates(self, found: Duplicates) -> Row:
        """Groups of records with the same picture."""

        def group(indices: Sequence[int], **more: Any) -> Row:
            held = {int(self.codes[index]) == HELD_OUT for index in indices if self.used[index]}
            return {"records": [self.name(i) | self._size(i) for i in indices], "also_held_out": len(held) > 1} | more

        return {
            "same_bytes": [group(indices) for indices in found.same_bytes],
            "same_pixels": [group(indices) for indices in found.same_pixels],
            "near": [group(near.records, bits=near.bits, rms=round(near.rms, 2)) for near in found.near],
            "too_plain_to_compare": found.plain,
            "listed_again": found.listed_again,
            "near_rule": {"most_bits": MOST_BITS, "most_rms": MOST_RMS, "least_clear_steps": LEAST_STEPS},
        }

    def epoch(self) -> Row | None:
        """What the first epoch makes of the records; None if nothing can be trained on."""
        plan, batch = self.outcome.plan, self.asked.global_batch
        if plan is None or self.outcome.call is None:
            return None
        row: Row = {
            "hypothetical": None
            if self.asked.source.on_bad == self.outcome.on_bad
            and self.asked.source.on_missing_caption == self.outcome.on_missing_caption
            else f"as with data.on_bad={self.outcome.on_bad} and "
            f"data.on_missing_caption={self.outcome.on_missing_caption}",
            "global_batch_size": batch,
            "trained": self.outcome.call.roll.trained,
        }
        if not isinstance(plan, BucketPlan):
            side = self.asked.source.image_size
            bucket = {"bucket": f"{side}x{side}", "width": side, "height": side, "records": row["trained"]}
            batches = row["trained"] / batch
            return row | {
                "batches": round(batches, 4),
                "buckets": [bucket | {"batches": round(batches, 4), "repeats": 0, "dropped": 0}],
                "empty_buckets": 0,
                "dropped": [],
                "repeated": [],
            }
        rows = plan.table()
        return row | {
            "batches": plan.steps(0),
            "buckets": [
                {"bucket": str(each.bucket), "width": each.bucket.width, "height": each.bucket.height}
                | {name: getattr(each, name) for name in ("records", "batches", "repeats", "dropped")}
                for each in rows
            ],
            "empty_buckets": len(self.asked.source.buckets()) - len(rows),
            "dropped": [self.name(index) for index in sorted(plan.dropped(0))],
            "repeated": [self.name(index) | {"reads": reads} for index, reads in sorted(plan.repeated(0))],
        }

    def scales(self) -> list[Row]:
        """How many pictures are shrunk or enlarged by how much to cover their crops: over `from`, up to `to`."""
        edges = [1 / edge for edge in reversed(ENLARGED[1:])] + list(ENLARGED)
        scale = self.scale[self.used]
        places = np.searchsorted(edges, scale, side="left")
        counts = np.bincount(places, minlength=len(edges) + 1)
        bounds = [None, *(round(edge, 4) for edge in edges), None]
        return [
            {"from": low, "to": high, "pictures": int(count)}
            for (low, high), count in zip(pairwise(bounds), counts, strict=True)
        ]


def _px(size: Any) -> str:
    return " x ".join(str(int(side)) for side in size)
