"""Ask the job that trains in a run directory for a checkpoint after its current step, without a signal."""

from __future__ import annotations

import argparse

from trainer.commands.stop import add_arguments as add_arguments
from trainer.commands.stop import ask
from trainer.run.rundir import RunDir

EXAMPLE = "difftrain save runs/mine"


def run(args: argparse.Namespace) -> int:
    """Leave the request: 0. Raises UserError if no job trains there."""
    run_dir = RunDir(args.folder)
    holder = ask(run_dir, run_dir.save_request)
    print(f"asked {holder} for a checkpoint after the step that it is in")
    return 0
