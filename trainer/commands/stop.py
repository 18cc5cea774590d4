"""Ask the job that trains in a run directory to finish its step, save and end with exit code 75, without a signal."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.errors import UserError
from trainer.files import write_atomic
from trainer.run.lock import RunLock
from trainer.run.rundir import RunDir

EXAMPLE = "difftrain stop runs/mine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `stop` takes, and `save` too."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="the run directory of the job")


def run(args: argparse.Namespace) -> int:
    """Leave the request: 0. Raises UserError if no job trains there."""
    run_dir = RunDir(args.folder)
    holder = ask(run_dir, run_dir.stop_request)
    print(f"asked {holder} to stop after the step that it is in")
    return 0


def ask(run_dir: RunDir, request: Path) -> str:
    """Leave the file `request` for the job that writes `run_dir`, and return who that is."""
    holder = RunLock(run_dir.path).holder()
    if holder is None:
        raise UserError("no job is training in this folder", str(run_dir.path), "is this its run directory?")
    try:
        write_atomic(request, b"")
    except OSError as error:
        raise UserError(f"the request cannot be left there: {error}", str(request)) from None
    return holder
