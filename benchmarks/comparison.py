"""What the benchmarks share: their sizes, and the machine, versions and command that stand beside their numbers."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.run.environment import cpu_facts, nvidia_gpus, utc_time

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "difftrain")


def add_step_arguments(parser: argparse.ArgumentParser, timed: str) -> None:
    """The sizes of a benchmark whose sets of `timed` (loops, runs) take turns of steps of the tiny model."""
    parser.add_argument("--sets", type=int, default=8, help=f"times that the {timed} are built anew (default 8)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each in a set (default 8)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn (default 20)")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (default 8)")
    parser.add_argument("--image-size", type=int, default=64, help="pixels; latents are an eighth (default 64)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, every ratio included")


@contextmanager
def own_caches(folder: Path) -> Iterator[None]:
    """Within it nothing is remembered in the user's cache folders, and nothing from there is used."""
    before = dict(os.environ)
    os.environ |= {"XDG_CACHE_HOME": str(folder / "xdg"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def vae_of(chosen: str, folder: Path) -> str:
    """What `model.vae` is for a VAE of the command line: channels of one (`32-64-128-128`), or what it may be anyway.

    One with channels has random weights and Stable Diffusion's shape, and is written to a diffusers folder in `folder`.
    """
    if not re.fullmatch(r"\d+(-\d+)+", chosen):
        return chosen
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    channels = [int(each) for each in chosen.split("-")]
    make: Any = AutoencoderKL  # its annotations ask for tuples of one
    vae = make(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    )
    vae.save_pretrained(folder / chosen)
    return str(folder / chosen)


def circumstances(arguments: Sequence[str]) -> dict[str, Any]:
    """Where, when and how a result came about, for the JSON file."""
    cpu, (gpus, _) = cpu_facts(), nvidia_gpus()
    parts = [f"{cpu['usable_cores'] or cpu['logical_cores']} cores of {cpu['model'] or 'an unknown CPU'}"]
    parts += [f"{cpu['memory_bytes'] / 2**30:.0f} GiB", *(str(gpu["name"]) for gpu in gpus), sys.platform]
    versions = {name: version_of(name) for name in PACKAGES}
    return {
        "machine": ", ".join(parts),
        "versions": {"python": ".".join(map(str, sys.version_info[:3])), **versions},
        "date": utc_time(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
    }


def version_of(name: str) -> str:
    """The version of a package; `not installed` if there is no record of one, as of a checkout that was only copied."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def conclude(result: dict[str, Any], arguments: Sequence[str], file: Path | None) -> None:
    """Print the circumstances under the table, and write both to `file` as JSON.

    A `result` with `load_at_start`, as `os.getloadavg` gives it, is told with the load now beside it.
    """
    facts = circumstances(arguments)
    print()
    if "load_at_start" in result:
        facts["load_at_end"] = os.getloadavg()
        print(f"load      {result['load_at_start'][0]:.1f} at the start, {facts['load_at_end'][0]:.1f} at the end")
    print(f"machine   {facts['machine']}")
    print(f"versions  {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}")
    print(f"date      {facts['date']}")
    print(f"command   {facts['command']}")
    if file is not None:
        file.write_text(json.dumps({**facts, **result}, indent=2) + "\n", encoding="utf-8")
