"""`scripts/gpu_check.py` and the rows of the GPU benchmark, rehearsed on the CPU with the tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import ROOT
from runs import command, wait_for

from trainer.registry import temporary_kinds

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import comparison  # noqa: E402
from gpu_goals import goals  # noqa: E402
from row_file import append, finished, is_bad, rows_of  # noqa: E402

CHECK = str(ROOT / "scripts" / "gpu_check.py")
REHEARSAL = ["python", CHECK, "--device", "cpu", "--model", "tiny"]


@pytest.fixture
def gpu() -> Iterator[None]:
    """A test that imports the GPU benchmark forgets it at its end: it defines a kind, which other tests would meet."""
    with temporary_kinds():
        yield
    for name in {path.stem for path in BENCHMARKS.glob("*.py")} & set(sys.modules):
        del sys.modules[name]


def rehearsed(out: Path, *options: str) -> tuple[int, str]:
    """The exit code of a rehearsal, and what it printed."""
    with command(*REHEARSAL, "--out", str(out), *options, cwd=ROOT) as process:
        said, _ = process.communicate(timeout=400)
        return process.returncode, said


def test_the_check_needs_nothing_but_the_standard_library():
    bare = [sys.executable, "-I", "-S", CHECK, "--help"]
    done = subprocess.run(bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--collect" in done.stdout


@pytest.mark.slow
@pytest.mark.text2image
def test_the_rehearsal_fills_every_stage_and_its_losses_agree(tmp_path: Path):
    out = tmp_path / "made" / "out"
    code, said = rehearsed(out, "--budget", "180")
    rows = finished(out / "gpu.jsonl")
    bad = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert (code, bad) == (0, {}), said + (out / "log.txt").read_text()[-4000:]
    timed = {name: row for name, row in rows.items() if "ms" in row}
    assert len(timed) >= 8
    assert all(row["device"] == "cpu" and row["stage"] for row in rows.values())
    loop = {name.rpartition(": ")[2]: row for name, row in timed.items() if row["stage"] == "sd15"}
    assert loop["difftrain"]["loss_gap"] < 1e-3
    assert len(loop["difftrain"]["losses"]) == 5
    assert 0 < loop["difftrain"]["fp32_error"] < 2e-2
    assert loop["difftrain"]["attention"] != "none"
    assert loop["difftrain"]["percent_of_matmul"] > 0
    assert rows["stage host"]["result"] == rows["stage tests"]["result"] == "done"
    last = {row["name"]: row for row in rows_of(out / "gpu.jsonl")}
    assert "not_run" in last["stage blocks"], "what is not rehearsed is named"
    assert sum(name.startswith("test ") for name in rows) == 2
    files = list(out.rglob("*"))
    assert {path.name for path in files} == {"gpu.jsonl", "table.txt", "log.txt"}
    assert all(path.stat().st_size < 16e6 for path in files)
    assert (out / "table.txt").read_text().strip() in said
    assert rehearsed(out)[0] == 0
    assert finished(out / "gpu.jsonl") == rows, "a second start measures nothing again"


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.text2image
def test_a_killed_check_keeps_its_rows_and_goes_on_from_them(tmp_path: Path):
    file, options = tmp_path / "gpu.jsonl", ["--out", str(tmp_path), "--stages", "script"]
    with command(*REHEARSAL, *options, cwd=ROOT) as process:
        wait_for(lambda: sum("ms" in row for row in rows_of(file)) >= 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = finished(file)
    assert len(kept) >= 2
    assert "stage script" not in kept
    assert rehearsed(tmp_path, "--stages", "script")[0] == 0
    rows = finished(file)
    assert rows["stage script"]["result"] == "done"
    assert {name: rows[name] for name in kept} == kept
    names = [row["name"] for row in rows_of(file) if row["name"].startswith("script: tiny")]
    assert len(names) == len(set(names)) == 3


def test_a_stage_without_time_is_named_as_not_run(tmp_path: Path):
    code, said = rehearsed(tmp_path, "--budget", "6", "--stages", "sd15")
    assert code == 0
    assert "not run: 1 s of the budget were left" in said
    assert finished(tmp_path / "gpu.jsonl") == {}


def test_a_row_after_one_cut_short_stands_on_its_own_line(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    append(file, {"name": "one", "ms": 1.0})
    file.write_bytes(file.read_bytes() + b'{"name": "two", "m')
    append(file, {"name": "three", "not_run": "no time"})
    append(file, {"name": "four"})
    assert [row["name"] for row in rows_of(file)] == ["one", "three", "four"]
    assert list(finished(file)) == ["one", "four"]


def test_out_of_memory_is_a_row_and_the_next_one_follows(tmp_path: Path, gpu: None):
    import torch
    from gpu import Sheet

    def too_much() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 TiB.")

    sheet = Sheet(tmp_path / "rows.jsonl", "stage", "cpu", budget=60)
    sheet.row("large", too_much)
    sheet.row("small", lambda: {"ms": 1.0})
    large, small = rows_of(tmp_path / "rows.jsonl")
    assert large["error"] == "out of memory: CUDA out of memory. Tried to allocate 2.00 TiB."
    assert small["ms"] == 1.0
    assert not is_bad(large), "it is a finding"


@pytest.mark.text2image
def test_a_run_out_of_memory_is_such_a_row_too(gpu: None):
    import torch
    from gpu_device import Telemetry
    from gpu_rows import PLANS, measured, ours
    from gpu_step import Data, Step

    from trainer.objectives.epsilon import Epsilon

    class HungryEpsilon(Epsilon):
        kind = "hungry_epsilon"

        def loss(self, pred, target):
            return torch.empty(2**50)

    telemetry = Telemetry(torch.device("cpu"))
    PLANS["hungry"] = ours({"objective": {"kind": "hungry_epsilon"}})
    data = Data(Step("tiny", 1, 32, "fp32", warm=1, steps=1), telemetry.device)
    rows = [measured(name, data, telemetry, 1.0, 1.0, None) for name in ("hungry", "difftrain")]
    telemetry.close()
    assert rows[0]["error"].startswith("out of memory")
    assert rows[1]["ms"] > 0
    del PLANS["hungry"]


def test_a_row_is_not_begun_when_the_slowest_would_not_fit(tmp_path: Path, gpu: None):
    from gpu import RESERVE_SECONDS, Sheet

    sheet = Sheet(tmp_path / "rows.jsonl", "stage", "cpu", budget=RESERVE_SECONDS + 5)
    assert "ms" in sheet.row("first", lambda: {"ms": 1.0})
    sheet.slowest = 10
    assert "not_run" in sheet.row("second", lambda: {"ms": 1.0})


@pytest.mark.text2image
def test_a_network_that_answers_otherwise_is_not_timed(gpu: None):
    import torch
    from gpu_device import Telemetry
    from gpu_rows import PLANS, measured, ours
    from gpu_step import Data, Step

    telemetry = Telemetry(torch.device("cpu"))
    data = Data(Step("tiny", 1, 32, "fp32", warm=1, steps=1), torch.device("cpu"))
    PLANS["other weights"] = ours({"train.seed": 1})
    try:
        row = measured("other weights", data, telemetry, 1.0, 1.0, None)
    finally:
        del PLANS["other weights"]
        telemetry.close()
    assert "from that of fp32" in row["error"]
    assert "ms" not in row


def test_losses_unlike_those_of_the_bare_loop_are_an_error(gpu: None):
    from gpu_rows import PLANS, compared

    bare = {"ms": 10.0, "losses": [1.0, 0.5]}
    alike, unlike = {"ms": 11.0, "losses": [1.0, 0.5001]}, {"ms": 11.0, "losses": [1.0, 0.51]}
    assert compared(alike, PLANS["difftrain"], bare) is None
    assert alike["over_bare"] == 1.1
    assert "losses" in (compared(unlike, PLANS["difftrain"], bare) or "")
    assert compared({"ms": 11.0, "losses": [1.0, 0.51]}, PLANS["compile blocks"], bare) is None


def test_goals_are_judged_by_what_was_measured_rightly():
    size = {"model": "sd15", "pixels": 512, "batch": 32}
    rows = [
        {"name": "sd15: sd15 512 px: bare", "ms": 100.0, "percent_of_matmul": 60.0, **size},
        {"name": "sd15: sd15 512 px: difftrain", "ms": 101.0, "percent_of_matmul": 45.0, **size},
        {"name": "script: sd15 512 px: difftrain", "ms": 100.0, "error": "its losses differ", **size},
        {"name": "script: sd15 512 px: script, encoders at each step", "ms": 200.0, **size},
        {"name": "sd15 512 px: a save, in the background", "ms": 100.0, "stall_ms": 30.0},
        {"name": "sd15 512 px: a save, steps wait", "ms": 100.0, "stall_ms": 100.0},
    ]
    assert list(goals(rows)) == [
        "met    sd15: sd15 512 px: difftrain over bare 1.01, goal <= 1.02",
        "MISSED sd15: sd15 512 px: percent of the matmul rate (difftrain) 45, goal >= 46",
        "MISSED sd15 512 px: stall of a save over one that steps wait for 0.3, goal <= 0.1",
    ]


def test_the_hosts_microseconds_are_judged_on_one_rank():
    name = "host: microseconds of a step without the network"
    rows = [{"name": f"{name}, {ranks} ranks", "ranks": ranks, "microseconds": 499.0 + ranks} for ranks in (1, 2)]
    assert list(goals(rows)) == ["met    host: microseconds of the host 500, goal <= 500"]


def test_a_benchmark_of_a_checkout_not_installed_writes_its_json(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "PACKAGES", ("pytest", "a-checkout-that-was-copied"))
    comparison.conclude({"figure": 1}, [], tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["figure"] == 1
    assert result["versions"] | {"python": ""} == {
        "python": "",
        "pytest": pytest.__version__,
        "a-checkout-that-was-copied": "not installed",
    }
    assert "not installed" in capsys.readouterr().out
