"""A shard is indexed once and read by range, on disk and over HTTP, and told where it changed or fails since."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pictures import png
from tars import old, open_shards, write

from trainer.data.shards import SourceError
from trainer.data.sources import webdataset
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_shard_cache")


# The index


def test_a_shard_is_read_again_only_when_it_changed(tmp_path, monkeypatch):
    paths = [old(write(tmp_path / f"{n}.tar", {f"{n}.png": png()})) for n in "ab"]
    read: list[str] = []
    real = webdataset.members

    def counted(file: Any, where: str) -> Any:
        read.append(where)
        return real(file, where)

    monkeypatch.setattr(webdataset, "members", counted)
    names = [str(path) for path in paths]
    first = open_shards(names)
    assert open_shards(names).fingerprint() == first.fingerprint()
    assert read == names
    open_shards(names[::-1])
    assert read == names
    old(write(paths[1], {"b.png": png(), "c.png": png()}), 1_600_000_001)
    assert len(open_shards(names)) == 3
    assert read == [*names, names[1]]
    open_shards(names, caption_column="other")
    assert len(read) == 5


def test_a_picture_that_changed_since_the_index_is_refused(tmp_path):
    red, blue = png("red", form="BMP"), png("blue", form="BMP")
    path = old(write(tmp_path / "a.tar", {"a.bmp": red, "b.bmp": red}))
    records = open_shards(path)
    old(write(path, {"a.bmp": blue, "b.bmp": red}))
    with pytest.raises(SourceError, match=rf"changed since it was indexed: its bytes (.|\n)*in {path}"):
        records.image(0)
    assert records.image(1).size == (4, 4)
    assert next(records.looks(fresh=True)).content == hashlib.sha256(blue).hexdigest()
    path.write_bytes(b"")
    with pytest.raises(UserError, match="bytes and has 0"):
        records.image(0)
    with pytest.raises(SourceError, match="bytes and has 0"):  # and is no picture that a fresh look leaves out
        list(records.looks(fresh=True))
    path.unlink()
    with pytest.raises(SourceError, match="No such file"):
        records.image(0)


def test_a_second_start_opens_one_index_whatever_the_number_of_shards(tmp_path, monkeypatch):
    for number in range(20):
        old(write(tmp_path / f"{number:03d}.tar", {f"{number}.png": png()}))
    asked: list[Any] = []
    real = webdataset.indexed

    def counted(identity: Any, *rest: Any) -> Any:
        asked.append(identity)
        return real(identity, *rest)

    monkeypatch.setattr(webdataset, "indexed", counted)
    first = open_shards(f"{tmp_path}/{{000..019}}.tar")
    assert len(asked) == 22  # each shard's, all records, the shards' names
    asked.clear()
    assert open_shards(f"{tmp_path}/{{000..019}}.tar").fingerprint() == first.fingerprint()
    assert len(asked) == 2


def test_the_pixel_limit_of_the_config_is_used_also_by_a_remembered_index(tmp_path):
    path = old(write(tmp_path / "a.tar", {"a.png": png(size=(5, 5))}))
    assert next(open_shards(path).looks()).fault is None
    assert "over the limit of 24" in str(next(open_shards(path, max_pixels=24).looks()).fault)
    assert next(open_shards(path, max_pixels=25).looks()).fault is None


# Over HTTP


class Server(http.server.ThreadingHTTPServer):
    """Files over HTTP; what `faults` says of the next requests is done instead of answering them."""

    daemon_threads = True
    files: dict[str, bytes]
    faults: list[str]
    ranges: bool
    asked: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(self.command)
        fault = self.server.faults.pop(0) if self.server.faults else None
        data = self.server.files.get(self.path)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if data is None or fault:
            self.send_response(404 if data is None else int(str(fault)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, status = data, 200
        if self.server.ranges and (asked := self.headers.get("Range")):
            first, last = asked.removeprefix("bytes=").split("-")
            body, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.ranges, server.asked = {}, [], True, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def serve(server: Server, tmp_path: Path) -> Callable[..., str]:
    def put(members: dict[str, bytes], name: str = "/a.tar") -> str:
        server.files[name] = write(tmp_path / "made.tar", members).read_bytes()
        return f"http://127.0.0.1:{server.server_port}{name}"

    return put


def test_a_shard_behind_http_is_read_by_range(server, serve):
    url = serve({"a.png": png("red"), "a.txt": b"x", "b.png": png("blue")})
    records = open_shards(url)
    assert [(records[i].key, records.image(i).getpixel((0, 0))) for i in range(2)] == [
        ("a.png", (255, 0, 0)),
        ("b.png", (0, 0, 255)),
    ]
    server.asked.clear()
    again = open_shards(url)
    assert server.asked == ["HEAD"]
    assert again.fingerprint() == records.fingerprint()
    url = serve({"a.png": png("green")})
    with pytest.raises(SourceError, match="changed since it was indexed"):
        records.image(0)
    server.files.clear()
    with pytest.raises(SourceError, match="the shard does not exist"):
        records.image(0)


@pytest.mark.parametrize("fault", ["drop", "500", "503", "429"])
def test_errors_of_the_network_are_tried_again_after_waits_that_double(server, serve, capfd, fault):
    records = open_shards(serve({"a.png": png()}))
    server.faults = [fault] * 4
    assert records.image(0).size == (4, 4)
    lines = capfd.readouterr().err.splitlines()
    told = [line.rpartition("; ")[2] for line in lines if "attempt" in line]
    wanted = [f"attempt {n} of 5 in {wait} s" for n, wait in ((2, 0.001), (3, 0.002), (4, 0.004), (5, 0.008))]
    assert told == (wanted[:2] if fault == "drop" else wanted)  # a dropped connection is tried twice by the client
    server.faults = ["500"] * 20
    with pytest.raises(SourceError, match="cannot be read after 5 attempts"):
        records.image(0)
    with pytest.raises(SourceError, match="cannot be read after 5 attempts"):
        list(records.looks(fresh=True))


def test_a_shard_that_changes_while_it_is_indexed_is_refused(server, serve, monkeypatch):
    url = serve({"a.png": png("red")})
    real = webdataset.members

    def changing(file: Any, where: str) -> Iterator[Any]:
        yield from real(file, where)
        serve({"a.png": png("blue")})

    monkeypatch.setattr(webdataset, "members", changing)
    with pytest.raises(UserError, match="changed since it was indexed"):
        open_shards(url)


def test_a_missing_file_is_not_asked_for_again(server, serve):
    url = serve({"a.png": png()})
    with pytest.raises(UserError, match="does not exist"):
        open_shards(url.replace("a.tar", "gone.tar"))
    assert len(server.asked) <= 2


def test_a_server_without_ranges_is_refused(server, serve):
    url = serve({"a.png": png(), "big.txt": bytes(100)})
    records = open_shards(url)
    server.ranges = False
    with pytest.raises(UserError, match="sends whole files"):
        records.image(0)
