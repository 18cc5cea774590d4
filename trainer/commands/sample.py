"""Draw pictures with the weights of a run: its EMA weights, if it has any."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from trainer.errors import UserError
from trainer.run.rundir import RunDir

EXAMPLE = 'difftrain sample --run runs/demo-001 --prompt "a large red circle on a white background" --output circle.png'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `sample` takes."""
    parser.add_argument("--run", required=True, type=Path, metavar="FOLDER", dest="folder", help="the run directory")
    parser.add_argument("--checkpoint", type=int, metavar="N", help="the step to use (default: the newest)")
    parser.add_argument("--prompt", required=True, action="append", dest="prompts", help="may be given several times")
    parser.add_argument("--seed", type=int, default=0, help="decides the starting noise (default 0)")
    parser.add_argument("--count", type=int, default=1, metavar="K", help="pictures per prompt (default 1)")
    parser.add_argument("--steps", type=int, default=20, help="network evaluations per picture (default 20)")
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance; 1 is off (default 5)")
    parser.add_argument("--current-weights", action="store_true", help="use the weights of the step, not their EMA")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="a PNG; several pictures make a grid"
    )


def run(args: argparse.Namespace) -> int:
    """Write the picture or grid: 0. Raises UserError if the run, the checkpoint or the output cannot be used."""
    config_file = RunDir(args.folder).resolved_config
    if not config_file.is_file():
        raise UserError("this is not a run directory", str(args.folder), f"{config_file.name} is missing")
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output {args.output}: the picture is a PNG", fix=f"name it {args.output.stem}.png")
    if not args.output.absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: there is no such folder", fix="make it first")
    if args.count < 1 or args.steps < 1 or not 0 <= args.guidance < math.inf:
        raise UserError("--count and --steps are at least 1, --guidance at least 0")
    from trainer.config_file import load_config
    from trainer.draw import draw

    step, grid = draw(
        load_config(config_file).config,
        args.folder,
        args.checkpoint,
        [prompt for prompt in args.prompts for _ in range(args.count)],
        args.seed,
        args.steps,
        args.guidance,
        averaged=not args.current_weights,
    )
    grid.save(args.output, "PNG")
    print(f"checkpoint-{step}, seed {args.seed}: {args.output}")
    return 0
