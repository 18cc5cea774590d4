"""Encode every picture and caption of a config's data once, so that runs train from the cache."""

from __future__ import annotations

import argparse

from trainer.commands.train import add_config_file_arguments, check, set_torch_up

EXAMPLE = "difftrain cache --config configs/sd15_finetune.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cache` takes."""
    add_config_file_arguments(parser)
    parser.add_argument("--verify", action="store_true", help="read every byte that is kept, and encode nothing")


def run(args: argparse.Namespace) -> int:
    """Fill the cache: 0; with `--verify` 1 if a file is damaged. Raises UserError for what a run would refuse.

    Several ranks share the work: `torchrun --nproc-per-node 2 -m trainer cache --config C`.
    """
    checked, _ = check(args, new_run=False, writes=False, for_steps=False)
    set_torch_up()
    from trainer.cache_job import fill, verify

    if not args.verify:
        fill(checked)
        return 0
    looked_at = faults = 0
    for path, fault in verify(checked, print):
        looked_at, faults = looked_at + 1, faults + (fault is not None)
        if fault is not None:
            print(f"CHANGED  {path}  {fault}")
    fix = "; delete those, and the next run encodes their entries anew" if faults else ""
    print(f"{looked_at} files looked at, {faults} damaged{fix}")
    return 1 if faults else 0
