"""Several sources are one: by repeats or by weight, exactly, under keys that stay their own."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from trainer.data.record import Source
from trainer.data.sources.mix import Mixed, MixRecords
from trainer.data.sources.shapes import ShapeRecords
from trainer.errors import UserError


def folder(root: Path, *names: str, caption: str | None = "a cat") -> dict[str, Any]:
    """Section `source` of a folder with these pictures, each of another colour."""
    root.mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (4, 4 + number), (number, 0, 0)).save(root / name)
    lines = [json.dumps({"file_name": name, "text": caption}) for name in names]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return {"kind": "imagefolder", "data_root": str(root)}


def mix(*sources: dict[str, Any], **fields: Any) -> Source:
    return Source.parse({"kind": "mix", "image_size": 32, "sources": list(sources)} | fields)


def opened(*sources: dict[str, Any]) -> MixRecords:
    records = mix(*sources).open()
    assert isinstance(records, MixRecords)
    return records


def keys(records: Any) -> list[str]:
    return [records[index].key for index in range(len(records))]


def shapes(count: int, **fields: Any) -> dict[str, Any]:
    return {"source": {"kind": "shapes", "num_images": count, "data_seed": fields.pop("seed", 0)}, **fields}


def test_a_mix_of_one_source_without_a_name_is_that_source(tmp_path):
    section = folder(tmp_path / "a", "x.png", "y.png")
    alone = Source.parse(section | {"image_size": 32}).open()
    mixed = opened({"source": section})
    assert [mixed[i] for i in range(2)] == [alone[i] for i in range(2)]
    assert list(mixed.looks()) == list(alone.looks())
    assert mixed.fingerprint() == alone.fingerprint()
    assert [mixed.where(i) for i in range(2)] == [alone.where(i) for i in range(2)]
    assert [mixed.data(i) for i in range(2)] == [alone.data(i) for i in range(2)]
    assert opened({"source": section, "weight": 0.3}).fingerprint() == alone.fingerprint()


def test_repeats_list_a_record_several_times_under_keys_that_stay_unique(tmp_path):
    a, b = folder(tmp_path / "a", "x.png", "y.png"), folder(tmp_path / "b", "x.png")
    records = opened({"source": a, "repeats": 2}, {"source": b, "name": "art", "repeats": 3})
    assert keys(records) == ["x.png", "x.png#2", "y.png", "y.png#2", "art/x.png", "art/x.png#2", "art/x.png#3"]
    assert [records.held_out_by(i) for i in range(7)] == ["x.png"] * 2 + ["y.png"] * 2 + ["art/x.png"] * 3
    assert [records.image(i).size for i in range(7)] == [(4, 4)] * 2 + [(4, 5)] * 2 + [(4, 4)] * 3
    looks = list(records.looks())
    assert [(look.width, look.height) for look in looks] == [records.image(i).size for i in range(7)]
    again = pickle.loads(pickle.dumps(records))
    assert keys(again) == keys(records)
    assert again.fingerprint() == records.fingerprint()


def test_reads_of_a_record_are_adjacent_and_counts_differ_by_one_at_most():
    for length in range(1, 14):
        for reads in range(length, 4 * length + 3):
            part = Mixed(ShapeRecords(length, 32), None, "", reads)
            places = [part.place(at) for at in range(reads)]
            assert places == [(index, copy) for index in range(length) for copy in range(len(part.copies(index)))]
            assert [at for index in range(length) for at in part.copies(index)] == list(range(reads))
            counts = Counter(index for index, _ in places).values()
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("lengths, weights", [((100, 30), (0.7, 0.3)), ((7, 1000, 33), (1, 2, 0.1)), ((5, 5), (1, 9))])
def test_a_weight_is_met_within_one_record(lengths, weights):
    each = [shapes(n, seed=seed, weight=w) for seed, (n, w) in enumerate(zip(lengths, weights, strict=True))]
    records = opened(*each)
    total, whole = len(records), sum(Fraction(str(weight)) for weight in weights)
    for part, weight in zip(records.parts, weights, strict=True):
        assert abs(part.reads - Fraction(str(weight)) / whole * total) <= 1
    read = Counter(records.held_out_by(index) for index in range(total))
    assert len(read) == sum(lengths)
    assert min(read.values()) == 1
    assert len(set(keys(records))) == total


def test_the_notes_say_what_an_epoch_holds():
    records = opened(shapes(100, weight=0.7), shapes(30, seed=1, name="few", weight=0.3))
    assert records.notes() == [
        "data   sources[0] (shapes): 100 records x 1 = 100, 69.9301% of an epoch of 143",
        "data   few: 30 records x 1 or 2 = 43, 30.0699% of an epoch of 143",
    ]
    assert records.provenance()["sources"][1] == {"name": "few", "records": 30, "reads_per_epoch": 43}


def test_shapes_of_a_mix_are_drawn_at_its_size():
    assert opened(shapes(3)).image(0).size == (32, 32)


def test_a_weight_that_would_read_a_record_a_thousand_times_is_refused():
    with pytest.raises(UserError, match=r"its 1 records would be read 5,000 times in an epoch of 10,000") as error:
        opened(shapes(1, weight=0.5), shapes(5000, seed=1, weight=0.5))
    assert error.value.where == "data.sources[0].weight"


def test_a_key_of_two_sources_is_refused_naming_both(tmp_path):
    a, b = folder(tmp_path / "a", "x.png", "y.png"), folder(tmp_path / "b", "z.png", "y.png")
    with pytest.raises(UserError, match=r"sources\[0\] \(imagefolder\) and sources\[1\] .* both have a record 'y.png'"):
        opened({"source": a}, {"source": b})
    assert len(opened({"source": a}, {"source": b, "name": "b"})) == 4
    with pytest.raises(UserError, match="both have a record"):
        opened({"source": a}, {"source": a})


@pytest.mark.parametrize("own", [True, False])
def test_a_key_that_a_repeat_would_have_is_refused(tmp_path, own):
    a = folder(tmp_path / "a", "x.png", *(["x.png#2.png"] if own else []))
    b = folder(tmp_path / "b", "other.png")
    name = "x.png#2"
    text = (tmp_path / "b" / "metadata.jsonl").read_text().replace("other.png", name)
    (tmp_path / "b" / "metadata.jsonl").write_text(text)
    (tmp_path / "b" / "other.png").rename(tmp_path / "b" / name)
    with pytest.raises(UserError, match=r"sources\[1\] .* has a record 'x.png#2', which is what sources\[0\] .* calls"):
        opened({"source": a, "repeats": 2}, {"source": b})
    assert len(opened({"source": a}, {"source": b})) == 2 + own


def test_missing_captions_are_reported_for_every_repeat(tmp_path):
    a, b = folder(tmp_path / "a", "x.png"), folder(tmp_path / "b", "y.png", "z.png", caption="")
    records = opened({"source": a, "repeats": 2}, {"source": b, "repeats": 2})
    faults = list(records.caption_faults())
    assert [index for index, _ in faults] == [2, 3, 4, 5]
    assert "'y.png'" in faults[0][1]


def test_what_makes_samples_is_set_once_for_all_sources():
    for key in Source.model_fields:
        with pytest.raises(ValidationError, match=f"{key}: set once, for all sources"):
            mix({"source": {"kind": "shapes", key: 64}})
    with pytest.raises(ValidationError, match="caption_dropout, random_flip: set once"):
        mix({"source": {"kind": "shapes", "caption_dropout": 0.1, "random_flip": True}})


BAD = {
    "no source": ([], "at least 1 item"),
    "no kind": ([{"source": {"num_images": 3}}], "`kind` is missing"),
    "an unknown kind": ([{"source": {"kind": "shape"}}], "unknown kind 'shape'"),
    "an unknown key": ([{"source": {"kind": "shapes", "num": 3}}], "Extra inputs"),
    "a wrong value": ([shapes(0)], "greater than or equal to 1"),
    "an unknown key beside it": ([shapes(1, repeat=3)], "Extra inputs"),
    "weight and repeats": ([shapes(1, weight=1, repeats=2)], "a weight and none a repeats"),
    "one weight of two": ([shapes(1, weight=1), shapes(1, seed=1)], "give every source a weight"),
    "a name twice": ([shapes(1, name="a"), shapes(2, name="a")], "the same name"),
    "no repeats": ([shapes(1, repeats=0)], "greater than or equal to 1"),
    "a weight of nothing": ([shapes(1, weight=0)], "greater than 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mix_that_makes_no_sense_is_refused_with_its_place(case):
    sources, reason = BAD[case]
    with pytest.raises(ValidationError, match=reason):
        mix(*sources)


def test_the_schema_of_a_mix_stands_in_place():
    schema = Source.parse({"kind": "mix", "image_size": 32, "sources": [shapes(3)]}).model_json_schema()
    assert "$ref" not in json.dumps(schema)
    assert set(schema["properties"]["sources"]["items"]["properties"]) == {"source", "name", "repeats", "weight"}


def test_the_error_of_a_nested_source_has_its_whole_path():
    with pytest.raises(ValidationError) as error:
        mix(shapes(3), shapes(0))
    assert error.value.errors()[0]["loc"] == ("sources", 1, "source", "num_images")


def test_a_mix_may_hold_a_mix(tmp_path):
    inner = {"kind": "mix", "sources": [{"source": folder(tmp_path / "a", "x.png"), "name": "a", "repeats": 3}]}
    records = opened({"source": inner, "name": "b"}, shapes(1))
    assert keys(records) == ["b/a/x.png", "b/a/x.png#2", "b/a/x.png#3", "shapes/0/0"]
    assert {records.held_out_by(index) for index in range(3)} == {"b/a/x.png"}
    with pytest.raises(UserError, match="which is what"):
        opened({"source": inner, "repeats": 2})
