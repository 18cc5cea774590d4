"""Train a model. `accelerate launch trainer/train.py` and `torchrun trainer/train.py` take the same options."""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path

from trainer.checkpoint import require_checkpoint
from trainer.config_file import load_config
from trainer.errors import UserError
from trainer.preflight import Preflight, preflight
from trainer.resume import refuse_second_run
from trainer.run.console import outliving_readers
from trainer.run.rundir import RunDir

EXAMPLE = "difftrain train --config configs/from_scratch.yaml --set train.max_steps=1000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `train` takes; `add_config_arguments` is shared with the other commands that read a config."""
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        default="none",
        metavar="WHAT",
        help="none (default): a new run; auto: go on if there is a checkpoint; latest: there must be one; or a path",
    )
    parser.add_argument(
        "--allow-change",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY",
        help="config keys that may differ from the checkpoint's although they change what a step computes",
    )
    parser.add_argument("--dry-run", action="store_true", help="do one real step, print what it needs, leave nothing")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that reads a config and writes into a run directory."""
    add_config_file_arguments(parser)
    parser.add_argument("--output-dir", metavar="FOLDER", help="the run directory; overrides train.output_dir")


def add_config_file_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that reads a config."""
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="a YAML config")
    parser.set_defaults(output_dir=None)  # `check` reads it, whether there is such an option or not
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        dest="overrides",
        help="override config values, for example train.max_steps=100 model.kind=tiny",
    )


def run(args: argparse.Namespace) -> int:
    """Train to the end: 0. Raises the RunEnd of every other ending."""
    if args.dry_run and args.resume != "none":
        raise UserError("--dry-run does the first step of a new run", fix="leave --resume out")
    checked, run_dir = check(args, new_run=args.resume == "none", writes=not args.dry_run)
    set_torch_up()
    gc.disable()  # imports make 650,000 objects that stay; looking for garbage among them is a third of the start-up
    try:
        if args.dry_run:
            from trainer.dry_run import dry_run

            dry_run(checked)
        else:
            from trainer.launch import launch

            with outliving_readers():
                launch(checked, run_dir, args.resume, args.allow_change)
    finally:
        gc.enable()
    return 0


def check(
    args: argparse.Namespace, new_run: bool, writes: bool = True, for_steps: bool = True
) -> tuple[Preflight, RunDir]:
    """Everything that can be refused before torch is imported; every rank of a node finds the same faults."""
    try:
        say = print if os.environ.get("RANK", "0") == "0" else lambda line: None
        loaded = load_config(args.config, args.overrides, args.output_dir, say)
        run_dir = RunDir(loaded.config.train.output_dir or "")
        if writes:
            run_dir.check_writable()
        if writes and new_run:
            refuse_second_run(run_dir)
        if new_run and loaded.config.model.init_from is not None:
            require_checkpoint(loaded.config.model.init_from, loaded.where("model.init_from"))
        refuse_a_lonely_launch()
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        return preflight(loaded, rank, world_size, for_steps), run_dir
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # the first rank of this node says it, and ends the job
        raise


def refuse_a_lonely_launch() -> None:
    """Raise UserError where `accelerate launch` was asked for several CPU processes and silently started this one.

    It does so for a MULTI_CPU config and for `--cpu --num_processes N`: it names a master, but sets no WORLD_SIZE.
    """
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes without a GPU, but starts only one that way",
            "the launch command",
            "accelerate launch --config_file accelerate_configs/cpu.yaml starts two, or use torchrun",
        )


def set_torch_up() -> None:
    """What torch reads once, when it is imported, of the environment; what the user has set there stays.

    GPU memory grows in segments that can be extended: batches of several shapes would leave gaps that none fills. CPU
    threads sleep soon when they wait for each other. By default they spin for milliseconds. Alone on the machine that
    costs nothing, but as soon as anything else wants a core, each spins through the time slice that the other one needs
    (docs/performance.md).
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
