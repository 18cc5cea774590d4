"""Each picture is looked at once: what was seen is remembered while its file stays as it is, and never wrongly."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sqlite3
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from pictures import LONG_AGO
from PIL import Image

from trainer.data import looks
from trainer.data.image_file import MAX_PIXELS
from trainer.data.looks import NOTHING, LookMemory, look_at_files
from trainer.data.record import Look, silent

pytestmark = pytest.mark.usefixtures("memory")


def put(path: Path, content: bytes, mtime_ns: int = LONG_AGO) -> None:
    """A picture of these gray pixels in one row, in a file whose size depends on how many they are."""
    with path.open("wb") as file:
        Image.frombytes("L", (len(content), 1), content).save(file, "BMP")
    os.utime(path, ns=(mtime_ns, mtime_ns))


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


def test_a_file_that_may_still_change_within_its_mtime_is_not_remembered(tmp_path: Path, monkeypatch):
    assert looks.RACY_NS >= 2 * 10**9, "the coarsest time of change, of FAT, is 2 s"
    monkeypatch.setattr(looks, "RACY_NS", 3600 * 10**9)  # however slow this machine is
    path = tmp_path / "a.png"
    now = time.time_ns()
    put(path, b"before", now)
    first = hashes([path])
    put(path, b"behind", now)
    assert hashes([path]) != first


def test_hashes_come_in_the_order_of_the_files_whoever_is_ready_first(tmp_path: Path):
    paths = [tmp_path / f"{i}.png" for i in range(1200)]  # more than are looked at ahead
    for i, path in enumerate(paths):
        put(path, b"%d" % i * (100_000 if i % 200 == 0 else 1))
    first = hashes(paths)
    assert len(set(first)) == 1200
    assert hashes(paths[::-1]) == first[::-1]
    assert hashes(paths, fresh=True) == first


def test_a_picture_that_cannot_be_read_is_never_remembered(tmp_path: Path, memory: Path):
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
    paths = [tmp_path / f"{i}.png" for i in range(16)]
    for i, path in enumerate(paths):
        put(path, b"%d" % i)
    right = hashes(paths)
    whole = memory.read_bytes()
    for trial in range(200):
        damaged = bytearray(whole)
        damaged[trial * len(whole) // 200] ^= 1 << trial % 8
        memory.write_bytes(damaged)
        assert hashes(paths) == right, trial
        if trial % 4 == 0:
            memory.write_bytes(whole[: trial * len(whole) // 200])
            assert hashes(paths) == right, trial


@pytest.mark.parametrize("damage", ["no database", "a folder", "a file in the way", "another table", "no home"])
def test_a_memory_that_cannot_be_used_costs_only_a_note(
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


def look_three_times(paths: list[Path], start: Barrier, answers: Connection) -> None:
    heard: list[str] = []
    start.wait(60)
    answers.send(([hashes(paths, fresh=True, heard=heard) for _ in range(3)], heard))


def test_several_processes_hash_and_remember_at_once(tmp_path: Path, memory: Path):
    paths = [tmp_path / f"{i}.png" for i in range(200)]
    for i, path in enumerate(paths):
        put(path, b"%d" % i)
    context = multiprocessing.get_context("fork")
    start, pipes = context.Barrier(4), [context.Pipe(duplex=False) for _ in range(4)]
    for _, answers in pipes:
        context.Process(target=look_three_times, args=(paths, start, answers), daemon=True).start()
        answers.close()
    right = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert [here.recv() for here, _ in pipes] == [([right] * 3, [])] * 4
    remembered = LookMemory(str(memory), silent)
    assert len(remembered.known([str(path) for path in paths])) == 200
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
