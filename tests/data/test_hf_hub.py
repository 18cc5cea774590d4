"""Of a data set on the hub one split of one commit is downloaded once, and errors of the hub are one line each."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hf_sets import open_set, parquet, refusal
from pictures import png

pytestmark = pytest.mark.usefixtures("fresh_hf_cache")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as downloads of a data set ask for."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    card: dict[str, Any] = {}
    status: dict[str, tuple[int, str]] = {}  # of repositories, with X-Error-Code

    def log_message(self, format: str, *_: Any) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        for name, (status, code) in self.status.items():
            if f"/{name}/" in f"{path}/":
                return self.answer(b"{}", status, X_Error_Code=code)
        if path.startswith("/api/datasets/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in self.files.items()
            ]
            return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
        if path.startswith("/api/datasets/"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "me/set", "sha": COMMIT, "siblings": siblings, "cardData": self.card, "private": False}
            return self.answer(json.dumps(info | {"downloads": 0, "likes": 0, "tags": []}).encode())
        data = self.files.get(path.partition(f"/resolve/{COMMIT}/")[2])
        if data is None:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        return self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    import huggingface_hub
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    Hub.files, Hub.card, Hub.status = {}, {}, {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    huggingface_hub.close_session()
    yield Hub
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def table(folder: Path, count: int) -> bytes:
    return parquet(folder / "made.parquet", [png()] * count, kind=pa.binary()).read_bytes()


def test_of_a_data_set_on_the_hub_only_the_split_is_downloaded(hub, tmp_path, capfd):
    for number, name in enumerate(("train-00000-of-00001", "test-00000-of-00001"), 1):
        hub.files[f"data/{name}.parquet"] = table(tmp_path, number)
    records = open_set("me/set", split="test")
    assert len(records) == 2
    assert records.provenance() == {"revision": COMMIT}
    downloaded = {path.name for path in (tmp_path / "hub").rglob("*.parquet")}
    assert downloaded == {"test-00000-of-00001.parquet"}
    assert capfd.readouterr() == ("", "")


def test_what_was_downloaded_is_read_without_the_hub(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub.files["data/train-0.parquet"] = table(tmp_path, 2)
    first = open_set("me/set", revision=COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = open_set("me/set", revision=COMMIT)
    assert again.fingerprint() == first.fingerprint()
    assert again.provenance() == {"revision": COMMIT}
    told = refusal("me/other")
    assert "no path of this name exists, it is not downloaded, and the hub cannot be reached" in told


def test_configurations_of_the_readme_or_of_folders_are_chosen(hub, tmp_path):
    for number, name in enumerate(("en/train-0.parquet", "fr/train-0.parquet", "fr/held.parquet"), 1):
        hub.files[name] = table(tmp_path, number)
    told = refusal("me/set")
    assert "it has several configurations; there are en, fr" in told
    assert "set data.config_name" in told
    assert "there is no configuration 'de'; there are en, fr" in refusal("me/set", config_name="de")
    assert len(open_set("me/set", config_name="fr")) == 2
    hub.card = {
        "configs": [
            {"config_name": "english", "data_files": "en/*.parquet", "default": True},
            {"config_name": "french", "data_files": [{"split": "train", "path": ["fr/train-*", "nothing"]}, HELD]},
            {"config_name": "evil", "data_files": [{"split": "train", "path": "/etc/*"}]},
        ]
    }
    assert len(open_set("me/set")) == 1
    assert len(open_set("me/set", config_name="french", split="odd")) == 3
    assert "there is no split 'test'; there is train, odd" in refusal("me/set", config_name="french", split="test")
    assert "no parquet file is called /etc/*" in refusal("me/set", config_name="evil")


HELD = {"split": "odd", "path": "**/held.parquet"}


def test_a_repository_cannot_name_files_outside_of_itself(hub, tmp_path):
    data = table(tmp_path, 1)
    for name in ("../../../up.parquet", "/abs.parquet", "a/../../b.parquet"):
        hub.files = {name: data}
        assert "it has no parquet file" in refusal("me/set")


def test_a_refused_data_set_without_parquet_says_where_a_copy_may_be(hub):
    hub.files["pictures.zip"] = hub.files["script.py"] = b"import os"
    assert "data.revision=refs/convert/parquet is a copy" in refusal("me/set")


HUB_ERRORS = {
    "not there": (404, "RepoNotFound", "the hub has no such data set"),
    "gated": (403, "GatedRepo", "its owner has not let you in"),
    "no such revision": (404, "RevisionNotFound", "there is no revision 'v9'"),
    "down": (500, "", "no path of this name exists, and the hub cannot be reached"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_errors_of_the_hub_are_one_line_each(hub, case):
    status, code, reason = HUB_ERRORS[case]
    hub.status = {"me/gone": (status, code)}
    told = refusal("me/gone", revision="v9")
    assert reason in told
    assert "in hub data set me/gone" in told
    assert len(told.splitlines()) == 3


@pytest.mark.integration
def test_a_small_public_data_set_is_read_from_the_hub(tmp_path):
    records = open_set("hf-internal-testing/fixtures_image_utils", revision="refs/convert/parquet", split="test")
    assert records.image(0).mode == "RGB"
