"""Files are wholly there or not at all."""

import hashlib
import json
import os
import stat

import pytest

from trainer import files
from trainer.errors import StorageFailed
from trainer.files import (
    open_atomic,
    retrying,
    sha256_file,
    sweep_temp_files,
    temp_path,
    to_json,
    write_atomic,
    write_json,
)


def test_a_written_file_holds_the_data_and_nothing_else_is_left(tmp_path):
    write_atomic(tmp_path / "a.json", "grün\n")
    write_atomic(tmp_path / "a.json", b"\x00two")
    assert (tmp_path / "a.json").read_bytes() == b"\x00two"
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_exception_while_writing_keeps_the_old_content(tmp_path):
    path = tmp_path / "checkpoint-1.pt"
    path.write_bytes(b"old")
    for error in (RuntimeError("PytorchStreamWriter failed"), OSError(28, "no space"), KeyboardInterrupt()):
        with pytest.raises(type(error)), open_atomic(path) as file:  # noqa: PT012
            file.write(b"half of the new ")
            assert temp_path(path).exists()
            raise error
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["checkpoint-1.pt"]


def test_the_data_is_durable_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    order = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        order.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        real_fsync(descriptor)

    def replace(source, target):
        order.append("rename")
        assert os.stat(source).st_size == 3  # flushed before it
        real_replace(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    write_atomic(tmp_path / "a", b"abc")
    assert order == ["fsync file", "rename", "fsync folder"]


def test_the_hash_taken_while_writing_is_the_hash_of_the_file(tmp_path):
    with open_atomic(tmp_path / "x.bin") as file:
        for part in (b"abc", bytearray(1000), memoryview(b"xyz" * 4).cast("I")):
            file.write(part)
    content = (tmp_path / "x.bin").read_bytes()
    assert content == b"abc" + bytes(1000) + b"xyz" * 4
    assert file.size_bytes == len(content)
    assert file.sha256() == sha256_file(tmp_path / "x.bin") == hashlib.sha256(content).hexdigest()


def test_a_sweep_removes_only_what_a_killed_run_left(tmp_path):
    (tmp_path / "kept.json").write_text("{}")
    strangers = [
        "notes.tmp",
        ".notes.tmp-12",
        ".swp",
        "a.difftrain-tmp-12",
        ".a.difftrain-tmp-x",
        ".a.difftrain-tmp-1~",
    ]
    for name in strangers:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".folder.difftrain-tmp-3").mkdir()
    (tmp_path / ".link.difftrain-tmp-3").symlink_to(tmp_path / "kept.json")
    before = sorted(os.listdir(tmp_path))
    if (pid := os.fork()) == 0:  # a run that dies while it writes
        with open_atomic(tmp_path / "checkpoint-7.pt") as file:
            file.write(b"half")
            os._exit(9)
    os.waitpid(pid, 0)
    assert sweep_temp_files(tmp_path) == [f".checkpoint-7.pt.difftrain-tmp-{pid}"]
    assert sorted(os.listdir(tmp_path)) == before
    assert sweep_temp_files(tmp_path / "absent") == []


def test_the_longest_legal_file_name_can_be_written(tmp_path):
    for name in ("x" * 255, "ü" * 127, "🙂" * 63):
        write_atomic(tmp_path / name, b"1")
        assert (tmp_path / name).read_bytes() == b"1"


def test_json_keeps_its_order_and_ends_in_a_newline_and_refuses_nan(tmp_path):
    assert (
        to_json({"b": 1, "a": {"ü": [1.5]}})
        == '{\n  "b": 1,\n  "a": {\n    "ü": [\n      1.5\n    ]\n  }\n}\n'.encode()
    )
    (tmp_path / "m.json").write_text("old")
    for bad in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "m.json", {"loss": bad})
    assert (tmp_path / "m.json").read_text() == "old"


def test_a_file_name_that_is_not_utf8_survives_json(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "m.json", {"file": name})
    assert json.loads((tmp_path / "m.json").read_bytes()) == {"file": name}


def test_a_lasting_fault_of_the_disk_is_storage_failed():
    pauses, calls = [], []

    def third_time():
        calls.append(1)
        if len(calls) < 3:
            raise OSError(28, "No space left on device")
        return "done"

    assert retrying(third_time, 3, sleep=pauses.append, pause_seconds=0.2) == "done"
    assert pauses == [0.2, 0.4]
    calls.clear()
    with pytest.raises(StorageFailed, match=r"metrics.jsonl could not be written in 2 attempts: .*No space left"):
        retrying(third_time, 2, what="metrics.jsonl", sleep=pauses.append)
    with pytest.raises(ZeroDivisionError):
        retrying(lambda: 1 / 0, 5, sleep=lambda _: pytest.fail("our own bugs are not tried again"))
