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
    from trainer.comparison import compare
    from trainer.run.rundir import RunDir

    found = compare(RunDir(args.a), RunDir(args.b))
    for section, different in found.sections.items():
        title = f"{section}: {'the same' if not different else f'{len(different)} differ'}"
        if section == "metrics":
            where = f"the same for {found.common_steps} steps" if found.first_step is None else "differ"
            title = f"metrics: {where}" + (f" first at step {found.first_step}" if found.first_step else "")
        print(title)
        for name, (one, other) in list(different.items())[:AT_MOST]:
            print(f"  {name}: {_short(one)} -> {_short(other)}")
        if len(different) > AT_MOST:
            print(f"  and {len(different) - AT_MOST} more")
        if section == "data" and "fingerprint" in different:
            _print_records(found.records)
    return 0 if found.equal else 1


def _print_records(changed: dict[str, str] | None) -> None:
    print(
        f"records: {'not listed by both runs, so which differ is not known' if changed is None else counted(changed)}"
    )
    for key, what in list((changed or {}).items())[:AT_MOST]:
        print(f"  {_short(key)}: {what}")
    if changed and len(changed) > AT_MOST:
        print(f"  and {len(changed) - AT_MOST} more")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
