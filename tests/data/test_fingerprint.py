"""The fingerprint changes with one pixel and one caption, names what changed, and is quick the second time."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from PIL import Image

from trainer.config_file import load_config
from trainer.data.fingerprint import FAN_OUT, Digests, Leaf, changed_records, counted, leaves, merkle_root, named
from trainer.data.image_file import MAX_PIXELS
from trainer.data.looks import NOTHING, LookMemory, default_place, look_at_files
from trainer.data.record import Look, silent
from trainer.data.sources import shapes
from trainer.data.sources.imagefolder import ImageFolder, ImageFolderRecords
from trainer.data.sources.shapes import Combination, ShapeRecords
from trainer.preflight import preflight, surveyed

if TYPE_CHECKING:
    from trainer.runtime import Runtime

ROOT = Path(__file__).parents[2]
LONG_AGO = 1_600_000_000 * 10**9  # an mtime, in nanoseconds


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hashes are remembered in this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = default_place()
    assert place is not None
    return Path(place)


def put(path: Path, content: bytes, mtime_ns: int = LONG_AGO) -> None:
    """A picture of these gray pixels in one row, in a file whose size depends on how many they are."""
    with path.open("wb") as file:
        Image.frombytes("L", (len(content), 1), content).save(file, "BMP")
    os.utime(path, ns=(mtime_ns, mtime_ns))


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


def test_one_pixel_changes_the_fingerprint_and_is_named(folder: Path):
    before, root = listed(opened(folder)), opened(folder).fingerprint()
    size = (folder / "b.bmp").stat().st_size
    paint_one_pixel(folder / "b.bmp")
    assert (folder / "b.bmp").stat().st_size == size
    assert opened(folder).fingerprint() != root
    assert changed_records(before, listed(opened(folder))) == {"b.bmp": "picture changed"}


def test_one_character_of_one_caption_changes_the_fingerprint_and_is_named(folder: Path):
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


def test_captions_that_read_the_same_when_joined_are_told_apart(folder: Path):
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


# What is remembered


def hashes(paths: list[Path], fresh: bool = False, heard: list[str] | None = None) -> list[str]:
    said: list[str] = [] if heard is None else heard
    return [look.content for look in look_at_files(map(str, paths), len(paths), MAX_PIXELS, fresh, said.append)]


def test_what_was_hashed_once_is_not_read_again_unless_asked_to(tmp_path: Path):
    path = tmp_path / "a.png"
    put(path, b"before")
    first = hashes([path])
    put(path, b"behind")  # the same size and mtime: only reading it would tell
    assert hashes([path]) == first
    read = hashes([path], fresh=True)
    assert read != first
    assert hashes([path]) == read, "what was read last is what is remembered"


@pytest.mark.parametrize(("content", "mtime_ns"), [(b"much longer", LONG_AGO), (b"other", LONG_AGO + 1)])
def test_another_size_or_mtime_makes_it_be_read_again(tmp_path: Path, content: bytes, mtime_ns: int):
    path = tmp_path / "a.png"
    put(path, b"first")
    first = hashes([path])
    put(path, content, mtime_ns)
    assert hashes([path]) != first


def test_a_file_that_may_still_change_within_its_mtime_is_not_remembered(tmp_path: Path):
    path = tmp_path / "a.png"
    now = time.time_ns()
    put(path, b"before", now)
    first = hashes([path])
    put(path, b"behind", now)
    assert hashes([path]) != first


def test_hashes_come_in_the_order_of_the_files_whoever_is_ready_first(tmp_path: Path):
    paths = [tmp_path / f"{i}.png" for i in range(3000)]
    for i, path in enumerate(paths):
        put(path, b"%d" % i * (100_000 if i % 500 == 0 else 1))
    first = hashes(paths)
    assert len(set(first)) == 3000
    assert hashes(paths[::-1]) == first[::-1]
    assert hashes(paths, fresh=True) == first


def test_a_picture_that_cannot_be_read_is_told_by_its_look_and_never_remembered(tmp_path: Path, memory: Path):
    paths = [tmp_path / f"{i}.png" for i in range(40)]
    for path in paths:
        put(path, b"x")
    paths[39].unlink()
    paths[3].write_bytes(b"<html>")
    os.utime(paths[3], ns=(LONG_AGO, LONG_AGO))
    for _ in range(2):
        looks = list(look_at_files(map(str, paths), len(paths), MAX_PIXELS, False, silent))
        assert looks[39] == Look(NOTHING, 0, 0, "picture cannot be read: No such file or directory")
        assert "HTML" in str(looks[3].fault)
        assert looks[3].content == hashlib.sha256(b"<html>").hexdigest()
        assert [look.fault for look in looks].count(None) == 38
    with sqlite3.connect(memory) as database:
        assert database.execute("SELECT count(*) FROM looks").fetchone() == (38,)


def test_a_look_knows_the_size_of_the_picture_when_it_stands_upright(tmp_path: Path):
    tall, turned = tmp_path / "a.jpg", tmp_path / "b.jpg"
    Image.new("RGB", (8, 24)).save(tall)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (8, 24)).save(turned, exif=exif)
    for path in (tall, turned):
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    for _ in range(2):  # read, then remembered
        looks = list(look_at_files([str(tall), str(turned)], 2, MAX_PIXELS, False, silent))
        assert [(look.width, look.height) for look in looks] == [(8, 24), (24, 8)]


def test_a_remembered_picture_is_held_to_the_pixel_limit_of_the_moment(tmp_path: Path):
    path = tmp_path / "a.png"
    put(path, b"x" * 100)
    assert next(look_at_files([str(path)], 1, 100, False, silent)).fault is None
    over = next(look_at_files([str(path)], 1, 99, False, silent))
    assert over.fault == "picture of 100 x 1 = 100 pixels is over the limit of 99"


def test_names_that_are_not_utf_8_are_remembered_too(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe'?%\n.png"))
    put(path, b"before")
    first = hashes([path])
    put(path, b"behind")
    assert hashes([path]) == first


def test_a_memory_with_a_flipped_bit_or_cut_short_gives_no_wrong_hash(tmp_path: Path, memory: Path):
    paths = [tmp_path / f"{i}.png" for i in range(30)]
    for i, path in enumerate(paths):
        put(path, b"%d" % i)
    right = hashes(paths)
    whole = memory.read_bytes()
    for trial in range(200):
        damaged = bytearray(whole)
        damaged[trial * len(whole) // 200] ^= 1 << trial % 8
        memory.write_bytes(damaged)
        assert hashes(paths) == right, trial
        memory.write_bytes(whole[: trial * len(whole) // 200])
        assert hashes(paths) == right, trial


@pytest.mark.parametrize("damage", ["no database", "a folder", "a file in the way", "another table", "no home"])
def test_a_memory_that_cannot_be_used_costs_a_note_and_nothing_else(
    tmp_path: Path, memory: Path, damage: str, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.png"
    put(path, b"x")
    right = hashes([path])
    if damage == "no database":
        memory.write_bytes(b"this is no database" * 100)
    elif damage == "a folder":
        memory.unlink()
        memory.mkdir()
    elif damage == "a file in the way":
        monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    elif damage == "another table":
        memory.unlink()
        with sqlite3.connect(memory) as database:
            database.execute("CREATE TABLE looks (something)")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "nowhere")
    heard: list[str] = []
    assert hashes([path], heard=heard) == right
    assert len(heard) == 1
    assert heard[0].startswith("note   looks at pictures are not remembered: ")


def test_a_memory_that_another_process_locks_costs_its_use_only(tmp_path: Path, memory: Path, monkeypatch):
    monkeypatch.setattr("trainer.data.looks.LOCKED_SECONDS", 0.05)
    path = tmp_path / "a.png"
    put(path, b"x")
    right = hashes([path])
    other = sqlite3.connect(memory, isolation_level=None)
    try:
        other.execute("BEGIN EXCLUSIVE")
        heard: list[str] = []
        assert hashes([path], heard=heard) == right
        assert "locked" in heard[0]
    finally:
        other.close()


def test_several_processes_hash_and_remember_at_once(tmp_path: Path, memory: Path):
    for i in range(400):
        put(tmp_path / f"{i}.png", b"%d" % i)
    code = """
import sys
from pathlib import Path
from trainer.data.looks import look_at_files
heard = []
paths = [f"{sys.argv[1]}/{i}.png" for i in range(400)]
for _ in range(5):
    print(*(look.content for look in look_at_files(paths, 400, 1000, True, heard.append)))
assert not heard, heard
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=120) for process in running]
    assert not any(error for _, error in said)
    assert len({line for output, _ in said for line in output.splitlines()}) == 1
    remembered = LookMemory(str(memory), silent)
    assert len(remembered.known([str(tmp_path / f"{i}.png") for i in range(400)])) == 400
    remembered.close()


def test_what_takes_long_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.data.looks.ANNOUNCED_AFTER_SECONDS", 0)
    monkeypatch.setattr("trainer.data.looks.SAID_EVERY_SECONDS", 3600)
    paths = [tmp_path / f"{i}.png" for i in range(100)]
    for path in paths:
        put(path, b"x")
    heard: list[str] = []
    hashes(paths, heard=heard)
    assert heard[0] == "data   looking at 100 pictures; the next start reads only those that changed"
    assert heard[1].startswith("data   16 of 100 pictures read in ")
    assert heard[2].startswith("data   100 pictures read in ")
    assert len(heard) == 3


# The built-in pictures


def test_equal_shapes_have_equal_fingerprints_and_contents():
    one, other = ShapeRecords(20, 64, 0.1, 3), ShapeRecords(20, 128, 0.1, 3)
    assert one.fingerprint() == other.fingerprint()
    assert listed(one) == listed(other)
    fractions = [fraction / 1000 for fraction in range(30)]
    few = [ShapeRecords(4, 64, fraction) for fraction in fractions]  # some hold the same four records
    for a, b in itertools.combinations(few, 2):
        assert (a.fingerprint() == b.fingerprint()) == (listed(a) == listed(b))


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
