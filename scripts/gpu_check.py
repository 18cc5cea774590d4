"""Five minutes of figures from any GPU, on a machine without a network: stage after stage, each row on disk at once.

Where there is a package registry, from the root of the checkout, collect what the other machine lacks; copy the
checkout with it there; start the second line. It needs a Python 3.12 with torch and transformers.
docs/gpu_results.md says what the rows mean. Without --wheels the environment is taken as it is. A second start takes
what the first one left.

    python scripts/gpu_check.py --collect wheels
    python scripts/gpu_check.py --wheels wheels --out results --budget 300
    python scripts/gpu_check.py --out results --device cpu --model tiny
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_goals import goals  # noqa: E402
from benchmarks.gpu_stages import CPU_MARKS, CPU_NAMES, CPU_TESTS, GPU_MARKS, GPU_TESTS, STAGES  # noqa: E402
from benchmarks.gpu_wheels import collect, install  # noqa: E402
from benchmarks.row_file import Row, append, is_bad, newest  # noqa: E402
from benchmarks.row_table import table  # noqa: E402

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "huggingface_hub", "peft", "pydantic", "difftrain")
CARD = "name,driver_version,memory.total,clocks.max.sm,power.limit,clocks.sm,power.draw,temperature.gpu"
LEAST_SECONDS = 10  # with less time left no stage is started
RESERVE_SECONDS = 5  # of the budget, for the table
LARGEST_LOG_BYTES = 8_000_000
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Collect, or run the stages and print the table: 0, or 1 if a row has an error other than out of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, metavar="DIR", help="download wheels for the other machine, and end")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install these into a temporary folder first")
    parser.add_argument("--out", type=Path, metavar="DIR", help="gpu.jsonl, table.txt and log.txt go there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=("sd15", "sd21", "sdxl", "tiny"), help="instead of each stage's own")
    parser.add_argument("--budget", type=float, default=300, metavar="SECONDS", help="of all stages (default 300)")
    parser.add_argument("--stages", nargs="+", choices=(*STAGES,), help="default: all; on a CPU those it can rehearse")
    parser.add_argument("--child", choices=("machine", "tests"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.collect is not None:
        collect(args.collect)
        return 0
    if args.out is None:
        parser.error("--out DIR is needed, or --collect DIR")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child is not None:
        return {"machine": machine, "tests": tests}[args.child](args.out / "gpu.jsonl", args.device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what `finally` says is done
    began = time.monotonic()
    site = install(args.wheels) if args.wheels is not None else None
    try:
        for name in args.stages or STAGES:
            run(name, args, began + args.budget - RESERVE_SECONDS, site)
    finally:
        rows = in_order(newest(args.out / "gpu.jsonl").values())
        judged = goals(rows) if args.device == "cuda" else ["the goals are for a GPU: nothing here is judged"]
        text = "\n".join([table(rows), "", *judged, "", f"{time.monotonic() - began:.0f} s"])
        (args.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)
        if site is not None:
            shutil.rmtree(site, ignore_errors=True)
    return int(any(map(is_bad, rows)))


def run(name: str, args: argparse.Namespace, deadline: float, site: Path | None) -> None:
    """One stage in a process of its own, and a row of how it ended; nothing if an earlier start has finished it."""
    file, stage = args.out / "gpu.jsonl", STAGES[name]
    row: Row = {"name": f"stage {name}", "stage": name, "device": args.device}
    if newest(file).get(row["name"], {}).get("result") == "done":
        return
    left = deadline - time.monotonic()
    if args.device == "cpu" and not stage.rehearsed and args.stages is None:
        append(file, row | {"not_run": "it is not rehearsed on a CPU; --stages asks for it"})
        return
    if left < LEAST_SECONDS:
        append(file, row | {"not_run": f"{max(0.0, left):.0f} s of the budget were left"})
        return
    seconds, began = min(stage.seconds, left), time.monotonic()
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    if stage.script is not None:
        words = [str(ROOT / "benchmarks" / stage.script), *stage.arguments(name, args.device, args.model)]
        words += ["--budget", str(seconds), "--file", str(file)]
    else:
        words = [__file__, "--child", name, "--out", str(args.out), "--device", args.device]
    ended = in_time([sys.executable, *words], environment(args.device, site), args.out / "log.txt", seconds)
    row["seconds"] = round(time.monotonic() - began, 1)
    if ended is None:
        row |= {"result": "out of time", "not_run": f"it took more than {seconds:.0f} s"}
    elif left_out := [each for each in newest(file).values() if each["stage"] == name and unfinished(each)]:
        row |= {"result": "in part", "not_run": f"{len(left_out)} of its rows were left out"}
    elif ended:
        row |= {"result": "failed", "error": f"exit {ended}: see its rows, and log.txt"}
    else:
        row["result"] = "done"
    append(file, row)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Stage by stage, whenever they were measured, each with the row of how it ended at its end."""
    order = list(STAGES)
    return sorted(rows, key=lambda row: (order.index(row["stage"]), row["name"].startswith("stage ")))


def unfinished(row: Row) -> bool:
    """Whether a row, not that of a stage, was left for a later start."""
    return "not_run" in row and not row["name"].startswith("stage ")


def in_time(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> int | None:
    """The exit code of a process; None if it was ended, with all that it started, after so many seconds."""
    full = log.is_file() and log.stat().st_size > LARGEST_LOG_BYTES
    with open(os.devnull if full else log, "ab") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True, preexec_fn=dies_with_its_parent
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody of its group is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def dies_with_its_parent() -> None:
    """In a new process, on Linux: be killed when the one that started it is, so that no stage goes on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)


def environment(device: str, site: Path | None) -> dict[str, str]:
    """Of the stages: our code and the installed wheels first, no network, memory that does not fragment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = [str(ROOT), *([str(site)] if site else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    kept |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if device == "cpu":
        kept |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    elif not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & kept.keys():
        kept["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return kept


def machine(file: Path, device: str) -> int:
    """Rows of the versions, and of the card with its clocks and power: 0."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    append(file, {"name": "versions", "stage": "machine", "device": device, "versions": text})
    if device == "cuda":
        ask = ["nvidia-smi", f"--query-gpu={CARD}", "--format=csv,noheader"]
        said = subprocess.run(ask, capture_output=True, text=True, timeout=30)
        smi = f"{CARD}: {said.stdout.strip() or said.stderr.strip()}"
        append(file, {"name": "nvidia-smi", "stage": "machine", "device": device, "smi": smi})
    return 0


def tests(file: Path, device: str) -> int:
    """A row for each test, as pytest says how it ended: 0, or 1 if one failed."""
    paths, marks = (GPU_TESTS, GPU_MARKS) if device == "cuda" else (CPU_TESTS, CPU_MARKS)
    pytest = [sys.executable, "-m", "pytest", "-v", "--run-slow", "-p", "no:randomly", "-p", "no:cacheprovider"]
    pytest += ["-k", CPU_NAMES] if device == "cpu" else []
    command = [*pytest, "-m", marks, *paths]
    fixed = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # read once, when CUDA starts: too late for later tests
    with subprocess.Popen(
        command, cwd=ROOT, env=fixed, stdout=subprocess.PIPE, text=True, preexec_fn=dies_with_its_parent
    ) as process:
        assert process.stdout is not None, "it is a pipe"
        began = time.monotonic()
        for line in process.stdout:
            print(line, end="")
            if found := re.match(r"\S+::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", line):
                row: Row = {"name": f"test {found[1]}", "stage": "tests", "device": device, "result": found[2].lower()}
                row["seconds"] = round(time.monotonic() - began, 1)
                bad = {"error": f"{found[2].lower()}: see log.txt"} if found[2] in ("FAILED", "ERROR") else {}
                append(file, row | bad)
                began = time.monotonic()
    return int(process.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
