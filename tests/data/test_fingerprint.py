"""The fingerprint changes with one pixel and one caption, names what changed, and is quick the second time."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from pictures import LONG_AGO
from PIL import Image

from trainer.config_file import load_config
from trainer.data.fingerprint import FAN_OUT, Digests, Leaf, changed_records, counted, leaves, merkle_root, named
from trainer.data.sources import shapes
from trainer.data.sources.imagefolder import ImageFolder, ImageFolderRecords
from trainer.data.sources.shapes import Combination, ShapeRecords
from trainer.preflight import preflight, surveyed

if TYPE_CHECKING:
    from trainer.runtime import Runtime

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("memory")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three captioned pictures, last changed long ago."""
    root = tmp_path / "data"
    root.mkdir()
    rows = []
    for number, name in enumerate(("a.bmp", "b.bmp", "c.bmp")):
        Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(root / name)
        os.utime(root / name, ns=(LONG_AGO, LONG_AGO))
        rows.append({"file_name": name, "text": [f"caption {name}", "another one"]})
    write_rows(root, rows)
    return root


def write_rows(root: Path, rows: list[dict]) -> None:
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]


def opened(root: Path) -> ImageFolderRecords:
    return ImageFolder(data_root=str(root), image_size=32).open()


def listed(records) -> list[Leaf]:
    return list(leaves(records, records.contents()))


def paint_one_pixel(path: Path) -> None:
    """Another value in one channel of one pixel: a file of the same size."""
    image = Image.open(path).convert("RGB")
    red, green, blue = image.getpixel((3, 4))  # pyright: ignore[reportGeneralTypeIssues]
    image.putpixel((3, 4), (red, green + 1, blue))
    image.save(path)


def test_one_changed_pixel_changes_the_fingerprint(folder: Path):
    before, root = listed(opened(folder)), opened(folder).fingerprint()
    size = (folder / "b.bmp").stat().st_size
    paint_one_pixel(folder / "b.bmp")
    assert (folder / "b.bmp").stat().st_size == size
    assert opened(folder).fingerprint() != root
    assert changed_records(before, listed(opened(folder))) == {"b.bmp": "picture changed"}


def test_one_changed_character_of_a_caption_changes_the_fingerprint(folder: Path):
    before, root = listed(opened(folder)), opened(folder).fingerprint()
    rows = rows_of(folder)
    rows[2]["text"][1] += "!"
    write_rows(folder, rows)
    assert opened(folder).fingerprint() != root
    assert changed_records(before, listed(opened(folder))) == {"c.bmp": "captions changed"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:2], {"c.bmp": "removed"}),
        (lambda rows: rows[::-1], {"a.bmp": "moved", "c.bmp": "moved"}),
        (lambda rows: [rows[2], *rows[:2]], {"a.bmp": "moved", "b.bmp": "moved", "c.bmp": "moved"}),
        (lambda rows: [rows[0], {**rows[1], "text": "new"}], {"b.bmp": "captions changed", "c.bmp": "removed"}),
        (lambda rows: [{"file_name": "d.bmp", "text": "d"}, *rows], {"d.bmp": "added"}),
    ],
)
def test_keys_and_their_order_count_and_are_named(folder: Path, change, said: dict[str, str]):
    (folder / "d.bmp").write_bytes((folder / "a.bmp").read_bytes())
    before, root = listed(opened(folder)), opened(folder).fingerprint()
    write_rows(folder, change(rows_of(folder)))
    assert opened(folder).fingerprint() != root
    assert changed_records(before, listed(opened(folder))) == said


def test_captions_that_read_the_same_when_joined_differ(folder: Path):
    roots = set()
    for texts in (["a", "b"], ["ab"], ["a,b"], ["b", "a"], ["a", "b", "b"], 'a", "b'):
        rows = rows_of(folder)
        rows[0]["text"] = texts
        write_rows(folder, rows)
        roots.add(opened(folder).fingerprint())
    assert len(roots) == 6


def test_what_changed_is_found_by_holding_only_what_is_displaced():
    def long(skipped: int, content: str = "00") -> Iterator[Leaf]:
        return (Leaf(f"{i}", content if i == 70_000 else "00", "") for i in range(100_000) if i != skipped)

    assert changed_records(long(5), long(90_000, "01")) == {
        "5": "added",
        "90000": "removed",
        "70000": "picture changed",
    }


def test_a_message_names_five_records_and_counts_the_rest():
    changes = {f"{i}.png": "picture changed" for i in range(6)} | {"new\n.png": "added"}
    assert counted(changes) == "6 picture changed, 1 added"
    assert named(changes).startswith("7 records: '0.png' picture changed, '1.png'")
    assert named(changes).endswith("'4.png' picture changed and 2 more")
    assert named({"new\n.png": "added"}) == r"1 record: 'new\n.png' added"


@pytest.mark.parametrize("count", [0, 1, 2, FAN_OUT - 1, FAN_OUT, FAN_OUT + 1, 2 * FAN_OUT, 3 * FAN_OUT + 7])
def test_every_leaf_and_its_place_reach_the_root(count: int):
    leaf = [Leaf(f"{i}.png", f"{i:064x}", f"{i:032x}") for i in range(count + 1)]
    roots = {merkle_root(leaf[:count]), merkle_root(leaf)}
    for index in {0, count // 2, count - 1} & set(range(count)):
        for other in ({"key": "x"}, {"content": "0" * 63 + "x"}, {"captions": "x"}):
            roots.add(merkle_root([*leaf[:index], leaf[index]._replace(**other), *leaf[index + 1 : count]]))
    if count > 1:
        roots.add(merkle_root([leaf[1], leaf[0], *leaf[2:count]]))
    assert len(roots) == 2 + 3 * len({0, count // 2, count - 1} & set(range(count))) + (count > 1)


def test_the_root_is_the_same_in_every_version():
    # A change here refuses the resume of every run: raise the formats of the fingerprint and of the checkpoint with it.
    leaf = [Leaf(f"{i}.png", f"{i:064x}", f"{i:032x}") for i in range(2000)]
    assert merkle_root(leaf) == "6331262bbcc1833af7902bcd28fa89dd5e91ad4c46b7cf316d1a90e14cdd8985"


def test_digests_are_kept_as_they_were():
    digests = [f"{i:064x}" for i in (0, 1, 2**255, 2**256 - 1)]
    assert list(Digests(digests)) == digests


# The built-in pictures


def test_equal_shapes_have_equal_fingerprints_and_contents():
    one, other = ShapeRecords(20, 64, 0.1, 3), ShapeRecords(20, 128, 0.1, 3)
    assert one.fingerprint() == other.fingerprint()
    assert listed(one) == listed(other)
    fractions = [fraction / 1000 for fraction in range(30)]
    few = [ShapeRecords(4, 64, fraction) for fraction in fractions]  # some hold the same four records
    facts = [(records.fingerprint(), listed(records)) for records in few]
    for (one_root, one_list), (other_root, other_list) in itertools.combinations(facts, 2):
        assert (one_root == other_root) == (one_list == other_list)


@pytest.mark.parametrize("what", ["DRAWING", "colour", "outline", "caption"])
def test_another_drawing_or_caption_changes_what_shapes_are(what: str, monkeypatch: pytest.MonkeyPatch):
    before, root = listed(ShapeRecords(20, 64)), ShapeRecords(20, 64).fingerprint()
    if what == "DRAWING":
        monkeypatch.setattr(shapes, "DRAWING", shapes.DRAWING + 1)
    elif what == "colour":
        monkeypatch.setitem(shapes.COLOURS, "red", (225, 0, 31))
    elif what == "outline":
        monkeypatch.setitem(shapes.OUTLINES, "ring", (shapes.OUTLINES["ring"][0],))
    else:
        monkeypatch.setattr(Combination, "caption", property(lambda self: f"one {self.size} {self.shape}"))
    assert ShapeRecords(20, 64).fingerprint() != root
    assert listed(ShapeRecords(20, 64)) != before


def test_the_fingerprint_of_ten_million_shapes_looks_at_none_of_them():
    records = ShapeRecords(10_000_000, 64)

    def never() -> Iterator[str]:
        raise AssertionError("a record was looked at")
        yield

    assert len(records.fingerprint(never())) == 64


# Who looks


def test_rank_0_alone_looks_at_the_pictures(folder: Path, memory: Path, write_config):
    config = f"""\
model: {{kind: tiny}}
data: {{kind: imagefolder, data_root: {folder}, image_size: 32}}
train: {{max_steps: 2, global_batch_size: 2, micro_batch_size: 1}}
objective: {{kind: epsilon}}
lr: {{peak: 1e-4}}
"""
    loaded = load_config(write_config(config))
    other = preflight(loaded, rank=1, world_size=2)
    assert (other.data_fingerprint, other.leaves()) == ("", None)
    assert not memory.exists()
    main = SimpleNamespace(world_size=2, from_main=lambda action: action())
    first = surveyed(preflight(loaded, rank=0, world_size=2), cast("Runtime", main))
    assert first.data_fingerprint == opened(folder).fingerprint()
    assert list(first.leaves() or ()) == listed(opened(folder))
    assert memory.exists()
