"""Roofline: what a GPU should do with a training step, COMPUTED from bytes, arithmetic and launches, not measured.

The step of one micro batch (UNet forward and backward, clipping, AdamW, averages; latents and text from a cache) runs
on the meta device, so no GPU is needed. See README.md in this folder for how to read the result.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import conclude
from counting import PRODUCTS, Autocast, Counting, Op
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from fusion import fused
from networks import TOKENS, network
from torch.utils.checkpoint import checkpoint

from trainer.ema import Ema, EmaSpec
from trainer.models.unet_clip import UNetClip

LAUNCH_SECONDS = 2.5e-6  # from the start of one kernel to that of the next, however small: assumed


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do, and the fractions of it that this assumes a kernel to reach."""

    name: str
    flops: float  # a second, bf16 with sums in fp32, dense
    bytes: float  # a second
    products: float  # of `flops`, in convolutions and linear layers
    attention: float  # of `flops`, in flash attention, forward and backward
    memory: float = 0.9  # of `bytes`: what copies reach

    def seconds(self, op: Op) -> float:
        """The longest of what its arithmetic, its bytes and its launches take."""
        reached = self.flops * (self.attention if op.part == "attention" else self.products)
        return max(op.padded_flops / reached, op.bytes / (self.bytes * self.memory), op.launches * LAUNCH_SECONDS)


GPUS = (
    # NVIDIA's data sheet (989 is without sparsity). A large product reaches 790 (MLPerf's logs of Stable Diffusion);
    # those of a UNet are smaller: 600 is assumed. FlashAttention-2 reaches 0.35 of an H100, version 3 up to 0.75
    # forward with heads of 128 (Shah et al. 2024); cuDNN's, which torch takes here, with heads of 64: 0.4 is assumed.
    Gpu("H200", 989e12, 4.8e12, products=0.61, attention=0.4),
    # NVIDIA's Ada white paper, appendix A. Slower tensor cores are easier to feed: 0.8 and 0.6 are assumed.
    Gpu("RTX 4090", 165.2e12, 1.008e12, products=0.8, attention=0.6),
)


@dataclass(frozen=True)
class Option:
    """Settings of the trainer, as they stand under `train:`."""

    name: str
    norms: torch.dtype = torch.float32
    channels_last: bool = False
    compiled: bool = False


OPTIONS = (
    Option("as it is"),
    Option("norm_precision: bf16", torch.bfloat16),
    Option("channels_last", channels_last=True),
    Option("norms bf16, channels_last", torch.bfloat16, True),
    Option("compile: blocks", compiled=True),
    Option("compile, norms bf16", torch.bfloat16, compiled=True),
    Option("all three", torch.bfloat16, True, True),
)


@dataclass(frozen=True)
class Step:
    """A training step: its pictures, the number of weights, and all operations."""

    batch: int
    weights: int
    ops: Sequence[Op]

    def memory(self) -> int:
        """Bytes at the end of the forward: weights, moments and averages in fp32, and what the backward will read.

        What kernels need to work, what frees late, and pieces too small to use come on top.
        """
        needed = {value for op in self.ops if op.backward for value in op.reads}
        held = sum(size for op in self.ops if not op.backward for value, size in op.writes.items() if value in needed)
        return 4 * 4 * self.weights + held


def step(config: dict[str, Any], batch: int, pixels: int, option: Option, checkpointing: bool = False) -> Step:
    """One training step of a UNet with that config, on `batch` pictures of `pixels` a side."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
        latents = torch.empty(batch, config["in_channels"], pixels // 8, pixels // 8)
        text, time = torch.empty(batch, TOKENS, config["cross_attention_dim"]), torch.empty(batch, dtype=torch.long)
        # SDXL's: the pooled text of its second encoder, and sizes and crop.
        added = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
        skipped = torch.empty(())
    if option.channels_last:
        unet.to(memory_format=torch.channels_last)
    if checkpointing:
        # As diffusers does it, and what is computed again is under autocast, as torch's own would be.
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), Autocast(option.norms)))
        unet.enable_gradient_checkpointing(again)
    weights = dict(unet.named_parameters())
    ema = Ema(EmaSpec(), weights)
    counting = Counting(unet, UNetClip.blocks, option.channels_last)
    with counting:
        with Autocast(option.norms):
            pred = unet.train()(latents, time, text, added_cond_kwargs=added, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(pred, latents)
        counting.backward = True
        loss.backward()
        # As trainer/step.py, with the kernels that torch takes for it on a GPU, which it refuses on the meta device.
        gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
        assert len(gradients) == len(weights), "a weight without a gradient"
        with torch.no_grad(), counting.counted_as("clip"):
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # pyright: ignore
            factor = torch.clamp(1.0 / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        with torch.no_grad(), counting.counted_as("AdamW"):
            adamw(list(weights.values()), gradients)
        with counting.counted_as("EMA"):
            ema.update(weights, 0, skipped)
    count = sum(weight.numel() for weight in weights.values())
    return Step(batch, count, fused(counting.ops) if option.compiled else counting.ops)


def adamw(weights: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    """A step of torch's fused AdamW."""
    first, second = ([torch.empty_like(weight) for weight in weights] for _ in range(2))
    steps = [torch.empty((), device="meta") for _ in weights]
    betas: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999}
    rest: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01, "eps": 1e-8, "amsgrad": False, "maximize": False}
    torch._fused_adamw_(weights, gradients, first, second, [], steps, **betas, **rest)  # pyright: ignore


def summary(ops: Sequence[Op], batch: int) -> dict[str, Any]:
    """Sums over the operations, in bytes, FLOP and seconds, and images a second of each GPU."""
    seconds = {gpu.name: sum(map(gpu.seconds, ops)) for gpu in GPUS}
    return {
        "launches": sum(op.launches for op in ops),
        "bytes": sum(op.bytes for op in ops),
        "bytes_outside_products": sum(op.bytes for op in ops if op.part not in PRODUCTS),
        "flops": sum(op.flops for op in ops),
        "seconds": seconds,
        "images_per_second": {name: batch / each for name, each in seconds.items()},
    }


def by_part(ops: Sequence[Op], batch: int) -> dict[str, dict[str, Any]]:
    """The same for each part, the longest on the first GPU first."""
    parts: defaultdict[str, list[Op]] = defaultdict(list)
    for op in ops:
        parts[op.part].append(op)
    rows = {name: summary(part, batch) for name, part in parts.items()}
    return dict(sorted(rows.items(), key=lambda row: -row[1]["seconds"][GPUS[0].name]))


def row(name: str, result: dict[str, Any]) -> str:
    """A line of a table, of a whole step or of one of its parts."""
    whole = "memory_bytes" in result
    line = f"{name:38}{result['launches']:9,}{result['flops'] / 1e12:9.2f}{result['bytes'] / 1e9:9.1f}"
    line += f"{result['memory_bytes'] / 1e9:9.1f}" if whole else ""
    for gpu in GPUS:
        line += f"{result['seconds'][gpu.name] * 1e3:13.1f}"
        line += f"{result['images_per_second'][gpu.name]:10.1f}" if whole else ""
    return line


def heading(name: str, whole: bool) -> str:
    """The line above it."""
    columns = "".join(f"{f'{gpu.name} ms':>13}" + (f"{'images/s':>10}" if whole else "") for gpu in GPUS)
    return f"{name:38}{'launches':>9}{'TFLOP':>9}{'GB moved':>9}{'GB held':>9}"[: 74 if whole else 65] + columns


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print the tables, write the JSON: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sd15", "sd21", "sdxl"), default="sd15")
    parser.add_argument("--pixels", type=int, default=512, help="of a side of the pictures (default 512)")
    parser.add_argument("--batch", type=int, default=32, help="pictures of the micro batch (default 32)")
    parser.add_argument("--checkpointing", action="store_true", help="with train.gradient_checkpointing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, all parts of all options")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    config = network(args.model).unet
    print(
        "COMPUTED, not measured: a step of one micro batch, if every kernel is bound by arithmetic, bytes or launch\n"
    )
    results = {}
    print(heading("options under train:", whole=True))
    for option in OPTIONS:
        counted = step(config, args.batch, args.pixels, option, args.checkpointing)
        ops, held = counted.ops, counted.memory()
        results[option.name] = {**summary(ops, args.batch), "memory_bytes": held, "parts": by_part(ops, args.batch)}
        print(row(option.name, results[option.name]), flush=True)
    for name in (OPTIONS[0].name, OPTIONS[-1].name):
        print(f"\n{heading(f'{name}, by part', whole=False)}")
        for part, result in results[name]["parts"].items():
            print(row(part, result))
        outside = results[name]["bytes_outside_products"]
        print(f"outside convolutions, linear layers and attention: {outside / 1e9:.1f} GB")
    assumed = [asdict(gpu) for gpu in GPUS]
    print("\nassumed   " + f"a launch takes {LAUNCH_SECONDS * 1e6:.1f} us or more")
    for gpu in GPUS:
        products, attention = gpu.flops * gpu.products / 1e12, gpu.flops * gpu.attention / 1e12
        speed = gpu.bytes * gpu.memory / 1e12
        print(f"assumed   {gpu.name}: {products:.0f} TFLOP/s, attention {attention:.0f}, memory {speed:.2f} TB/s")
    conclude({"computed": True, "gpus": assumed, "options": results}, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
