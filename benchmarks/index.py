"""The index: what a record costs in the file that all processes of a machine map into memory.

Claim: a process keeps nothing of a record, and opening the index again costs milliseconds whatever their number.
Made-up rows, no pictures. How to read the result: README.md in this folder.

    OMP_NUM_THREADS=1 python benchmarks/index.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from comparison import conclude, own_caches


def measure_index(records: int, folder: Path) -> dict[str, float]:
    """What the index of an `imagefolder` of so many made-up rows costs: built in one process, read in another."""
    return {**_in_a_fresh_process("build", records, folder), **_in_a_fresh_process("read", records, folder)}


def _index_of(records: int, folder: Path) -> Any:
    import pyarrow as pa

    from trainer.data.index import indexed
    from trainer.data.sources.imagefolder import ImageFolderRecords

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(records):
            caption = f"a photo of the made-up thing with the number {number:08d} on it".ljust(60)[:60]
            yield {"key": f"{number // 1000:06d}/{number:08d}.jpg", "captions": [caption], "caption_fault": None}

    index = indexed({"benchmark": records}, lambda: pa.schema([]), rows)
    return ImageFolderRecords(str(folder), index, 10**8, None)


def build_index(records: int, folder: Path) -> dict[str, float]:
    """Seconds to write it, and its bytes on disk per record."""
    began = time.perf_counter()
    path = _index_of(records, folder).index.path
    return {
        "build_seconds": time.perf_counter() - began,
        "disk_bytes_a_record": os.stat(path).st_size / records,
    }


def read_index(records: int, folder: Path) -> dict[str, float]:
    """Milliseconds to open it again, what every hundredth record leaves in memory, microseconds of `records[i]`.

    USS counts the pages of the mapped file too, as long as no other process has mapped them; anonymous memory is what
    the process holds for itself.
    """
    import psutil
    from scale import memory

    _index_of(10, folder)  # what the first use imports
    began = time.perf_counter()
    opened = _index_of(records, folder)
    seconds = time.perf_counter() - began
    before, uss_before = memory(), psutil.Process().memory_full_info().uss
    for index in range(0, records, 100):
        opened[index]
    uss, after = psutil.Process().memory_full_info().uss, memory()
    draw = random.Random(0)
    asked = [draw.randrange(records) for _ in range(20_000)]
    started = time.perf_counter()
    for index in asked:
        opened[index]
    return {
        "open_milliseconds": 1000 * seconds,
        "uss_bytes_a_record": (uss - uss_before) / records,
        "own_bytes_a_record": (after["own"] - before["own"]) / records,
        "record_microseconds": 1e6 * (time.perf_counter() - started) / len(asked),
    }


def _in_a_fresh_process(what: str, records: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, str(records), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON: 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--child"]:
        what, records, folder = arguments[1:]
        reads: dict[str, Callable[[int, Path], dict[str, float]]] = {"build": build_index, "read": read_index}
        print(json.dumps(reads[what](int(records), Path(folder))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--records",
        nargs="+",
        type=lambda text: int(float(text)),
        default=[10**5, 10**6],
        metavar="N",
        help="of an index (default 1e5 1e6)",
    )
    parser.add_argument("--folder", type=Path, help="for the index (default: the folder for temporary files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {"load_at_start": os.getloadavg(), "index": {}}
    print(f"{'records':>20}{'disk B':>9}{'open, ms':>10}{'USS B':>8}{'own B':>8}{'records[i], us':>16}")
    with tempfile.TemporaryDirectory(dir=args.folder) as name, own_caches(Path(name)):
        for records in args.records:
            row = result["index"][records] = measure_index(records, Path(name))
            print(
                f"{records:>20,}{row['disk_bytes_a_record']:9.1f}{row['open_milliseconds']:10.2f}"
                f"{row['uss_bytes_a_record']:8.2f}{row['own_bytes_a_record']:8.2f}{row['record_microseconds']:16.1f}",
                flush=True,
            )
    conclude(result, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
