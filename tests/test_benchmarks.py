"""The benchmarks still run and say what they claim to; how fast anything is, no test says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def benchmark(name: str, file: Path, *arguments: str) -> dict[str, Any]:
    """What the benchmark wrote as JSON."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments, "--json", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["machine"] in done.stdout
    assert result["versions"]["torch"] in done.stdout
    assert result["command"].startswith(f"python benchmarks/{name} ")
    return result


@pytest.mark.slow
@pytest.mark.text2image
def test_loop_tax_compares_three_loops_that_compute_the_same(tmp_path):
    result = benchmark(
        *("loop_tax.py", tmp_path / "tax.json", "--sets", "1", "--rounds", "1", "--steps", "2", "--batch", "2"),
        *("--host-steps", "100"),
    )
    assert set(result["clocks"]) == {"wall", "cpu"}
    for clock, loops in result["clocks"].items():
        assert set(loops) == {"difftrain", "bare", "bare again"}
        assert loops["bare"]["ratios_of_sets"] == [1.0]
        assert all(len(loop["ratios_of_sets"]) == 1 and loop["step_milliseconds"] > 0 for loop in loops.values())
        assert result["loop_tax"][clock] == loops["difftrain"]["ratio"] > 0
    assert [row["ranks"] for row in result["host"]] == [1, 2]
    for row in result["host"]:
        named = {"loader", "draws", "collectives", "clip", "optimizer", "EMA", "metrics", "hooks", "objective"}
        assert all(row["parts"][part] > 0 for part in named)
        assert row["wall_microseconds"] > row["microseconds"] > 0


@pytest.mark.slow
@pytest.mark.text2image
def test_gpu_measures_a_loop_on_the_cpu_beside_the_bare_one(tmp_path):
    smallest = ["--device", "cpu", "--model", "tiny", "--sizes", "1x32", "--warm", "1", "--steps", "1"]
    result = benchmark("gpu.py", tmp_path / "gpu.json", *smallest, "--rows", "loop", "--precision", "fp32")
    rows = {row["name"].rpartition(": ")[2]: row for row in result["rows"]}
    assert list(rows)[:2] == ["matmul fp32, before", "bare"]
    assert set(rows) == {"matmul fp32, before", "bare", "difftrain", "bare again", "matmul fp32, after"}
    assert rows["bare again"]["losses"] == rows["bare"]["losses"]
    assert rows["difftrain"]["loss_gap"] < 1e-3
    assert all(row["ms"] > 0 and row["tflops"] > 0 for row in rows.values())


@pytest.mark.slow
@pytest.mark.text2image
def test_startup_times_every_command_and_the_way_to_the_first_step(tmp_path):
    result = benchmark("startup.py", tmp_path / "startup.json", "--runs", "1")
    seconds = result["seconds"]
    assert set(seconds) == {'python -c "import torch"', "difftrain --help", "difftrain validate", "difftrain train"}
    train = dict(seconds["difftrain train"])
    wall, _ = train.pop("wall"), train.pop("cpu")
    assert sum(train.values()) == pytest.approx(wall)
    assert min(train.values()) > 0
    assert result["imports"]["all"] > result["imports"]["torch"] > 0


@pytest.mark.slow
@pytest.mark.text2image
def test_demo_step_times_the_demo_with_one_thing_taken_away_at_a_time(tmp_path):
    result = benchmark("demo_step.py", tmp_path / "demo.json", "--rounds", "1", "--steps", "2")
    assert result["ratios"]["as it is"] == [1.0]
    assert {"encoded at every step", "77 tokens a prompt"} <= set(result["ratios"])
    assert all(ratio > 0 for ratios in result["ratios"].values() for ratio in ratios)


@pytest.mark.slow
@pytest.mark.text2image
def test_checkpoints_times_saves_and_resumes(tmp_path):
    smallest = ["--rounds", "1", "--saves", "2", "--every", "4", "--channels", "16", "16", "--resumes", "1"]
    result = benchmark("checkpoints.py", tmp_path / "saves.json", *smallest, "--late", "30000")
    saving, resuming = result["saving"], result["resuming"]
    assert {"no saves", "torch.save", "copy alone", "in the background", "background=false"} <= set(saving)
    assert saving["torch.save"]["ratios"] == [1.0]
    assert saving["no saves"]["costs"] == [0.0]
    assert all(row["step"] > 0 and 0 < row["longest"] <= row["worst"] for row in saving.values())
    assert result["checkpoint_bytes"] > 0
    assert set(resuming) == {"step 10", "step 10, again", "step 30,000"}
    for row in resuming.values():
        parts = dict(row["seconds"])
        assert parts.pop("wall") == pytest.approx(sum(parts.values()))
        assert min(parts.values()) > 0


@pytest.mark.text2image
@pytest.mark.slow
def test_exactness_compares_modes_and_draws(tmp_path):
    smallest = ["--sets", "1", "--rounds", "1", "--steps", "2", "--batch", "2", "--image-size", "32", "--repeats", "3"]
    result = benchmark("exactness.py", tmp_path / "exactness.json", *smallest)
    for clock, modes in result["modes"].items():
        assert set(modes) == {"normal", "normal again", "deterministic"}
        assert modes["normal"]["speeds_of_sets"] == [1.0]
        assert result["speed"][clock] == modes["deterministic"]["speed"] > 0
    assert {"noise 4x64x64", "posterior 4x8x8", "time", "caption"} <= set(result["draw_microseconds"])
    assert all(microseconds > 0 for microseconds in result["draw_microseconds"].values())
    assert result["draws_of_a_step"]["share"] > 0


@pytest.mark.slow
@pytest.mark.text2image
def test_loading_compares_the_loader_with_a_bare_loop(tmp_path):
    smallest = ["--cases", "96x64:32", "--rounds", "1", "--images", "2", "--pictures", "4", "--batch", "2"]
    result = benchmark("loading.py", tmp_path / "loading.json", *smallest, "--workers", "0", "1")
    of_workers = result["loading"]["96x64 to 32"]
    assert set(of_workers) == {"0", "1"}
    for rows in of_workers.values():
        assert set(rows) == {"bare", "bare again", "difftrain", "datasets + DataLoader"}
        assert rows["bare"]["ratios"] == [1.0]
        assert all(row["images_per_second"] > 0 and row["ratio"] > 0 for row in rows.values())


@pytest.mark.slow
def test_the_index_is_built_in_one_process_and_read_in_another(tmp_path):
    result = benchmark("index.py", tmp_path / "index.json", "--records", "200")
    index = result["index"]["200"]
    assert index["disk_bytes_a_record"] > 19 + 60  # its key and its caption
    assert index["open_milliseconds"] > 0
    assert index["record_microseconds"] > 0


@pytest.mark.slow
@pytest.mark.text2image
def test_caching_times_a_build_a_rebuild_and_the_wait_of_a_step(tmp_path):
    smallest = ["--rounds", "1", "--pictures", "8", "--picture-size", "40", "--image-size", "32", "--steps", "2"]
    result = benchmark("caching.py", tmp_path / "caching.json", *smallest, "--vaes", "8-8", "--train-workers", "0")
    row = result["vae"]["8-8"]
    assert set(row["speed"]) == {"bare again", "build", "looks and build"}
    assert row["speed"]["build"][0] > row["speed"]["looks and build"][0] > 0
    assert set(row["rebuild"]) == {"encode", "looks and encode"}
    assert row["seconds"]["first"]["encode"] > 0
    wait = row["training"]["0"]
    assert 0 < wait["wait"] < 1
    assert wait["loader_samples_per_second"] > 0


@pytest.mark.slow
@pytest.mark.text2image
def test_end_to_end_compares_with_the_script_of_diffusers(tmp_path):
    smallest = ["--rounds", "1", "--steps", "1", "9", "--pictures", "16", "--picture-size", "40", "--image-size", "32"]
    result = benchmark("end_to_end.py", tmp_path / "end.json", *smallest, "--batch", "2", "--vae", "random")
    assert set(result["clocks"]) == {"wall", "cpu"}
    for clock, rows in result["clocks"].items():
        assert set(rows) == {"script", "script again", "difftrain", "difftrain, cache"}
        assert rows["script"]["speeds"] == [1.0]
        assert all(len(slopes) == 1 for slopes in result["slopes"][clock].values())


@pytest.mark.slow
def test_scale_measures_every_kind_of_plan(tmp_path):
    result = benchmark("scale.py", tmp_path / "scale.json", "--records", "1e4", "--slots", "200")
    rows = {row["plan"]: row for row in result["rows"]}
    assert set(rows) == {"range", "listed", "codes", "buckets", "mapped"}
    assert all(row["records"] == 10_000 and row["record_microseconds"] > 0 for row in rows.values())
    assert all(row["epoch_start_microseconds"] > 0 for row in rows.values())


@pytest.mark.slow
@pytest.mark.text2image
def test_roofline_computes_each_option_by_part(tmp_path):
    result = benchmark("roofline.py", tmp_path / "roofline.json", "--pixels", "64", "--batch", "1")
    assert result["computed"]
    options = result["options"]
    assert {"as it is", "norm_precision: bf16", "channels_last", "compile: blocks", "all three"} <= set(options)
    for option in options.values():
        for count in ("launches", "bytes", "flops"):
            assert sum(part[count] for part in option["parts"].values()) == option[count] > 0
        assert all(rate > 0 for rate in option["images_per_second"].values())
    assert options["all three"]["flops"] == options["as it is"]["flops"]
    assert options["all three"]["bytes"] < options["compile: blocks"]["bytes"] < options["as it is"]["bytes"]
