"""Compute the first steps of a run again and name the first step, and the first number, that differs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.commands.train import set_torch_up
from trainer.data.fingerprint import counted
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
    set_torch_up()
    from trainer.comparison import told
    from trainer.reproduction import reproduce
    from trainer.run.rundir import RunDir

    say = print if os.environ.get("RANK", "0") == "0" else lambda line: None
    output_dir = RunDir(args.output_dir) if args.output_dir else None
    found = reproduce(RunDir(args.folder), args.steps, output_dir, say)
    lines = [line for section, different in found.inputs.items() for line in _section(section, different)]
    if found.records:
        lines += told(f"records: {counted(found.records)}", found.records, AT_MOST)
    if found.first_step is None:
        exactly = "equal to the bit" if found.relative == 0 else f"equal to {found.relative:g} of their size"
        lines.append(f"steps 1 to {found.steps}: {exactly}")
    else:
        title = f"step {found.first_step} is the first that differs: {', '.join(found.quantities)}"
        quantities = {name: f"{was!r} -> {now!r}" for name, (was, now) in found.quantities.items()}
        lines += told(title, quantities, len(quantities))
        explained = {**found.inputs, **found.circumstances}
        lines.append("what may explain it:" if any(explained.values()) else UNEXPLAINED)
        lines += [line for section, different in found.circumstances.items() for line in _section(section, different)]
    for line in lines:
        say(line)
    return 0 if found.equal else 1


def _section(name: str, different: dict[str, tuple[Any, Any]] | None) -> Iterable[str]:
    from trainer.comparison import told

    if different is None:
        return [f"{name}: not compared, {NOT_COMPARED[name]}"]
    title = f"{name}: {'as recorded' if not different else f'{len(different)} differ'}"
    return told(title, {key: f"{was} -> {now}" for key, (was, now) in different.items()}, AT_MOST)
