"""A step of the demo on a CPU: what each thing that was done to make it fast is worth.

Every run is a process of its own that trains `configs/demo.yaml` for a few steps, in shuffled rounds, with one thing
taken away. See README.md in this folder for how to read the result.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from comparison import conclude

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("validation=null", "hooks=[]", "data.num_images=256", "train.log_every=1", "checkpoint.every_steps=100000")

# What is taken away -> config overrides.
VARIANTS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "as it is, again": (),
    "encoded at every step": ("cache=null",),
    "77 tokens a prompt": ("model.prompt_tokens=77",),
    "heads of 8 channels": ("model.unet_head_width=8",),
}


def step_seconds(overrides: Sequence[str], steps: int, folder: Path) -> float:
    """The median wall time of the steps after the first five."""
    arguments = ["train", "--config", str(ROOT / "configs" / "demo.yaml"), "--output-dir", str(folder)]
    arguments += ["--set", *SHORT, f"train.max_steps={steps + 5}", *overrides]
    subprocess.run([sys.executable, "-m", "trainer", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median(line["timing"]["step_seconds"] for line in lines[5:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each variant (default 5)")
    parser.add_argument("--steps", type=int, default=30, help="steps each of them times (default 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    args = parser.parse_args()

    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round in range(args.rounds):
        order = list(VARIANTS)
        random.Random(round).shuffle(order)
        for name in order:
            with tempfile.TemporaryDirectory() as folder:
                seconds[name].append(step_seconds(VARIANTS[name], args.steps, Path(folder) / "run"))
        print(f"round {round + 1} of {args.rounds}", file=sys.stderr)
    plain = seconds["as it is"]
    ratios = {name: [each / base for each, base in zip(times, plain, strict=True)] for name, times in seconds.items()}
    print(f"{'':30}{'ms a step':>12}{'over as it is':>16}   range over the rounds")
    for name, times in seconds.items():
        low, middle, high = min(ratios[name]), statistics.median(ratios[name]), max(ratios[name])
        print(f"{name:30}{1000 * statistics.median(times):12.0f}{middle:16.2f}   {low:.2f} to {high:.2f}")
    conclude({"step_seconds": seconds, "ratios": ratios}, sys.argv[1:], args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
