"""Train the built-in demo: small networks on procedural pictures of shapes. No download; a CPU is enough."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.commands import train
from trainer.errors import UserError
from trainer.run.rundir import RunDir

EXAMPLE = "difftrain demo --quick"
CONFIG = Path(__file__).resolve().parent.parent.parent / "configs" / "demo.yaml"
QUICK = [
    "train.max_steps=150",
    "validation.every_steps=150",
    "lr.warmup_steps=20",
    "hooks=[{kind: adherence, prompts: 24, sampler_steps: 10}]",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `demo` takes."""
    parser.add_argument(
        "--quick", action="store_true", help="under 90 seconds: shows that it runs, not how well it learns"
    )
    parser.add_argument("--output-dir", metavar="FOLDER", help="the run directory (default: a new runs/demo-NNN)")
    parser.add_argument(
        "--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", dest="overrides", help="as `train --set`"
    )


def run(args: argparse.Namespace) -> int:
    """Train, then print where the sample grid and the adherence report are: 0."""
    if not CONFIG.is_file():
        raise UserError("the demo's config is not here", str(CONFIG), "run the demo from a checkout: pip install -e .")
    output_dir = args.output_dir or str(new_folder(Path("runs"), "demo"))
    overrides = (QUICK if args.quick else []) + args.overrides
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    options = parser.parse_args(["--config", str(CONFIG), "--output-dir", output_dir])
    options.overrides = overrides
    code = train.run(options)
    folder = RunDir(output_dir)
    for name, path in {
        "sample grid": folder.first_and_last,
        "every validation": folder.progress,
        "adherence": folder.adherence,
    }.items():
        if path.is_file():
            print(f"{name + ':':18}{path}")
    return code


def new_folder(parent: Path, name: str) -> Path:
    """The first of name-001, name-002, ... that does not exist yet."""
    number = 1
    while (folder := parent / f"{name}-{number:03d}").exists():
        number += 1
    return folder
