"""Re-hash every checkpoint of a run, its config, data and model files, and compare them with its manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "difftrain verify runs/mine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `verify` takes."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="the run directory")


def run(args: argparse.Namespace) -> int:
    """One line for each thing looked at: 0 if all are as recorded, else 1. Raises UserError if there is no run."""
    from trainer.run.rundir import RunDir
    from trainer.verification import verify

    looked_at = faults = 0
    for finding in verify(RunDir(args.folder), print):
        looked_at, faults = looked_at + 1, faults + (finding.fault is not None)
        print(f"{'ok     ' if finding.fault is None else 'CHANGED'}  {finding.name}  {finding.fault or ''}".rstrip())
    print(f"{looked_at} looked at, {faults} not as recorded")
    return 1 if faults else 0
