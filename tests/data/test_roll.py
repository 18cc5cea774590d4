"""What becomes of each record is settled at the start: by its key, its picture and its captions, and told."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
from PIL.Image import Image

from trainer.data.plan import BatchPlan, BucketPlan
from trainer.data.record import Look, Record, Records, Source
from trainer.data.roll import LeftOut, Roll, RollCall, call_roll
from trainer.errors import UserError


class Named(Records):
    """Records that are nothing but keys and captions."""

    def __init__(self, keys: list[str], captions: dict[int, tuple[str, ...]] | None = None):
        self.keys, self.captions = keys, captions or {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Record:
        return Record(self.keys[index], self.captions.get(index, ("words",)))

    def image(self, index: int) -> Image:
        raise NotImplementedError

    def looks(self, *_: object, **__: object) -> Iterator[Look]:
        raise NotImplementedError


def named(n: int, captions: dict[int, tuple[str, ...]] | None = None) -> Named:
    return Named([f"{i}.png" for i in range(n)], captions)


def source(**fields: object) -> Source:
    return Source.parse({"kind": "shapes", "image_size": 64, **fields})


def call(
    records: Records, bad: list[LeftOut] | None = None, sizes: np.ndarray | None = None, **fields: object
) -> RollCall:
    return call_roll(source(**fields), records, sizes, bad or [])


def bad(*indices: int) -> list[LeftOut]:
    return [LeftOut(index, f"folder/{index}.png: picture is damaged") for index in indices]


# Held out


def test_held_out_and_trained_records_are_all_of_them():
    roll = call(named(5000), validation_fraction=0.1).roll
    assert sorted([*roll.training, *roll.held_out]) == list(range(5000))
    assert 400 < len(roll.held_out) < 600
    assert roll.trained == len(roll.training)
    assert type(roll.training[0]) is int


def test_what_is_held_out_depends_on_the_key_alone():
    records = named(400)
    keys = {records[i].key for i in call(records, validation_fraction=0.25).roll.held_out}
    fewer = Named([f"{i}.png" for i in reversed(range(0, 400, 3))])
    assert {fewer[i].key for i in call(fewer, validation_fraction=0.25).roll.held_out} == keys & set(fewer.keys)


def test_what_is_held_out_is_the_same_in_every_version():
    # A change here moves records of every user between training and validation.
    assert list(call(named(60), validation_fraction=0.2).roll.held_out) == [7, 8, 9, 16, 27, 36, 47]


def test_a_larger_fraction_keeps_what_a_smaller_one_held_out():
    few, many = (call(named(500), validation_fraction=fraction).roll for fraction in (0.1, 0.3))
    assert set(few.held_out) < set(many.held_out)


def test_a_roll_takes_at_most_one_byte_a_record():
    roll = call(named(100_000), validation_fraction=0.5).roll
    assert len(pickle.dumps(roll)) < 1.2 * 100_000
    plain = call(named(100_000)).roll
    assert plain.training == range(100_000)
    assert plain.held_out == range(0)
    assert len(pickle.dumps(plain)) < 1000


def test_holding_out_every_record_is_refused():
    with pytest.raises(UserError, match=r"of 3 records 3 held out: none is left .*\n  in data.validation_fraction"):
        call(named(3), validation_fraction=1 - 1e-12)


# Left out


def test_pictures_that_cannot_be_read_are_refused_by_default():
    with pytest.raises(UserError) as error:
        call(named(100), bad(3, 7, 99))
    told = str(error.value)
    assert told.startswith("of 100 records 3 pictures cannot be read: ")
    assert [f"\n  folder/{index}.png: picture is damaged" in told for index in (3, 7, 99)] == [True] * 3
    assert "data.on_bad=skip" in told


def test_records_without_captions_are_refused_by_default():
    with pytest.raises(UserError) as error:
        call(named(100, {5: ("",), 6: ("full", " ")}), bad(3))
    told = str(error.value)
    assert told.startswith("of 100 records 1 pictures cannot be read and 2 have no caption: ")
    assert "'5.png': the caption is empty" in told
    assert "'6.png': the caption is empty" in told
    assert "data.on_missing_caption=empty or =skip" in told


def test_only_what_is_skipped_is_left_out_of_the_plan():
    records = named(100, {5: ("",)})
    roll, left_out, without_caption = call(records, bad(3, 7), on_bad="skip", on_missing_caption="skip")
    assert [record for record, _ in left_out] == [3, 5, 7]
    assert without_caption == 0
    assert set(roll.training) == set(range(100)) - {3, 5, 7}
    plan = roll.plan(source(), 4, 0)
    assert isinstance(plan, BatchPlan)
    assert sorted(plan.record(slot) for slot in range(97)) == sorted(set(range(100)) - {3, 5, 7})


def test_a_record_that_is_bad_in_two_ways_is_counted_once():
    records = named(100, {3: ("",), 5: ("",)})
    skipped = call(records, bad(3), on_bad="skip", on_missing_caption="skip")
    assert [record for record, _ in skipped.left_out] == [3, 5]
    assert skipped.roll.unreadable == 1
    emptied = call(records, bad(3), on_bad="skip", on_missing_caption="empty")
    assert (len(emptied.left_out), emptied.without_caption) == (1, 1)


def test_the_policy_empty_keeps_records_without_a_caption():
    call_of = call(named(10, {5: ("",), 6: ("",)}), on_missing_caption="empty")
    assert (call_of.roll.trained, call_of.left_out, call_of.without_caption) == (10, [], 2)


def test_too_many_bad_pictures_are_refused_with_their_list():
    assert len(call(named(100), bad(*range(10)), on_bad="skip").left_out) == 10
    with pytest.raises(UserError, match=r"11 of 100 pictures cannot be read, more than data.max_bad_fraction = 0.1"):
        call(named(100), bad(*range(11)), on_bad="skip")
    assert len(call(named(100), bad(*range(11)), on_bad="skip", max_bad_fraction=0.11).left_out) == 11


def test_a_long_list_ends_with_a_count():
    with pytest.raises(UserError, match=r"and 500 more; `difftrain audit` lists them all"):
        call(named(2000), bad(*range(1500)))


def test_leaving_out_every_record_is_refused():
    with pytest.raises(UserError, match="of 2 records 2 left out: none is left to train on"):
        call(named(2), bad(0, 1), on_bad="skip", max_bad_fraction=1.0)


# Buckets


def test_each_record_is_in_the_bucket_of_its_shape_or_out_of_scale():
    sizes = np.array([[128, 128], [256, 128], [0, 0], [16, 16]], np.uint32)
    records, wanted = (
        named(4),
        {"bucket_step_px": 32, "bucket_max_upscale": 2.0, "on_bad": "skip", "max_bad_fraction": 1.0},
    )
    roll, left_out, _ = call(records, bad(2), sizes, **wanted)
    plan = roll.plan(source(**wanted), 1, 0)
    assert isinstance(plan, BucketPlan)
    assert {plan.record(slot): plan.bucket(slot) for slot in range(2)} == {0: (64, 64), 1: (96, 32)}
    assert [record for record, _ in left_out] == [2, 3]
    assert left_out[1].reason == "3.png: 16 x 16 pixels is beyond the scale limits of every bucket"


def test_a_roll_without_codes_is_of_all_records():
    assert Roll(7).training == range(7)
    assert Roll(7).trained == 7
