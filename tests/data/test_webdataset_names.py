"""Shards are read in the order they are named, and what names no shard, or a secret, is refused before any is read."""

from __future__ import annotations

import pytest
from pictures import png
from pydantic import ValidationError
from tars import open_shards, refusal, write

from trainer.data.sources.webdataset import expanded
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_shard_cache")


def test_braces_count_with_their_zeros_and_several_multiply():
    assert list(expanded("a-{008..011}.tar")) == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert list(expanded("{0..1}/{1..2}")) == ["0/1", "0/2", "1/1", "1/2"]
    assert list(expanded("plain {} {a,b}")) == ["plain {} {a,b}"]
    for wrong in ("{5..2}", "{0..99999999}", "{0..9999}{0..9999}"):
        with pytest.raises(UserError):
            expanded(wrong)


def test_shards_come_in_the_order_they_are_named_and_a_star_by_name(tmp_path):
    for name in "cab":
        write(tmp_path / f"{name}.tar", {f"{name}.png": png()})
    named = open_shards([f"{tmp_path}/c.tar", f"{tmp_path}/a.tar"])
    assert [named[i].key for i in range(2)] == ["c.png", "a.png"]
    starred = open_shards(f"{tmp_path}/*.tar")
    assert [starred[i].key for i in range(3)] == ["a.png", "b.png", "c.png"]
    with pytest.raises(UserError, match="no file is called"):
        open_shards(f"{tmp_path}/*.gone")
    with pytest.raises(UserError, match="is named twice"):
        open_shards([f"{tmp_path}/*.tar", f"{tmp_path}/a.tar"])
    with pytest.raises(UserError, match="No such file"):
        open_shards(f"{tmp_path}/gone.tar")


REFUSED = {
    "a pipe": ("pipe:cat /etc/passwd", "would run a command"),
    "a pipe in a list": (["a.tar", "pipe:curl http://x"], "would run a command"),
    "another protocol": ("ftp://host/a.tar", "is not read; a path, s3://"),
    "a chain": ("simplecache::s3://b/a.tar", "is not read"),
    "a chain behind an allowed one": ("s3://b/a::file:///etc/passwd", "is not read"),
    "gzip": ("a.tar.gz", "is compressed: unpack it"),
    "tgz": ("s3://b/a.tgz", "is compressed"),
    "zstd": ("a.tar.zst", "is compressed"),
    "a password": ("https://me:secret@host/a.tar", "user or password"),
    "a signature": ("https://host/a.tar?X-Amz-Signature=abc", "signed"),
    "nothing": ([], "no shard is named"),
    "an empty name": ("", "no shard is named"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_shard_is_refused_before_anything_is_opened(case):
    shards, reason = REFUSED[case]
    with pytest.raises(ValidationError, match=reason):
        open_shards(shards)


def test_a_star_in_a_url_is_refused():
    with pytest.raises(UserError, match="count them with braces"):
        open_shards("s3://bucket/*.tar")


@pytest.mark.parametrize(
    "name", ["key", "secret", "aws_secret_access_key", "token", "session_token", "Password", "sas_token", "account_key"]
)
def test_secrets_in_storage_options_are_refused_with_where_they_belong(name):
    with pytest.raises(ValidationError, match="AWS_SECRET_ACCESS_KEY in the environment") as error:
        open_shards("s3://b/a.tar", storage_options={name: "hunter2"})
    assert "looks like a secret" in str(error.value)
    with pytest.raises(ValidationError, match="user or password"):
        open_shards("s3://b/a.tar", storage_options={"endpoint_url": "http://me:hunter2@host"})


def test_options_that_would_do_nothing_are_refused(tmp_path):
    path = write(tmp_path / "a.tar", {"a.png": png()})
    assert "no shard is remote" in refusal(path, storage_options={"anon": True})
    assert "no shard is remote" in refusal(path, shard_cache_bytes=10)
    with pytest.raises(ValidationError, match="shard_cache_dir needs"):
        open_shards(path, shard_cache_dir="/tmp/x")


def test_a_missing_library_is_refused_with_what_installs_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs:// needs gcsfs(.|\n)*pip install \"difftrain\[cloud\]\""):
        open_shards("gs://bucket/a.tar")
