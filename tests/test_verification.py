from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from trainer.checkpoint import sealed
from trainer.cli import main

CONFIG = """\
model: {{kind: tiny}}
data: {{kind: imagefolder, data_root: {data}, image_size: 32, num_workers: 0}}
train: {{seed: 7, max_steps: 4, global_batch_size: 2, log_every: 1}}
objective: {{kind: epsilon}}
lr: {{kind: constant, peak: 1e-4, warmup_steps: 0}}
checkpoint: {{every_steps: 2}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures in `data` and a run in `run`."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("verified")
    data = folder / "data"
    data.mkdir()
    names = [f"{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(data / name)
    rows = [{"file_name": name, "text": f"picture {name}"} for name in names]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(CONFIG.format(data=data))
    assert main(["train", "--config", str(folder / "config.yaml"), "--output-dir", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def changed(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit code, and what is not as recorded."""
    capsys.readouterr()
    code = main(["verify", str(run)])
    output = capsys.readouterr().out
    return code, [line.split()[1] for line in output.splitlines() if line.startswith("CHANGED")]


def test_a_run_as_it_was_left_verifies(copy: Path, capsys):
    assert changed(copy, capsys) == (0, [])


def test_one_flipped_bit_of_a_checkpoint_is_found(copy: Path, capsys):
    content = bytearray((copy / "checkpoint-2.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "checkpoint-2.pt").write_bytes(content)
    assert changed(copy, capsys) == (1, ["checkpoint-2.pt"])


def test_a_checkpoint_replaced_together_with_its_sidecar_is_found(copy: Path, capsys):
    sidecar = json.loads((copy / "checkpoint-2.json").read_text())
    shutil.copy(copy / "checkpoint-2.pt", copy / "checkpoint-4.pt")
    (copy / "checkpoint-4.json").write_text(json.dumps(sealed(sidecar | {"file": "checkpoint-4.pt", "step": 4})))
    assert changed(copy, capsys) == (1, ["checkpoint-4.pt"])


def test_what_is_missing_or_edited_is_found(copy: Path, capsys):
    (copy / "checkpoint-2.json").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:1] + lines[2:]))
    resolved = copy / "config.resolved.yaml"
    resolved.write_text(resolved.read_text().replace("seed: 7", "seed: 8"))
    assert changed(copy, capsys) == (1, ["config.resolved.yaml", "checkpoint-2.pt", "metrics.jsonl"])


def test_an_edited_caption_is_found(trained: Path, copy: Path, capsys):
    metadata = trained / "data" / "metadata.jsonl"
    before = metadata.read_text()
    try:
        metadata.write_text(before.replace("picture 1.png", "a picture of 1.png"))
        assert changed(copy, capsys) == (1, ["data"])
    finally:
        metadata.write_text(before)


def test_a_picture_changed_behind_an_unchanged_size_and_time_is_found(trained: Path, copy: Path, capsys):
    picture = trained / "data" / "2.png"
    before, times = picture.read_bytes(), (picture.stat().st_atime_ns, picture.stat().st_mtime_ns)
    try:
        picture.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        os.utime(picture, ns=times)
        assert main(["verify", str(copy)]) == 1
        assert "; 1 record: '2.png' picture changed\n" in capsys.readouterr().out
    finally:
        picture.write_bytes(before)
        os.utime(picture, ns=times)
    assert changed(copy, capsys) == (0, [])


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    assert main(["verify", str(tmp_path)]) == 2
