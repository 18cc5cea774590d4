"""Print the JSON Schema of the config, for editors, or its reference page."""

from __future__ import annotations

import argparse

EXAMPLE = "difftrain schema > difftrain.schema.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option: which of the two."""
    parser.add_argument("--markdown", action="store_true", help="print docs/config.md instead")


def run(args: argparse.Namespace) -> int:
    """Print it: 0."""
    from trainer.config_reference import json_schema, markdown

    print(markdown() if args.markdown else json_schema(), end="")
    return 0
