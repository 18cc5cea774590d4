"""Caching: what it costs to fill a cache, to find it filled, and to train from it.

Claims: a build runs at 0.85 or more of the speed of a bare loop that encodes the same decoded pictures and captions in
batches; a start that finds all of them kept takes 0.02 or less of a build; a step from the cache waits on data for 2 %
of its time or less. Every round is two processes, as two starts of a run are. How to read the result: README.md in this
folder.

    OMP_NUM_THREADS=1 python benchmarks/caching.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comparison import conclude, own_caches, vae_of
from loading import make_pictures
from startup import DIFFTRAIN, environment

from trainer.run.metrics import read as read_metrics
from trainer.run.rundir import RunDir

BATCH = 32  # pictures that the bare loop encodes together, as a build does
WARM_UP = 20  # steps that are not looked at
LOADED = 100  # batches whose loading alone is timed

# A complete config: the tiny UNet and text encoder, and a VAE from a folder.
CONFIG = """
model: {{kind: tiny, vae: {vae}}}
data: {{kind: imagefolder, data_root: {pictures}, image_size: {size}, num_workers: {workers}, center_crop: true}}
cache: {{dir: {cache}}}
train: {{max_steps: {steps}, global_batch_size: 8}}
objective: {{kind: epsilon}}
lr: {{kind: constant, peak: 1e-4, warmup_steps: 0}}
ema: {{}}
"""


def start(config: Path, compare: bool, seed: int) -> dict[str, Any]:
    """One start of a run up to its first step, in this process: seconds of its parts.

    With `compare` the networks are warm, and a bare loop encodes the same decoded pictures and captions twice, before,
    after or around the build.
    """
    import torch

    from trainer.config_file import load_config
    from trainer.data.transforms import View, as_float, fit, to_pixels
    from trainer.encoding import Encoders, encoded
    from trainer.preflight import preflight
    from trainer.runtime import Runtime

    loaded = load_config(config, say=lambda line: None)
    began = time.perf_counter()
    checked = preflight(loaded, 0, 1)
    seconds: dict[str, Any] = {"preflight": time.perf_counter() - began}
    runtime = Runtime(loaded.config.train.precision, loaded.config.train.deterministic)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    family, cache = loaded.config.model, loaded.config.cache
    assert cache is not None, "a config with a cache"
    components = family.load(loaded.config.train.seed)
    encoders = Encoders(components, runtime.device, family.vae_precision)
    roll = checked.seen.call.roll

    def build() -> None:
        encoded(checked, cache, roll, components, encoders, runtime)

    turns: dict[str, Callable[[], None]] = {"encode": build}
    order = ["encode"]
    if compare:
        side = loaded.config.data.image_size
        centre = View(side, side, 0.5, 0.5, flip=False)
        images = map(checked.records.image, range(len(checked.records)))
        pictures = [as_float(to_pixels(fit(image, centre))) for image in images]
        pixels = [torch.stack(pictures[first : first + BATCH]) for first in range(0, len(pictures), BATCH)]
        captions = list(dict.fromkeys(each for record in checked.records for each in record.captions))
        vae, text_encoder = encoders.vae(), encoders.text_encoder()
        vae.posterior(pixels[0])

        @torch.no_grad()
        def bare() -> None:
            for batch in pixels:
                posterior = vae.vae.encode(batch).latent_dist  # pyright: ignore
                torch.stack((posterior.mean, posterior.std), dim=1).half()
            for first in range(0, len(captions), BATCH):
                tokens, _ = family.tokenize(components.tokenizer, captions[first : first + BATCH])
                family.encode_text(text_encoder, tokens).half()

        turns |= {"bare": bare, "bare again": bare}
        order = random.Random(seed).sample(list(turns), len(turns))
    for name in order:
        began = time.perf_counter()
        turns[name]()
        seconds[name] = time.perf_counter() - began
    runtime.close()
    return seconds


def in_a_fresh_process(args: argparse.Namespace, config: Path, compare: bool, seed: int) -> dict[str, float]:
    """What `start` gives in a new interpreter."""
    command = [sys.executable, __file__, "--child", str(config), str(int(compare)), str(seed)]
    done = subprocess.run(
        command, env=environment() | {"OMP_NUM_THREADS": str(args.threads)}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def write_config(args: argparse.Namespace, file: Path, vae: str, workers: int) -> Path:
    """The config of a run on the pictures beside `file`, with its cache beside it too."""
    text = CONFIG.format(
        vae=vae,
        pictures=file.parent / "pictures",
        size=args.image_size,
        workers=workers,
        cache=file.parent / "cache",
        steps=WARM_UP + args.steps,
    )
    file.write_text(text, encoding="utf-8")
    return file


def measure_builds(args: argparse.Namespace, folder: Path, vae: str) -> list[dict[str, dict[str, float]]]:
    """For each round the seconds of a first start, with the bare loops, and of one that finds all of it kept."""
    config, found = write_config(args, folder / "build.yaml", vae, args.workers), []
    for number in range(args.rounds):
        for stale in (folder / "cache", folder / "xdg"):
            shutil.rmtree(stale, ignore_errors=True)
        first = in_a_fresh_process(args, config, compare=True, seed=number)
        again = in_a_fresh_process(args, config, compare=False, seed=number)
        found.append({"first": first, "again": again})
        print(f"builds: round {number + 1} of {args.rounds}", file=sys.stderr)
    return found


def compare_builds(rounds: list[dict[str, dict[str, float]]], pictures: int) -> dict[str, Any]:
    """Speeds over that of the bare loop, and times of the second start over those of the first; round by round."""

    def over(part: Callable[[dict[str, float]], float]) -> list[float]:
        return [part(each["again"]) / part(each["first"]) for each in rounds]

    firsts = [each["first"] for each in rounds]
    return {
        "images_per_second": {
            name: pictures / statistics.median(first[name] for first in firsts)
            for name in ("bare", "bare again", "encode")
        },
        "speed": {
            "bare again": [first["bare"] / first["bare again"] for first in firsts],
            "build": [first["bare"] / first["encode"] for first in firsts],
            "looks and build": [first["bare"] / (first["preflight"] + first["encode"]) for first in firsts],
        },
        "rebuild": {
            "encode": over(lambda start: start["encode"]),
            "looks and encode": over(lambda start: start["preflight"] + start["encode"]),
        },
        "seconds": {
            when: {part: statistics.median(each[when][part] for each in rounds) for part in ("preflight", "encode")}
            for when in ("first", "again")
        },
    }


def measure_waits(args: argparse.Namespace, folder: Path, vae: str) -> dict[int, dict[str, float]]:
    """By number of workers: what a step from the filled cache takes, its wait on data, and what the loader alone does.

    Each is a run of its own.
    """
    found = {}
    for workers in args.train_workers:
        config, run = write_config(args, folder / f"train{workers}.yaml", vae, workers), folder / f"run{workers}"
        command = [*DIFFTRAIN, "train", "--config", str(config), "--output-dir", str(run)]
        one = environment() | {"OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, env=one, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        timing = [line["timing"] for line in read_metrics(RunDir(run).metrics)[WARM_UP:]]
        steps, waits = ([each[name] for each in timing] for name in ("step_seconds", "data_wait_seconds"))
        again = [sys.executable, __file__, "--load", str(config)]
        loaded = subprocess.run(again, env=one, capture_output=True, text=True)
        if loaded.returncode:
            raise SystemExit(loaded.stderr)
        found[workers] = {
            "step_milliseconds": 1000 * statistics.fmean(steps),
            "wait_milliseconds": 1000 * statistics.fmean(waits),
            "wait": sum(waits) / sum(steps),
            **json.loads(loaded.stdout.splitlines()[-1]),
        }
    return found


def load(config: Path) -> dict[str, float]:
    """Samples a second that the loader takes from the cache while no step disturbs it or waits for it."""
    import torch

    from trainer.config_file import load_config
    from trainer.preflight import preflight
    from trainer.runtime import Runtime
    from trainer.training import assemble

    loaded = load_config(config, say=lambda line: None)
    checked, runtime = preflight(loaded, 0, 1), Runtime(loaded.config.train.precision, False)
    torch.set_num_threads(1)
    batches = assemble(checked, runtime, RunDir(config.parent / "none"), None).batches(0, 10**6)
    for _ in range(WARM_UP):
        next(batches)
    began = time.perf_counter()
    for _ in range(LOADED):
        next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return {"loader_samples_per_second": LOADED * checked.topology.micro_batch / seconds}


def spread(values: Sequence[float]) -> str:
    """The median of `values` and their range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def print_builds(name: str, row: dict[str, Any]) -> None:
    """The table of one VAE."""
    rates = ", ".join(f"{way} {rate:.1f}" for way, rate in row["images_per_second"].items())
    print(f"VAE {name}: images/s {rates}")
    for what, values in row["speed"].items():
        print(f"  {what + ', speed over bare':52}{spread(values)}")
    for what, values in row["rebuild"].items():
        print(f"  {'nothing new: ' + what + ', time over the first':52}{spread(values)}")
    for when, parts in row["seconds"].items():
        print(f"  {when + ', s':52}{', '.join(f'{part} {seconds:.3f}' for part, seconds in parts.items())}")
    for workers, wait in row.get("training", {}).items():
        print(
            f"  a step from the cache, {workers} workers: {wait['step_milliseconds']:.1f} ms, of which it waits "
            f"{wait['wait_milliseconds']:.2f} ms, {100 * wait['wait']:.2f} %; the loader alone "
            f"{wait['loader_samples_per_second']:.0f} samples/s"
        )
    print(flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the JSON: 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--child"]:
        print(json.dumps(start(Path(arguments[1]), arguments[2] == "1", int(arguments[3]))))
        return 0
    if arguments[:1] == ["--load"]:
        print(json.dumps(load(Path(arguments[1]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of starts (default 3)")
    parser.add_argument("--pictures", type=int, default=512, help="of the folder (default 512)")
    parser.add_argument("--picture-size", type=int, default=96, help="their sides, pixels (default 96)")
    parser.add_argument("--image-size", type=int, default=64, help="of a sample, pixels (default 64)")
    parser.add_argument(
        "--vaes",
        nargs="+",
        default=["builtin", "32-64-128-128"],
        help="`builtin`, or channels of one with random weights (default builtin 32-64-128-128)",
    )
    parser.add_argument("--workers", type=int, default=1, help="of the loader in a build (default 1)")
    parser.add_argument("--train-workers", type=int, nargs="*", default=[0, 1], help="in training (default 0 1)")
    parser.add_argument("--steps", type=int, default=100, help=f"of training after {WARM_UP} (default 100)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, every round included")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in ("json", "folder")}
    result |= {"load_at_start": os.getloadavg(), "vae": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as name, own_caches(Path(name)):
        folder = Path(name)
        make_pictures(folder / "pictures", args.pictures, args.picture_size, args.picture_size)
        for chosen in args.vaes:
            vae = vae_of(chosen, folder)
            rounds = measure_builds(args, folder, vae)
            row = {**compare_builds(rounds, args.pictures), "rounds": rounds}
            row["training"] = measure_waits(args, folder, vae)
            result["vae"][chosen] = row
            for stale in folder.glob("run*"):
                shutil.rmtree(stale)
            print_builds(chosen, row)
    of = f"{args.pictures} JPEGs of {args.picture_size} px to {args.image_size} px; {args.rounds} rounds"
    print(f"{of}, {args.threads} thread and {args.workers} worker in a build; files in the page cache")
    conclude(result, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
