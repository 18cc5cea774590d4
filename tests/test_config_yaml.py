"""What a config file may hold: YAML as people mean it, and what is refused as no config at all."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from config_cases import COMPLETE, Write, changed, refusal

from trainer.config_file import load_config
from trainer.errors import UserError

# YAML as people mean it


def test_a_number_without_a_dot_may_have_an_exponent(write_config: Write):
    for written in ("1e-3", "1E-3", "1.e-3", ".001", "+1e-3"):
        assert load_config(write_config(changed(("peak: 1e-4", f"peak: {written}")))).config.lr.peak == 1e-3


@pytest.mark.parametrize(
    "text", ["no", "off", "on", "y", "yes", "12:30", "2020-01-01", "café", "a b", "'1e-4'", "'007'"]
)
def test_text_stays_the_text_that_it_is(text: str, write_config: Write):
    config = load_config(write_config(changed(("data_root: pictures", f"data_root: {text}")))).config
    assert config.data.model_dump()["data_root"] == text.strip("'")


@pytest.mark.parametrize("text", ["007", "1e-4", "1_000", "0x10", "1.50"])
def test_text_that_looks_like_a_number_is_taken_as_written_or_refused(text: str, write_config: Write):
    """A commit of digits or a folder named `1e-4` must not silently become another one."""
    path = write_config(changed(("data_root: pictures", f"data_root: {text}")))
    try:
        config = load_config(path).config
    except UserError:
        return
    assert config.data.model_dump()["data_root"] == text


def test_a_key_given_twice_is_refused_with_both_lines(write_config: Write):
    path = write_config(COMPLETE + "train:\n  max_steps: 3\n  seed: 1\n")
    message = refusal(path)
    assert "`train` stands here a second time" in message
    assert f"{path}:8" in message
    assert "the first is on line 3" in message
    path = write_config("train:\n  seed: 1\n  max_steps: 3\n  seed: 2\n")
    message = refusal(path)
    assert "`train.seed` stands here a second time" in message
    assert f"{path}:4" in message
    assert "the first is on line 2" in message


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path):
    plain, windows = tmp_path / "a" / "c.yaml", tmp_path / "b" / "c.yaml"
    for path, content in (
        (plain, COMPLETE.encode()),
        (windows, b"\xef\xbb\xbf" + COMPLETE.replace("\n", "\r\n").encode()),
    ):
        path.parent.mkdir()
        path.write_bytes(content)
    assert load_config(windows).config == load_config(plain).config
    windows.write_bytes(b"\xef\xbb\xbf" + changed(("seed: 7", "sed: 7")).replace("\n", "\r\n").encode())
    assert f"{windows}:3 train.sed: unknown key; did you mean `seed`?" in refusal(windows)


def test_an_alias_repeats_a_value(write_config: Write):
    text = changed(("seed: 7", "seed: &n 7"), ("keep_last: 3", "keep_last: *n"))
    assert load_config(write_config(text)).config.checkpoint.keep_last == 7


# Files that are no config


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n", "- model\n- data\n", "model\n", "7\n"])
def test_a_file_that_is_no_mapping_is_refused(text: str, write_config: Write):
    path = write_config(text)
    message = refusal(path)
    assert message.startswith("a config is a mapping of sections")
    assert str(path) in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (COMPLETE.encode("utf-16"), "not UTF-8"),
        (b"model: {kind: t\xefny}\n", "not UTF-8"),
        (b"\0\0\0\0", "not valid YAML"),
        (b"a: [1,\n", "not valid YAML"),
        (b"a:\n\tb: 1\n", "not valid YAML"),
        (b"a: *b\n", "undefined alias"),
        (b"a: 1\n---\nb: 2\n", "another document"),
        (b"a: !!python/object/apply:os.getcwd []\n", "config"),
        (b"a: 1\nb: !mine x\n", "tag !mine is not allowed"),
        (b"? [a]\n: 1\n", "a key must be plain text"),
    ],
)
def test_a_file_that_is_no_yaml_of_ours_is_refused(content: bytes, complaint: str, tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    message = refusal(path)
    assert complaint in message
    assert str(path) in message


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(BOMB, id="a billion by aliases"),
        pytest.param("a: &a [*a]\n", id="a list in itself"),
        pytest.param("a: &a {b: *a}\n", id="a mapping in itself"),
        pytest.param("model: " + "[" * 3000, id="lists that never close"),
        pytest.param("model: " + "{a: " * 3000 + "1" + "}" * 3000, id="3000 levels"),
        pytest.param("- " * 3000 + "x", id="3000 levels in block style"),
        pytest.param("a: [" + "x," * 100_000 + "]", id="100,000 items"),
    ],
)
def test_a_file_that_would_grow_or_nest_without_end_is_refused_quickly(text: str, write_config: Write):
    path = write_config(text)
    started = time.process_time()
    message = refusal(path)
    assert time.process_time() - started < 5
    assert str(path) in message
    assert len(message) < 1000


def test_a_file_of_more_than_a_megabyte_is_refused_unread(write_config: Write):
    assert "1000001 bytes are too many" in refusal(write_config("#" * 1_000_001))


def test_a_config_that_is_not_there_is_refused_with_the_nearest_name(tmp_path: Path, write_config: Write):
    path = write_config(COMPLETE, name="cats.yaml")
    message = refusal(tmp_path / "cat.yaml")
    assert "No such file" in message
    assert f"did you mean {path}?" in message
    assert "Is a directory" in refusal(tmp_path)
