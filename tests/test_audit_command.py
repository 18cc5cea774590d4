"""`difftrain audit` finds what is wrong with a data set, record for record and nothing else, and touches none of it."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.cli import main
from trainer.config_file import load_config
from trainer.preflight import preflight
from trainer.run.records import write_records
from trainer.run.rundir import RunDir

EACH = 6  # records with each defect: 5 % of the set or nearly
CONFIG = """\
model: {{kind: tiny}}
data: {{kind: imagefolder, data_root: {root}, image_size: 64, num_workers: 0, on_bad: skip, max_bad_fraction: 0.2,
  on_missing_caption: empty}}
train: {{seed: 7, max_steps: 2, precision: fp32, global_batch_size: 4, micro_batch_size: 4, output_dir: {root}/../run}}
objective: {{kind: epsilon}}
lr: {{kind: constant, peak: 1e-4}}
"""


class Set:
    """A folder of pictures, and what was planted in it."""

    def __init__(self, root: Path):
        self.root = root
        self.lines: list[bytes] = []
        self.planted: dict[str, set[str]] = {}
        self.rng = np.random.default_rng(0)
        root.mkdir()

    def picture(self, width: int = 160, height: int = 144) -> Image.Image:
        """One that looks like no other."""
        cells = self.rng.integers(0, 256, (9, 9, 3), np.uint8)
        return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)

    def add(self, defect: str, name: str, data: bytes | Image.Image | None, text: Any = "", **save: Any) -> bytes:
        """A record; None for its data is a file that is not there."""
        if isinstance(data, Image.Image):
            packed = io.BytesIO()
            data.save(packed, save.pop("format", "PNG"), **save)
            data = packed.getvalue()
        if data is not None:
            (self.root / name).write_bytes(data)
        if defect:
            self.planted.setdefault(defect, set()).add(name)
        words = f"a picture called {len(self.lines)}" if text == "" else text
        line = json.dumps({"file_name": name, "text": words}, ensure_ascii=False)
        self.lines.append(line.encode("utf-8", "surrogateescape"))
        return data or b""

    def write(self) -> None:
        (self.root / "metadata.jsonl").write_bytes(b"".join(line + b"\n" for line in self.lines))


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 1) * 100), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def planted_set(root: Path) -> Set:
    """Of every class EACH records; the others are as they should be."""
    made = Set(root)
    for i in range(EACH):
        whole = made.add("", f"clean{i}.jpg", made.picture(), format="JPEG", quality=95)
        bad = (b"", whole[: len(whole) // 2], b"<html><h1>404</h1></html>", b"no picture", None)[i % 5]
        made.add("unreadable", f"unreadable{i}.jpg", bad)
        made.add("over_pixel_limit", f"bomb{i}.png", bomb(20_000))
        made.add("caption_missing", f"missing{i}.png", made.picture(), None)
        made.add("caption_empty", f"empty{i}.png", made.picture(), " \t")
        made.add("caption_not_utf8", f"latin{i}.png", made.picture(), "caf\udce9")
        made.add("caption_cut", f"long{i}.png", made.picture(), f"{i:02}" + "w" * 9998)
        made.add("too_small", f"small{i}.png", made.picture(48, 52))
        made.add("extreme_aspect", f"extreme{i}.png", made.picture(64 * 5, 64 + i) if i % 2 else made.picture(64, 300))
        made.add("wrong_suffix", f"suffix{i}.png", made.picture(), format=("JPEG", "WEBP", "GIF", "BMP")[i % 4])
        exif = Image.Exif()
        exif[0x0112] = 2 + i % 7
        made.add("rotated", f"rotated{i}.jpg", made.picture(), format="JPEG", exif=exif)
        clear = made.picture().convert("RGBA")
        clear.putpixel((3, 3), (0, 0, 0, 0))
        made.add("transparent", f"alpha{i}.png", clear)
        frames = [made.picture(), made.picture()]
        kind = ("GIF", "WEBP")[i % 2]
        made.add(
            "animated", f"moving{i}.{kind.lower()}", frames[0], format=kind, save_all=True, append_images=frames[1:]
        )
        made.add("grayscale", f"gray{i}.png", made.picture().convert("L"))
        deep = Image.fromarray(np.asarray(made.picture().convert("L"), np.uint16) * 256 + 7)
        made.add("sixteen_bit", f"deep{i}.png", deep)
        made.planted["grayscale"].add(f"deep{i}.png")
        made.add("cmyk", f"print{i}.jpg", made.picture().convert("CMYK"), format="JPEG")
        clean = made.picture()
        data = made.add("", f"first{i}.png", clean)
        made.add("same_bytes", f"copy{i}.png", data)
        made.add("same_pixels", f"saved{i}.png", clean, compress_level=1)
        made.add("near", f"smaller{i}.jpg", clean.resize((96, 80), Image.Resampling.BICUBIC), format="JPEG", quality=70)
    opaque = made.picture().convert("RGBA")
    made.add("", "opaque.png", opaque)  # an alpha channel alone is no transparency
    for i, colour in enumerate(["white", "gray", "black"]):
        made.add("", f"flat{i}.png", Image.new("RGB", (80, 80), colour))  # and these do not look alike
    made.write()
    return made


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Set:
    return planted_set(tmp_path_factory.mktemp("audit") / "pictures")


def audit(tmp_path: Path, root: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=root))
    output = tmp_path / "audit.json"
    assert main(["audit", "--config", str(config), "--output", str(output), *arguments]) == code
    return json.loads(output.read_bytes())


def keys(found: dict[str, Any], name: str) -> set[str]:
    return {row["key"] for row in found["findings"][name]}


def tree(root: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.iterdir()}


@pytest.fixture(scope="module")
def found(planted: Set, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    before = tree(planted.root)
    found = audit(tmp_path_factory.mktemp("report"), planted.root, "--workers", "2")
    assert tree(planted.root) == before, "no file of the user is touched"
    return found


def test_what_is_planted_is_found_record_for_record_and_nothing_else(planted: Set, found: dict[str, Any]):
    copies = {"same_bytes", "same_pixels", "near"}
    for name in found["findings"]:
        assert keys(found, name) == planted.planted.get(name, set()), name
        assert found["counts"][name] == len(found["findings"][name]) == len(keys(found, name)), name
    for name in copies:
        groups = found["duplicates"][name]
        assert all(len(group["records"]) == 2 for group in groups), name
        assert {group["records"][0]["key"] for group in groups} == {f"first{i}.png" for i in range(EACH)}, name
        assert {group["records"][1]["key"] for group in groups} == planted.planted[name], name
    assert found["duplicates"]["too_plain_to_compare"] == 3
    assert planted.planted.keys() <= found["findings"].keys() | copies


def test_every_finding_says_where_and_why(planted: Set, found: dict[str, Any]):
    for name, rows in found["findings"].items():
        for row in rows:
            assert row["where"] == str(planted.root / row["key"]), name
            assert len(row["reason"]) > 10, (name, row)
    reasons = {row["key"]: row["reason"] for row in found["findings"]["unreadable"]}
    expected = ("file is empty", "damaged", "HTML", "it starts with the bytes", "No such file")
    assert all(expected[i % 5] in reasons[f"unreadable{i}.jpg"] for i in range(EACH))
    line = next(row["reason"] for row in found["findings"]["caption_not_utf8"] if row["key"] == "latin0.png")
    assert re.search(r"metadata\.jsonl:6: 'latin0\.png': byte 0xe9 is not UTF-8", line)
    assert found["findings"]["caption_cut"][0]["tokens"] > 5000


def test_captions_are_counted_by_the_tokenizer_of_the_run(found: dict[str, Any]):
    captions, tokens = found["captions"], found["captions"]["tokens"]
    assert captions["written"] == captions["distinct"] == found["data"]["records"] - 3 * EACH
    assert tokens["room"] == 75
    assert tokens["captions"] == sum(row["captions"] for row in tokens["histogram"]) == captions["written"]
    assert tokens["cut"] == tokens["histogram"][-1]["captions"] == EACH
    assert tokens["lost"] == sum(row["tokens"] - 75 for row in found["findings"]["caption_cut"])


def test_the_policies_say_what_a_run_would_do(found: dict[str, Any]):
    assert found["verdict"]["could_start"] is True
    assert len(found["policies"]) == 6
    records = found["data"]["records"]
    for row in found["policies"]:
        refused = row["on_bad"] == "error" or row["on_missing_caption"] == "error"
        assert row["exit_code"] == (2 if refused else 0), row
        if not refused:
            left_out = 2 * EACH + (row["on_missing_caption"] == "skip") * 3 * EACH
            assert (row["left_out"], row["trained"]) == (left_out, records - left_out)
            assert row["without_caption"] == (0 if row["on_missing_caption"] == "skip" else 3 * EACH)
    assert [row["on_missing_caption"] for row in found["policies"] if row["configured"]] == ["empty"]


@pytest.mark.parametrize("policy", ["data.on_bad=error", "data.on_missing_caption=error", "data.max_bad_fraction=0.05"])
def test_the_exit_code_is_1_where_the_policies_refuse_the_data(planted: Set, tmp_path, policy: str, capsys):
    found = audit(tmp_path, planted.root, "--workers", "0", "--set", policy, code=1)
    assert found["verdict"]["could_start"] is False
    assert "would be refused" in capsys.readouterr().out
    assert len(keys(found, "unreadable")) == EACH, "all is reported, whatever the policy"
    configured = next(row for row in found["policies"] if row["configured"])
    assert configured["exit_code"] == 2
    assert configured["exceeds_max_bad_fraction"] is (policy == "data.max_bad_fraction=0.05")
    # A run says the same.
    config = tmp_path / "config.yaml"
    assert main(["validate", "--config", str(config), "--output-dir", str(tmp_path / "run"), "--set", policy]) == 2


def test_with_a_run_each_record_that_is_not_what_it_had_is_named(tmp_path):
    made = Set(tmp_path / "pictures")
    for i in range(20):
        made.add("", f"{i}.png", made.picture(64, 64))
    made.write()
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(CONFIG.format(root=made.root))
    assert main(["validate", "--config", str(config), "--output-dir", str(run)]) == 0
    checked = preflight(load_config(config), 0, 1)
    write_records(RunDir(run), checked.data_fingerprint, checked.leaves)
    same = audit(tmp_path, made.root, "--workers", "0", "--run", str(run))
    assert same["run"] == {"path": str(run), "differs": False, "why": None, "changed": 0}
    rotten = made.root / "3.png"
    data, when = bytearray(rotten.read_bytes()), rotten.stat()
    data[len(data) // 2] ^= 4
    rotten.write_bytes(data)
    os.utime(rotten, ns=(when.st_atime_ns, when.st_mtime_ns))  # as on a disk that rots
    (made.root / "8.png").unlink()
    made.lines[5] = made.lines[5].replace(b"picture", b"photo")
    made.write()
    found = audit(tmp_path, made.root, "--workers", "0", "--run", str(run), code=1)
    assert {row["key"]: row["reason"] for row in found["findings"]["changed"]} == {
        "3.png": "picture changed",
        "5.png": "captions changed",
        "8.png": "picture changed",
    }
    assert found["verdict"]["could_start"] is True
    assert "3 records are not what the run had" in found["verdict"]["sentence"]
    (run / "records.jsonl").unlink()
    unnamed = audit(tmp_path, made.root, "--workers", "0", "--run", str(run), code=1)
    assert unnamed["run"]["differs"] is True
    assert "no list of its records" in unnamed["run"]["why"]
    assert "The data is not what the run had" in unnamed["verdict"]["sentence"]


def test_buckets_are_told_with_what_they_drop_and_read_ahead(tmp_path):
    made = Set(tmp_path / "pictures")
    for i in range(7):
        made.add("", f"square{i}.png", made.picture(80, 80))
    for i in range(5):
        made.add("", f"wide{i}.png", made.picture(120, 60))
    made.add("out_of_scale", "tiny.png", made.picture(16, 16))
    made.write()
    buckets = ["--workers", "0", "--set", "data.bucket_step_px=16", "data.bucket_max_upscale=2"]
    found = audit(tmp_path, made.root, *buckets)
    epoch = found["epoch"]
    assert keys(found, "out_of_scale") == {"tiny.png"}
    assert sum(row["records"] for row in epoch["buckets"]) == epoch["trained"] == 12
    assert epoch["batches"] == sum(row["batches"] for row in epoch["buckets"]) == 4
    assert sum(row["repeats"] for row in epoch["buckets"]) == sum(row["reads"] - 1 for row in epoch["repeated"]) == 4
    found = audit(tmp_path, made.root, *buckets, "data.bucket_remainder=drop")
    epoch = found["epoch"]
    assert epoch["batches"] == 2
    assert len(epoch["dropped"]) == sum(row["dropped"] for row in epoch["buckets"]) == 4
    assert {row["key"] for row in epoch["dropped"]} <= {
        f"{name}{i}.png" for name in ("square", "wide") for i in range(7)
    }
    assert sum(row["pictures"] for row in found["scales"]) == 12


def test_drawn_pictures_have_captions_and_looks_and_no_files(tmp_path, tiny_config: Path):
    output = tmp_path / "shapes.json"
    assert main(["audit", "--config", str(tiny_config), "--output", str(output), "--workers", "1"]) == 0
    found = json.loads(output.read_bytes())
    assert found["data"]["formats"] == {}
    assert not any(found["counts"].values())
    assert found["captions"]["written"] == 64
    assert not found["duplicates"]["same_bytes"]


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.outside: list[str] = []
        self.pictures = 0
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        assert tag not in ("script", "link", "iframe", "object")
        self.pictures += tag == "img"
        self.ids.add(values.get("id", ""))
        for name in ("src", "href"):
            if name in values and not values[name].startswith(("data:image/", "#")):
                self.outside.append(values[name])
        if values.get("href", "").startswith("#"):
            self.links.add(values["href"][1:])


def test_a_caption_cannot_write_markup_into_the_page(tmp_path):
    made = Set(tmp_path / "pictures")
    for i in range(3):
        made.add("", f"<b>{i}&.png", made.picture(30, 30), "<script>alert(1)</script>")
    made.write()
    audit(tmp_path, made.root, "--workers", "0")
    text = (tmp_path / "audit.html").read_text()
    page = Page(text)
    assert not page.outside
    assert page.pictures == 3
    assert page.links <= page.ids
    assert "&lt;script&gt;alert(1)" in text
    assert "<b>" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_a_file_that_is_no_report_is_never_replaced(planted: Set, tmp_path, capsys):
    (tmp_path / "audit.json").write_text("mine")
    audit_of = ["audit", "--config", str(tmp_path / "config.yaml"), "--workers", "0"]
    (tmp_path / "config.yaml").write_text(CONFIG.format(root=planted.root))
    for arguments in (["--output", str(tmp_path / "audit.json")], ["--output", str(tmp_path / "audit.txt")]):
        assert main([*audit_of, *arguments]) == 2
    (tmp_path / "other.html").write_text("mine too")
    assert main([*audit_of, "--output", str(tmp_path / "other.json")]) == 2
    assert "is no report of an audit" in capsys.readouterr().err
    assert (tmp_path / "audit.json").read_text() == "mine"
    assert (tmp_path / "other.html").read_text() == "mine too"
    assert not (tmp_path / "other.json").exists()


MEMORY = """
import resource, sys
from trainer.cli import main
from trainer.config_file import load_config
from trainer.preflight import preflight
from trainer.run.records import write_records
from trainer.run.rundir import RunDir
from trainer.data.audit.picture import inspect
from trainer.data.sources.imagefolder import ImageFolder
import trainer.data.audit.findings
folder = sys.argv[1]
records = ImageFolder.model_validate({"data_root": folder, "image_size": 64}).open()
inspect(records, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for index in range(1, len(records)):
    seen = inspect(records, index)
    assert seen.over_limit and "over the limit" in seen.fault, seen
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_bomb_is_refused_from_its_header_in_little_memory(tmp_path):
    made = Set(tmp_path / "pictures")
    made.add("", "clean.png", made.picture())
    for side in (12_000, 20_000):
        assert len(made.add("", f"{side}.png", bomb(side))) < 10_000
    made.write()
    script = [sys.executable, "-c", MEMORY, str(made.root)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 50e6


@pytest.mark.slow
def test_two_thousand_small_pictures(tmp_path, capsys):
    made = Set(tmp_path / "pictures")
    for i in range(2000):
        made.add("", f"{i}.jpg", made.picture(256, 256), format="JPEG", quality=90)
    made.write()
    rates = {}
    for workers in ("1", "2"):
        started = time.monotonic()
        found = audit(tmp_path, made.root, "--workers", workers)
        rates[workers] = found["timing"]["records_per_second"]
        with capsys.disabled():
            print(f"\n{workers} workers: {rates[workers]:.0f} records/s, {time.monotonic() - started:.1f} s in all")
    assert min(rates.values()) > 20


def test_help_names_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    assert "Exit code 0" in capsys.readouterr().out
