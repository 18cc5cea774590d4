"""An index is built once for what it depends on, and a home that cannot hold it costs the memory, not the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.data.index import Row, indexed, no_columns, usable

ROWS = [{"key": "a", "captions": ["x"]}, {"key": "b", "captions": []}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "difftrain"


class Counted:
    """Rows that are counted as often as they are asked for, and may end in an error."""

    def __init__(self, error: Exception | None = None):
        self.asked, self.error = 0, error

    def __call__(self) -> Iterator[Row]:
        self.asked += 1
        yield from ROWS
        if self.error:
            raise self.error


def test_rows_are_read_once_for_an_equal_identity():
    rows = Counted()
    for identity, asked in (({"of": 1}, 1), ({"of": 1}, 1), ({"of": 2}, 2), (None, 3), (None, 4)):
        assert indexed(identity, no_columns, rows).table["key"].to_pylist() == ["a", "b"]
        assert rows.asked == asked


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "a.txt"), ValueError("bad")])
def test_an_error_of_reading_the_rows_leaves_no_index_behind(cache, error):
    rows = Counted(error)
    with pytest.raises(type(error)) as raised:
        indexed({"of": 1}, no_columns, rows)
    assert raised.value is error
    assert rows.asked == 1
    assert list((cache / "indexes").iterdir()) == []


def test_a_home_that_cannot_be_written_costs_the_memory_alone(cache):
    cache.parent.mkdir()
    cache.write_text("a file, where a folder is needed")
    rows = Counted()
    for asked in (1, 2):
        assert len(indexed({"of": 1}, no_columns, rows)) == 2
        assert rows.asked == asked


def test_usable_captions_have_words_in_utf8():
    assert usable(["a", "b"]) == (["a", "b"], None)
    assert usable([]) == ([], "there is no caption")
    assert usable([" "]) == ([], "the caption is empty")
    assert usable(["a", " "]) == (["a"], "1 of its 2 captions cannot be used: the caption is empty")
    told = "2 of its 3 captions cannot be used: byte 0xe9 is not UTF-8"
    assert usable(["caf\udce9", "a", ""]) == (["a"], told)
