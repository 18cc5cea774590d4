"""Measure the prompt adherence of a run again: with other guidance or steps, or other words for the same things.

python scripts/measure_adherence.py --run runs/demo-001
python scripts/measure_adherence.py --run runs/demo-001 --guidance 1 2 3 5
python scripts/measure_adherence.py --run runs/demo-001 --wording all --grid other_words.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from trainer.adherence import asked_of, pictures, shares_right, table
from trainer.cli import guarded
from trainer.config_file import load_config
from trainer.data.shape_reading import read
from trainer.data.sources.shapes import Combination, Shapes
from trainer.draw import sampler_of
from trainer.errors import UserError
from trainer.grid import labelled_grid
from trainer.run.rundir import RunDir

SYNONYMS = {
    "small": "tiny",
    "large": "huge",
    "red": "scarlet",
    "orange": "amber",
    "yellow": "golden",
    "green": "emerald",
    "cyan": "turquoise",
    "blue": "navy",
    "purple": "violet",
    "pink": "rosy",
    "circle": "disc",
    "square": "box",
    "triangle": "wedge",
    "star": "asterisk",
    "cross": "plus",
    "ring": "hoop",
}
WORDINGS: dict[str, Callable[[Combination], str]] = {
    "caption": lambda c: c.caption,
    "reordered": lambda c: f"on a {c.background} background, a {c.shape}, {c.colour} and {c.size}",
    "words-only": lambda c: f"{c.shape} {c.background} {c.size} {c.colour}",
    "embedded": lambda c: f"a very nice photo of {c.caption}",
    "synonyms": lambda c: (
        f"a {SYNONYMS[c.size]} {SYNONYMS[c.colour]} {SYNONYMS[c.shape]} on a {c.background} background"
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="a run directory of a config with `data.kind: shapes`")
    parser.add_argument("--checkpoint", type=int, help="the step to use (default: the newest)")
    parser.add_argument("--prompts", type=int, default=96, help="of seen combinations, and as many of held-out ones")
    parser.add_argument("--seed", type=int, default=0, help="decides the starting noise of each prompt")
    parser.add_argument("--steps", type=int, nargs="+", default=[25], help="network evaluations per picture")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0], help="classifier-free guidance scales")
    parser.add_argument("--wording", choices=[*WORDINGS, "all"], default="caption", help="how the prompts say it")
    parser.add_argument("--grid", type=Path, help="a PNG that gets the first eight pictures of each wording")
    arguments = parser.parse_args()
    return guarded(lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> int:
    config_file = RunDir(arguments.run).resolved_config
    if not config_file.is_file():
        raise UserError("this is not a run directory", str(arguments.run), f"{config_file.name} is missing")
    config = load_config(config_file).config
    if not isinstance(config.data, Shapes):
        raise UserError("adherence is measured on `shapes` alone", str(config_file), "use the run of such a config")
    step, sampler, runtime = sampler_of(config, arguments.run, arguments.checkpoint, 1, 1.0, averaged=True)
    rows, shown, labels = {}, [], []
    for wording in WORDINGS if arguments.wording == "all" else [arguments.wording]:
        for steps, guidance in ((s, g) for s in arguments.steps for g in arguments.guidance):
            drawing = replace(sampler, steps=steps, guidance=guidance, at_once=32)
            for group, captions in asked_of(config.data, arguments.prompts).items():
                asked = [replace(each, prompt=WORDINGS[wording](each.meant)) for each in captions]
                with runtime.autocast():
                    drawn = pictures(drawing, asked, arguments.seed)
                name = group.replace("_", " ") if wording == "caption" else f"{group.replace('_', ' ')}, {wording}"
                rows[f"{name}, {steps} steps, guidance {guidance:g}"] = shares_right(asked, list(map(read, drawn)))
                if group == "seen":
                    shown, labels = [*shown, *drawn[:8]], [*labels, *(each.prompt for each in asked[:8])]
    print(f"{arguments.run} at step {step}, {arguments.prompts} prompts a row\n{table(rows)}")
    if arguments.grid is not None:
        labelled_grid(shown, labels, f"{arguments.run.name} at step {step}", columns=8).save(arguments.grid, "PNG")
        print(arguments.grid)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
