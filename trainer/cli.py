"""The command `difftrain`: subcommands by name, each imported only when it is asked for help or run."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from trainer import __version__
from trainer.errors import RunEnd, UserError

# What `difftrain --help` says, so that it need not import a command to describe it; a test compares the two.
COMMANDS = {
    "demo": "train the built-in demo: no download, a CPU is enough",
    "train": "train a model",
    "validate": "check a config and write the three reproducibility files, without training",
    "cache": "encode the pictures and captions of a config once, for runs to train from",
    "audit": "read every record and report each defect, duplicate and cut caption",
    "stop": "ask a running job to finish its step, save and end",
    "save": "ask a running job for a checkpoint now",
    "verify": "re-hash a run's checkpoints, data and model against its manifest",
    "reproduce": "compute a run's first steps again and name the first that differs",
    "diff": "name what differs between two runs",
    "replay": "feed one recorded step again: every sample's loss, time and file",
    "sample": "draw pictures with the weights of a run",
    "schema": "print the config's JSON Schema, or its reference page",
    "doctor": "check this machine: versions, GPUs, disk, network, determinism settings",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command in `argv` (default: the process's own arguments)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="difftrain",
        description="Trains text-to-image latent diffusion models. A run is a function of its config and its step.",
        epilog=f"commands:\n{listing}\n\ndifftrain COMMAND --help says more, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"difftrain {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS)
    args = parser.parse_args(argv[:1])
    command = importlib.import_module(f"trainer.commands.{args.command}")
    parser = argparse.ArgumentParser(
        prog=f"difftrain {args.command}",
        description=command.__doc__,
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return guarded(lambda: command.run(parser.parse_args(argv[1:])))


def guarded(action) -> int:
    """The exit code of `action`; an end that is meant for people is one message on stderr, from one rank per node."""
    try:
        return action()
    except RunEnd as end:
        with contextlib.suppress(OSError):  # nobody reads it: the exit code still tells
            _tell(end)
        if end.at_once:
            os._exit(end.exit_code)
        return end.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output left
        return 141


def _tell(end: RunEnd) -> None:
    rank = os.environ.get("RANK", "0")
    if os.environ.get("LOCAL_RANK", "0") != "0" and not end.of_one_rank:
        return
    sys.stdout.flush()
    word = "error" if end.exit_code == UserError.exit_code else end.state
    title = f"rank {rank}" if end.of_one_rank and rank != "0" else word
    print(f"{title}: {end}", file=sys.stderr, flush=True)
    if end.traceback:
        print(end.traceback, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
