"""records.jsonl lists the records of one fingerprint, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from trainer.data.fingerprint import Leaf
from trainer.run.records import changes_since, read_records, write_records
from trainer.run.rundir import RunDir

KEYS = [
    "a.png",
    "tab\tand\nline",
    "größer 猫 \U0001f431",
    '"quoted"',
    os.fsdecode(b"not utf-8 \xff"),
    "sep\u2028 \x85",
    "",
]
LEAVES = [Leaf(key, f"{number:064x}", f"{number:032x}") for number, key in enumerate(KEYS)]


def listed(run_dir: RunDir, fingerprint: str) -> list[Leaf] | None:
    found = read_records(run_dir, fingerprint)
    return None if found is None else list(found)


def test_any_key_is_read_back_as_it_was_written(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    write_records(run_dir, "f", lambda: LEAVES)
    assert listed(run_dir, "f") == LEAVES
    lines = run_dir.records.read_bytes().split(b"\n")
    assert json.loads(lines[1]) == {"key": "a.png", "content": "0" * 64, "captions": "0" * 32}
    assert len(lines) == len(KEYS) + 2, "a header, a line a record, a last newline"
    assert os.listdir(tmp_path) == ["records.jsonl"]


def test_only_a_list_of_another_fingerprint_is_replaced(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    write_records(run_dir, "f", lambda: LEAVES)
    write_records(run_dir, "f", lambda: pytest.fail("written again"))
    write_records(run_dir, "g", lambda: LEAVES[1:])
    assert listed(run_dir, "f") is None
    assert listed(run_dir, "g") == LEAVES[1:]


def test_a_list_of_other_data_goes_away_when_there_are_too_many_to_list(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    write_records(run_dir, "f", lambda: None)
    write_records(run_dir, "f", lambda: LEAVES)
    write_records(run_dir, "g", lambda: None)
    assert os.listdir(tmp_path) == []


def test_what_changed_is_found_only_against_the_list_of_its_fingerprint(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    assert changes_since(run_dir, "f", LEAVES) is None
    write_records(run_dir, "f", lambda: LEAVES)
    assert changes_since(run_dir, "f", LEAVES[1:]) == {"a.png": "removed"}
    assert changes_since(run_dir, "g", LEAVES[1:]) is None
    assert changes_since(run_dir, None, LEAVES[1:]) is None
    assert changes_since(run_dir, "f", None) is None


@pytest.mark.parametrize("damage", [b"no json", b"{}", b"[1]", b'{"key": "a", "content": "b", "more": 1}', b"\xff"])
def test_a_damaged_list_names_nothing(tmp_path: Path, damage: bytes):
    run_dir = RunDir(tmp_path)
    write_records(run_dir, "f", lambda: LEAVES)
    lines = run_dir.records.read_bytes().split(b"\n")
    run_dir.records.write_bytes(b"\n".join([*lines[:3], damage, *lines[4:]]))
    assert changes_since(run_dir, "f", LEAVES[1:]) is None
    run_dir.records.write_bytes(damage)
    assert changes_since(run_dir, "f", LEAVES[1:]) is None
