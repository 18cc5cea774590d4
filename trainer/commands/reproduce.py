"""Compute the first steps of a run again and name the first step, and the first number, that differs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from trainer.errors import UserError

EXAMPLE = "difftrain reproduce runs/mine --steps 20"
AT_MOST = 8  # differences a section
NOT_COMPARED = {
    "data": "the run has a fingerprint of another kind",
    "model": "it has no files, or they cannot be found without the network",
}
UNEXPLAINED = (
    "nothing on record explains it: kernels that are not deterministic (train.deterministic), code that git does not "
    "track, or the hardware"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `reproduce` takes."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument("--steps", type=int, default=20, metavar="K", help="steps to compute again (default 20)")
    parser.add_argument(
        "--output-dir", type=Path, metavar="FOLDER", help="keep what is computed here as a run of its own (default: no)"
    )


def run(args: argparse.Namespace) -> int:
    """0 if the inputs and all steps are as recorded, else 1. Raises UserError if there is nothing to repeat."""
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: it is at least 1")
    from trainer.commands.train import share_cores

    share_cores()
    from trainer.data.fingerprint import counted
    from trainer.reproduction import reproduce
    from trainer.run.rundir import RunDir

    say = print if os.environ.get("RANK", "0") == "0" else lambda line: None
    output_dir = RunDir(args.output_dir) if args.output_dir else None
    found = reproduce(RunDir(args.folder), args.steps, output_dir, say)
    for section, different in found.inputs.items():
        _tell(section, different, say)
    if found.records:
        say(f"records: {counted(found.records)}")
        for key, what in list(found.records.items())[:AT_MOST]:
            say(f"  {key}: {what}")
    if found.first_step is None:
        exactly = "equal to the bit" if found.relative == 0 else f"equal to {found.relative:g} of their size"
        say(f"steps 1 to {found.steps}: {exactly}")
    else:
        say(f"step {found.first_step} is the first that differs: {', '.join(found.quantities)}")
        for name, (was, now) in found.quantities.items():
            say(f"  {name}: {was!r} -> {now!r}")
        explained = {**found.inputs, **found.circumstances}
        say("what may explain it:" if any(explained.values()) else UNEXPLAINED)
        for section, different in found.circumstances.items():
            _tell(section, different, say)
    return 0 if found.equal else 1


def _tell(section: str, different: dict | None, say) -> None:
    if different is None:
        say(f"{section}: not compared, {NOT_COMPARED[section]}")
        return
    say(f"{section}: {'as recorded' if not different else f'{len(different)} differ'}")
    for name, (was, now) in list(different.items())[:AT_MOST]:
        say(f"  {name}: {was} -> {now}")
    if len(different) > AT_MOST:
        say(f"  and {len(different) - AT_MOST} more")
