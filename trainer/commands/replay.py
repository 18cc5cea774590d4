"""Feed one recorded step again and print every sample's loss, time, file and caption: the picture behind a spike."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from trainer.commands.train import set_torch_up

EXAMPLE = "difftrain replay runs/mine --step 1234"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `replay` takes."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the step, 1-based as in metrics.jsonl")


def run(args: argparse.Namespace) -> int:
    """A line for each sample, what is not finite first, then the highest loss: 0.

    Raises UserError if the step is not on record.
    """
    set_torch_up()
    from trainer.replay import replay
    from trainer.run.rundir import RunDir

    found = replay(RunDir(args.folder), args.step, print)
    samples = sorted(found.samples, key=lambda sample: (math.isfinite(sample.loss), -sample.loss))
    width = max(len("record"), *(len(sample.key) for sample in samples))
    print(f"{'loss':>10}  {'t':>7}  {'slot':>10}  {'record':{width}}  caption")
    for sample in samples:
        caption = sample.caption or "(empty)"
        print(f"{sample.loss:10.5g}  {sample.t:7.4f}  {sample.slot:10}  {sample.key:{width}}  {caption}")
    print(
        f"step {args.step}: mean {found.loss:.7g} of {len(samples)} samples; recorded loss "
        f"{_shown(found.line['loss'])}, gradient norm {_shown(found.line['grad_norm'])}"
    )
    return 0


def _shown(number: float | None) -> str:
    return "not finite" if number is None else f"{number:.7g}"
