"""How fast a train step is on a device, and how fast the device could be: difftrain, a bare loop, one thing changed.

Everything is built on the device: random weights, and three batches of latents and text that steps rotate among. Rows
come in shuffled order, each is on disk before the next begins, and out of memory is a row. How to read it: README.md.

    python benchmarks/gpu.py --model sd15 --sizes 32x512 64x512 --rows loop options --json gpu.json
    python benchmarks/gpu.py --device cpu --model tiny --sizes 2x64 --rows loop --precision fp32
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from comparison import conclude
from gpu_ceiling import ceilings, matmul
from gpu_device import Telemetry, free_memory
from gpu_loops import quietly
from gpu_model import shape_of, tflop_of_step
from gpu_rows import GROUPS, PLANS, measured, row_error
from gpu_saves import save_stall
from gpu_step import Data, Step
from gpu_vae import vae_row
from row_file import Row, append, finished, is_bad
from row_table import table

OTHERS = ("ceilings", "vae", "save")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RESERVE_SECONDS = 2.0  # of the budget, for the end of the process
MATMUL_SECONDS = 1.0  # that one takes at most, the start of the device included
SLOWER = 1.3  # a row may take so much longer than the slowest one before it


class Sheet:
    """The rows of one call: measured one by one while the budget lasts, and each put on disk at once."""

    def __init__(self, file: Path, stage: str, device: str, budget: float):
        self.file, self.stage, self.device = file, stage, device
        self.deadline = time.monotonic() + budget
        self.done, self.slowest = finished(file), 0.0
        self.rows: list[Row] = []

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.deadline - time.monotonic() - RESERVE_SECONDS

    def row(self, name: str, measure: Callable[[], Row], seconds: float | None = None) -> Row:
        """The row `name`: as an earlier call left it, or measured now, or `not run` if there is no time for it.

        It is taken to need so many `seconds`, or somewhat more than the slowest one so far.
        """
        if name in self.done:
            self.rows.append(self.done[name])
            return self.done[name]
        row: Row = {"name": name, "stage": self.stage, "device": self.device}
        if self.left() < (SLOWER * self.slowest if seconds is None else seconds):
            row["not_run"] = f"{max(0, self.left()):.0f} s of the budget are left"
        else:
            began = time.monotonic()
            try:
                row |= measure()
            except Exception as error:  # noqa: BLE001
                row["error"] = row_error(error)
            self.slowest = max(self.slowest, time.monotonic() - began)
        append(self.file, row)
        self.rows.append(row)
        print(table([row]).splitlines()[1], flush=True)
        return row


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON: 0, or 1 if a row has an error other than out of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sd15", "sd21", "sdxl", "tiny"), default="sd15")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", default=["32x512"], metavar="BATCHxPIXELS", help="default 32x512")
    parser.add_argument("--rows", nargs="+", choices=(*GROUPS, *OTHERS), default=["loop"], help="default loop")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--accumulation", type=int, default=1, help="micro batches of a step (default 1)")
    parser.add_argument("--warm", type=int, default=3, help="steps of a row that are not looked at (default 3)")
    parser.add_argument("--steps", type=int, default=12, help="steps of a row that are (default 12)")
    parser.add_argument("--budget", type=float, default=3600, metavar="SECONDS", help="default 3600")
    parser.add_argument("--stage", default="gpu", help="what the rows are filed under (default gpu)")
    parser.add_argument("--file", type=Path, help="append the rows there, and measure none that it holds already")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there at the end")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anyone asks: accelerate would take the GPU
    if "deterministic" in args.rows:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA starts
    # fp32 means fp32, as in a run: the reference of every row, and the VAE.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        file = args.file or Path(folder) / "rows.jsonl"
        sheet = Sheet(file, args.stage, name_of(args.device), args.budget)
        telemetry = Telemetry(torch.device(args.device))
        try:
            fill(sheet, args, telemetry)
        finally:
            telemetry.close()
    print(f"\n{table(sheet.rows)}")
    conclude({"rows": sheet.rows}, arguments, args.json)
    return int(any(map(is_bad, sheet.rows)))


def fill(sheet: Sheet, args: argparse.Namespace, telemetry: Telemetry) -> None:
    """All rows that were asked for, a matmul before and after them."""
    device, dtype = torch.device(args.device), DTYPES[args.precision]
    before = sheet.row(f"{sheet.stage}: matmul {args.precision}, before", lambda: matmul(device, dtype), MATMUL_SECONDS)
    for batch, pixels in (map(int, size.split("x")) for size in args.sizes):
        step = Step(args.model, batch, pixels, args.precision, args.warm, args.steps, args.accumulation)
        loops(sheet, step, args, telemetry, before.get("tflops", 0.0))
        for name, measure in others(step, args, device):
            sheet.row(name, lambda measure=measure: freed(device, measure))
    sheet.row(f"{sheet.stage}: matmul {args.precision}, after", lambda: matmul(device, dtype), MATMUL_SECONDS)


def loops(sheet: Sheet, step: Step, args: argparse.Namespace, telemetry: Telemetry, rate: float) -> None:
    """The rows of a step whose loops were asked for: the bare one first, since others are compared with it."""
    wanted = list(dict.fromkeys(name for group in args.rows for name in GROUPS.get(group, ())))
    wanted = [name for name in wanted if PLANS[name].needs in (None, step.precision)]
    if not wanted:
        return
    order = random.Random(0).sample(wanted, len(wanted))
    order.sort(key=lambda name: (name != "bare", "compile" in name, "full" in name))  # what may take minutes, last
    data = Data(step, torch.device(args.device))
    flops = tflop_of_step(shape_of(step.model), step.images, step.pixels)
    stem = f"{sheet.stage}: {step.text}"
    for name in order:
        bare = sheet.done.get(f"{stem}: bare") or next((r for r in sheet.rows if r["name"] == f"{stem}: bare"), None)
        sheet.row(f"{stem}: {name}", lambda name=name, bare=bare: measured(name, data, telemetry, flops, rate, bare))


def others(step: Step, args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The names of the rows that are no loops, and what measures them."""
    if "ceilings" in args.rows:
        for name, measure in ceilings(device, shape_of(step.model), step.batch, step.pixels):
            yield f"ceiling of {step.model} {step.pixels} px, {step.batch} images: {name}", measure
    if "vae" in args.rows:
        for precision in ("fp32", "bf16"):
            name = f"VAE of {step.model}, {step.batch} images of {step.pixels} px, {precision}"
            yield name, lambda p=precision: vae_row(device, step.model, step.batch, step.pixels, p)
    if "save" in args.rows:
        for name, background in (("in the background", True), ("steps wait", False)):
            yield f"{step.text}: a save, {name}", lambda background=background: saved(Data(step, device), background)


def saved(data: Data, background: bool) -> Row:
    """The row of a save."""
    with quietly(), tempfile.TemporaryDirectory() as folder:
        return save_stall(data, Path(folder), background)


def freed(device: torch.device, measure: Callable[[], Row]) -> Row:
    """What `measure` gives, with an empty device before it."""
    free_memory(device)
    return measure()


def name_of(device: str) -> str:
    """The card's name, or `cpu`."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(main())
