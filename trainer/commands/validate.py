"""Check a config and write env.json, config.resolved.yaml and run_manifest.json, without training or the network."""

from __future__ import annotations

import argparse
import sys

from trainer.commands.train import add_config_arguments, check

EXAMPLE = "difftrain validate --config configs/smoke_text2image.yaml --output-dir runs/smoke"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `validate` takes."""
    add_config_arguments(parser)
    parser.add_argument("--deterministic", action="store_true", help="as --set train.deterministic=true")


def run(args: argparse.Namespace) -> int:
    """Write the three files: 0. Raises UserError with all faults of the config, or the first of its data or model."""
    if args.deterministic:
        args.overrides = [*args.overrides, "train.deterministic=true"]
    checked, run_dir = check(args, new_run=True)
    from trainer.run.environment import snapshot
    from trainer.run.manifest import Manifest
    from trainer.run.opening import write_opening_files

    facts = checked.manifest_facts([sys.argv[0], *sys.argv[1:]])
    run_dir.create()
    Manifest(run_dir.manifest).validated(facts)  # first: it refuses a folder where a run was started
    write_opening_files(run_dir, snapshot(), checked.config.to_yaml())
    for line in checked.equations():
        print(line)
    unknown = [name for name in ("revision", "files") if facts["model"][name] is None]
    if unknown and "pretrained" in type(checked.config.model).model_fields:
        print(f"note   not resolved without the network, null in the manifest: model {' and '.join(unknown)}")
    print(f"valid: {run_dir.resolved_config}, {run_dir.environment}, {run_dir.manifest}")
    return 0
