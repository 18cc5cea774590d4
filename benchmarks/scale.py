"""What the order of the records costs as they become many: memory a record, the start of an epoch, a record's look-up.

Every number comes from a process of its own; docs/scaling.md says how to read the result and what it means.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison import conclude
from numpy.typing import NDArray

from trainer.data.buckets import HELD_OUT, OUT_OF_SCALE, Bucket, assign, make_buckets
from trainer.data.plan import BatchPlan, BucketPlan, Members, Plan

KINDS = {
    "range": "no buckets, all records",
    "listed": "no buckets, a list of indices",
    "codes": "no buckets, codes",
    "buckets": "buckets, codes in memory",
    "mapped": "buckets, codes in a mapped file",
}
BASELINE = 10  # records of the process whose memory is subtracted
CHUNK = 1 << 20  # pictures made up at a time
EPOCHS = 40  # starts that are timed


def buckets() -> tuple[Bucket, ...]:
    """As for SDXL: 1024 px in steps of 64, sides up to 1:4."""
    return make_buckets([1024], 64, 4.0)


def picture_sizes(n: int, seed: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Widths and heights of `n` made-up pictures: longer sides of 512 to 4096 px, half of the shapes 3:2 or 2:3."""
    draw = np.random.default_rng(seed)
    longer = 2 ** draw.uniform(9, 12, n)
    aspect = np.where(draw.random(n) < 0.5, 1.5, 2 ** np.abs(draw.normal(0, 0.6, n)).clip(0, 3))
    sides = longer.round().astype(np.uint16), (longer / aspect).round().clip(1).astype(np.uint16)
    upright = draw.random(n) < 0.5
    return np.where(upright, *sides), np.where(upright, *sides[::-1])


def write_codes(file: Path, n: int) -> dict[str, Any]:
    """Codes of `n` made-up pictures, every hundredth held out, and how long their assignment took."""
    seconds = 0.0
    with file.open("wb") as out:
        for number, start in enumerate(range(0, n, CHUNK)):
            sizes = picture_sizes(min(CHUNK, n - start), number)
            began = time.perf_counter()
            codes = assign(*sizes, buckets(), max_upscale=2.0)
            seconds += time.perf_counter() - began
            codes[::100] = HELD_OUT
            codes.tofile(out)
    return {"assign_seconds": seconds}


def copy_codes(source: Path, file: Path, n: int) -> None:
    """`n` codes drawn as often as they are in `source`, which is quicker than assigning them."""
    known = np.fromfile(source, np.uint8)[: 1 << 16]
    with file.open("wb") as out:
        for number, start in enumerate(range(0, n, CHUNK)):
            known[np.random.default_rng(number).integers(0, len(known), min(CHUNK, n - start))].tofile(out)


def make_plan(kind: str, n: int, file: Path, global_batch: int) -> Plan:
    """The plan whose memory and time are measured."""
    if kind == "range":
        return BatchPlan(range(n), 0)
    codes = np.memmap(file, np.uint8, mode="r", shape=(n,)) if kind == "mapped" else np.fromfile(file, np.uint8, n)
    if kind in ("buckets", "mapped"):
        return BucketPlan(Members(codes), buckets(), global_batch, 0)
    codes[codes < OUT_OF_SCALE] = 0
    if kind == "codes":
        return BatchPlan(Members(codes).of(0), 0)
    indices = array("I")
    for start in range(0, n, CHUNK):
        indices.frombytes((np.flatnonzero(codes[start : start + CHUNK] == 0) + start).astype(np.uint32).tobytes())
    return BatchPlan(indices, 0)


def memory() -> dict[str, int]:
    """Bytes that this process holds: its own, and of mapped files what happens to be in memory now."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    sizes = {name: 1024 * int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return {"own": sizes["Anonymous"], "mapped": sizes["Rss"] - sizes["Anonymous"]}


def measure(kind: str, n: int, file: Path, global_batch: int, slots: int) -> dict[str, Any]:
    """Build a plan and read from it: its seconds and the bytes of this process after that."""
    began = time.perf_counter()
    plan = make_plan(kind, n, file, global_batch)
    built = time.perf_counter() - began
    if isinstance(plan, BucketPlan):
        steps = [plan.steps(0)]
        for epoch in range(1, EPOCHS):
            steps.append(steps[-1] + plan.steps(epoch))
        firsts = [step * global_batch for step in steps]
    else:
        assert isinstance(plan, BatchPlan)
        firsts = [len(plan.indices) * epoch for epoch in range(1, EPOCHS + 1)]
    starts = []
    for slot in firsts:
        began = time.perf_counter()
        plan.record(slot)
        starts.append(time.perf_counter() - began)
    began = time.perf_counter()
    for slot in range(slots):
        plan.record(slot)
    return {
        "build_seconds": built,
        "epoch_start_microseconds": 1e6 * statistics.median(starts),
        "record_microseconds": 1e6 * (time.perf_counter() - began) / slots,
        "bytes": memory(),
    }


def in_a_fresh_process(*arguments: object) -> dict[str, Any]:
    """What `measure` or `write_codes` gives for these arguments in a new interpreter."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def child(arguments: Sequence[str]) -> None:
    """The other end of `in_a_fresh_process`."""
    if arguments[0] == "write":
        result = write_codes(Path(arguments[1]), int(arguments[2]))
    else:
        kind, n, file, global_batch, slots = arguments
        result = measure(kind, int(n), Path(file), int(global_batch), int(slots))
    print(json.dumps(result))


def rows_of(kinds: Sequence[str], n: int, file: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind of plan over `n` records; its bytes less those of the same process with ten."""
    rows = []
    for kind in kinds:
        base = in_a_fresh_process(kind, BASELINE, file, args.global_batch, args.slots)
        row = in_a_fresh_process(kind, n, file, args.global_batch, args.slots)
        row["bytes_a_record"] = {name: (row["bytes"][name] - base["bytes"][name]) / n for name in row["bytes"]}
        rows.append({"plan": kind, "records": n, **row})
        show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    each, total = row["bytes_a_record"], row["bytes_a_record"]["own"] * row["records"] / 1e6
    print(
        f"{row['records']:>13,}  {KINDS[row['plan']]:32}{each['own']:9.3f}{total:10.1f}{each['mapped']:9.3f}"
        f"{row['build_seconds']:10.3f}{row['epoch_start_microseconds']:11.0f}{row['record_microseconds']:11.1f}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON: 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--child"]:
        child(arguments[1:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = {"type": lambda text: int(float(text)), "metavar": "N"}
    parser.add_argument("--records", nargs="+", default=[10**5, 10**6, 10**7], help="default 1e5 1e6 1e7", **number)
    parser.add_argument("--simulate", help="also a plan over so many codes in a file, a byte each (say 1e9)", **number)
    parser.add_argument("--global-batch", type=int, default=256, help="images of a step (default 256)")
    parser.add_argument("--slots", type=int, default=20_000, help="look-ups that are timed (default 20,000)")
    parser.add_argument("--folder", type=Path, help="for the files of codes (default: the folder for temporary files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args(arguments)

    heads = f"{'own':>9}{'own':>10}{'mapped':>9}{'build':>10}{'epoch':>11}{'a record':>11}"
    units = f"{'B/record':>9}{'MB':>10}{'B/record':>9}{'s':>10}{'start, us':>11}{'us':>11}"
    print(f"{'records':>13}  {'plan':32}{heads}\n{'':>13}  {'':32}{units}")
    rows, assigned = [], {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for n in args.records:
            file = Path(folder) / f"{n}.codes"
            assigned[n] = in_a_fresh_process("write", file, max(n, BASELINE))["assign_seconds"]
            rows += rows_of(list(KINDS), n, file, args)
        if args.simulate:
            free = shutil.disk_usage(folder).free
            if free < 1.2 * args.simulate:
                raise SystemExit(f"{args.simulate:,} codes need as many bytes; {folder} has {free:,} free")
            large = Path(folder) / "simulated.codes"
            copy_codes(Path(folder) / f"{args.records[-1]}.codes", large, args.simulate)
            rows += rows_of(["mapped"], args.simulate, large, args)
    print()
    for n, seconds in assigned.items():
        print(
            f"{n:,} pictures assigned to {len(buckets())} buckets in {seconds:.2f} s, {1e9 * seconds / n:.0f} ns each"
        )
    print(f"batches of {args.global_batch} images; a process with {BASELINE} records is subtracted from the bytes")
    conclude({"rows": rows, "assign_seconds": assigned}, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
