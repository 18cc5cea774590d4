"""The smoke run: two steps, every artifact, both checkpoints; one body for the CPU, a GPU, and a GPU with the hub."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from trainer.cli import main
from trainer.data.dummy import write_dummy_imagefolder

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from smoke_checklist import FILLED_NAME, TEMPLATE, collect_metadata, fill_checklist, preconditions  # noqa: E402

CONFIG = ROOT / "configs" / "smoke_text2image.yaml"


def smoke(folder: Path, precision: str, overrides: list[str]) -> Path:
    """Train two steps in `precision` and check what the run left; returns the run directory."""
    import torch

    data_root, run = folder / "data", folder / f"run_{precision}"
    write_dummy_imagefolder(data_root, num_images=4, image_size=64)
    command = ["train", "--config", str(CONFIG), "--output-dir", str(run), "--set", f"data.data_root={data_root}"]
    assert main([*command, f"train.precision={precision}", *overrides]) == 0

    for name in ("env.json", "config.resolved.yaml", "run_manifest.json", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0, name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] > 0 for line in lines)
    assert precision == "fp16" or not any(line["skipped"] for line in lines), (
        "only a loss scaler may look for its scale"
    )
    for step in (1, 2):
        content = torch.load(run / f"checkpoint-{step}.pt", weights_only=True)
        assert content["step"] == step
        assert {"format", "modules", "optimizer", "ema", "scaler", "config"} <= content.keys()
        weights = content["modules"]["unet"].values()
        assert all(weight.dtype == torch.float32 for weight in weights), "the masters stay fp32"
        assert (run / f"checkpoint-{step}.json").is_file()
    manifest = json.loads((run / "run_manifest.json").read_text())
    assert manifest["status"] == {"state": "done", "exit_code": 0, "reason": "2 steps"}
    assert [checkpoint["step"] for checkpoint in manifest["checkpoints"]] == [1, 2]
    return run


def test_smoke_on_the_cpu_with_the_tiny_model(tmp_path):
    smoke_in_every_precision(tmp_path, ["fp32", "bf16"], "model.kind=tiny")
    filled = (tmp_path / FILLED_NAME).read_text()
    assert re.search(r"^\| bf16 smoke .*\| PASS \|", filled, re.MULTILINE)
    assert re.search(r"^\| fp16 smoke .*\| NA \|", filled, re.MULTILINE)


def test_a_failing_smoke_is_written_down_as_a_failure(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint-1"):
        smoke_in_every_precision(tmp_path, ["fp32"], "model.kind=tiny", "checkpoint.every_steps=2")
    assert re.search(r"^\| Run \w+ smoke .* \| FAIL \|", (tmp_path / FILLED_NAME).read_text(), re.MULTILINE)


def test_fp16_without_a_gpu_is_refused_and_leaves_nothing(tmp_path, capsys):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    write_dummy_imagefolder(tmp_path / "data", num_images=4, image_size=64)
    run = tmp_path / "run"
    command = ["train", "--config", str(CONFIG), "--output-dir", str(run), "--set", "model.kind=tiny"]
    assert main([*command, f"data.data_root={tmp_path / 'data'}", "train.precision=fp16"]) == 2
    assert "fp16 needs a GPU" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.text2image
def test_smoke_on_a_gpu_with_the_tiny_model(tmp_path):
    smoke_in_every_precision(tmp_path, gpu_precisions(), "model.kind=tiny")


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.text2image
@pytest.mark.integration
def test_smoke_on_a_gpu_with_the_hub_model(tmp_path):
    smoke_in_every_precision(tmp_path, gpu_precisions())


def gpu_precisions() -> list[str]:
    import torch

    return ["fp32", "fp16", *(["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else [])]


def smoke_in_every_precision(folder: Path, precisions: list[str], *overrides: str) -> None:
    """One smoke run for each precision, and the filled-in checklist beside them, also if one fails."""
    import torch

    on_gpu = torch.cuda.is_available()
    rows = {"fp32": "Run GPU smoke", "fp16": "fp16 smoke", "bf16": "bf16 smoke"}
    results = preconditions() | dict.fromkeys(rows.values(), ("NA", "this device has no such precision"))
    if not on_gpu:
        results["Run GPU smoke"] = ("NA", "no CUDA device here; the same body on the CPU: see the other rows")
        rows["fp32"] = "Run training smoke"
    runs = []
    try:
        for precision in precisions:
            results[rows[precision]] = ("FAIL", "see pytest's log")
            runs.append(smoke(folder, precision, list(overrides)))
            results[rows[precision]] = ("PASS", f"{'CUDA' if on_gpu else 'CPU'} smoke: {runs[-1]}")
    finally:
        write_checklist(folder, results)


def write_checklist(folder: Path, results: dict[str, tuple[str, str]]) -> None:
    """The filled-in checklist of `folder`, if a run there came far enough to know its machine."""
    for run in sorted(folder.glob("run_*")):
        env, manifest = run / "env.json", run / "run_manifest.json"
        if env.is_file() and manifest.is_file():
            metadata = collect_metadata(json.loads(env.read_text()), json.loads(manifest.read_text()))
            fill_checklist(TEMPLATE, folder / FILLED_NAME, metadata, results)
            return
