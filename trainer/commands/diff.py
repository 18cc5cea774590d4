"""Name what differs between two runs: config, environment, code, model, data, and the first step whose numbers do."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.data.fingerprint import counted

EXAMPLE = "difftrain diff runs/mine-001 runs/mine-002"
AT_MOST = 12  # lines a section


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `diff` takes."""
    parser.add_argument("a", type=Path, metavar="A", help="a run directory")
    parser.add_argument("b", type=Path, metavar="B", help="another one")


def run(args: argparse.Namespace) -> int:
    """A line for each difference: 0 if there is none, else 1. Raises UserError if one of them is no run."""
    from trainer.comparison import compare, told
    from trainer.run.rundir import RunDir

    found = compare(RunDir(args.a), RunDir(args.b))
    for section, different in found.sections.items():
        title = f"{section}: {'the same' if not different else f'{len(different)} differ'}"
        if section == "metrics":
            where = f"the same for {found.common_steps} steps" if found.first_step is None else "differ"
            title = f"metrics: {where}" + (f" first at step {found.first_step}" if found.first_step else "")
        shown = {name: f"{_short(one)} -> {_short(other)}" for name, (one, other) in different.items()}
        print(*told(title, shown, AT_MOST), sep="\n")
        if section == "data" and "fingerprint" in different:
            changed = found.records
            title = "not listed by both runs, so which differ is not known" if changed is None else counted(changed)
            records = {_short(key): what for key, what in (changed or {}).items()}
            print(*told(f"records: {title}", records, AT_MOST), sep="\n")
    return 0 if found.equal else 1


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
