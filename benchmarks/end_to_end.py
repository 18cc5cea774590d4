"""End to end: the speed of `difftrain train` over that of diffusers' train_text_to_image.py, model and pictures alike.

Claim: from a cache that is filled already a step takes 1/1.8 of the script's time or less. Every run is a process of
its own, in shuffled rounds; a step's time is the slope between a short and a long run, so that start-up and the last
save cancel out. The script's second row is the control. How to read the result: README.md in this folder.

    python benchmarks/end_to_end.py
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison import conclude, own_caches, vae_of
from loading import make_pictures
from startup import DIFFTRAIN, environment

NAMES = ("script", "script again", "difftrain", "difftrain, cache")
CLOCKS = ("wall", "cpu")
LR = 1e-4

# A complete config: what the script does with its defaults, EMA and --center_crop.
CONFIG = """
model: {{kind: tiny, vae: {vae}}}
data: {{kind: imagefolder, data_root: {pictures}, image_size: {size}, num_workers: {workers}, center_crop: true}}
train: {{max_steps: 1, global_batch_size: {batch}, max_grad_norm: 1.0}}
objective: {{kind: epsilon}}
optimizer: {{kind: adamw, weight_decay: 0.01}}
lr: {{kind: constant, peak: {lr}, warmup_steps: 0}}
ema: {{decay: 0.9999}}
checkpoint: {{every_steps: 1000000}}
"""


def script(pictures: Path, output: Path, steps: int, args: argparse.Namespace) -> None:
    """What diffusers' examples/text_to_image/train_text_to_image.py does with `--use_ema --center_crop`.

    Written from knowledge of that script, in its order and with its waits: VAE and text encoder at every step, DDPM
    noise, `torch.optim.AdamW` as it comes, EMAModel as it comes, a learning-rate scheduler, the progress bar, and the
    two losses it fetches a step. Left out: trackers (it logs to none here), checkpoints on the way, sample pictures.
    """
    import torch
    import torch.nn.functional as functional
    from accelerate import Accelerator
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import EMAModel
    from loading import Case, Theirs
    from tqdm.auto import tqdm

    from trainer.models.tiny import SCHEDULER, Tiny

    torch.set_num_threads(args.threads)
    accelerator = Accelerator(gradient_accumulation_steps=1, cpu=not torch.accelerator.is_available())
    components = Tiny(vae=args.vae).load(0)
    unet: Any = components.unet
    vae: Any = components.vae.requires_grad_(False)
    text_encoder: Any = components.text_encoder.requires_grad_(False)
    kept = {name: value for name, value in SCHEDULER.items() if name.startswith(("beta", "num"))}
    noise_scheduler: Any = DDPMScheduler(**kept)
    unet.train()
    copy: Any = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict(unet.state_dict())
    ema = EMAModel(copy.parameters(), model_cls=UNet2DConditionModel, model_config=copy.config)
    optimizer: Any = torch.optim.AdamW(unet.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    case = Case(0, 0, args.image_size)
    loader: Any = Theirs(pictures, case, args.batch, components.tokenizer, center=True).loader(args.workers)
    lr_scheduler: Any = get_scheduler("constant", optimizer, num_warmup_steps=500, num_training_steps=steps)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    ema.to(accelerator.device)
    text_encoder.to(accelerator.device)
    vae.to(accelerator.device)
    done, bar = 0, tqdm(range(steps), desc="Steps")
    for _ in range(math.ceil(steps / len(loader))):
        for batch in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                total = noise_scheduler.config.num_train_timesteps
                timesteps = torch.randint(0, total, (latents.shape[0],), device=latents.device).long()
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                cond = text_encoder(batch["input_ids"])[0]
                predicted = unet(noisy, timesteps, cond).sample
                loss = functional.mse_loss(predicted.float(), noise.float(), reduction="mean")
                average = accelerator.gather(loss.repeat(args.batch)).mean()  # pyright: ignore
                average.item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(unet.parameters())
                bar.update(1)
                done += 1
            bar.set_postfix(step_loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])
            if done >= steps:
                break
    ema.copy_to(unet.parameters())
    accelerator.unwrap_model(unet).save_pretrained(output)
    accelerator.end_training()


def run(command: Sequence[str], threads: int) -> dict[str, float]:
    """Seconds of a process: on the wall, and of any core by it and its workers; raises if it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, env=environment() | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def command_of(name: str, steps: int, args: argparse.Namespace, folder: Path, output: Path) -> list[str]:
    """The process of one run."""
    if name.startswith("script"):
        own = ["--threads", args.threads, "--batch", args.batch, "--image-size", args.image_size, "--vae", args.vae]
        child = ["--child", folder / "pictures", output, steps, *own, "--workers", args.workers]
        return [sys.executable, __file__, *map(str, child)]
    cache = [f"cache.dir={folder / 'cache'}"] if name == "difftrain, cache" else []
    config = ["--config", str(folder / "run.yaml"), "--output-dir", str(output)]
    return [*DIFFTRAIN, "train", *config, "--set", f"train.max_steps={steps}", *cache]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[float]]]:
    """By clock: milliseconds of a step of each, round by round, in shuffled order."""
    make_pictures(folder / "pictures", args.pictures, args.picture_size, args.picture_size)
    text = CONFIG.format(
        vae=args.vae,
        pictures=folder / "pictures",
        size=args.image_size,
        workers=args.workers,
        batch=args.batch,
        lr=LR,
    )
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    for name in ("script", "difftrain, cache"):  # the data set prepared, the pictures looked at, the cache filled
        run(command_of(name, 1, args, folder, folder / f"first {name}"), args.threads)
    slopes: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in NAMES} for clock in CLOCKS}
    generator = random.Random(0)
    for number in range(args.rounds):
        seconds: dict[tuple[str, int], dict[str, float]] = {}
        turns = [(name, steps) for name in NAMES for steps in args.steps]
        for name, steps in generator.sample(turns, len(turns)):
            output = folder / f"{number} {name} {steps}"
            seconds[name, steps] = run(command_of(name, steps, args, folder, output), args.threads)
        short, long = args.steps
        for clock, name in itertools.product(CLOCKS, NAMES):
            spent = seconds[name, long][clock] - seconds[name, short][clock]
            slopes[clock][name].append(1000 * spent / (long - short))
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    return slopes


def compare(slopes: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """For each its step, and its speed over that of the script, round by round."""
    return {
        name: {
            "step_milliseconds": statistics.median(each),
            "speeds": (speeds := [theirs / ours for ours, theirs in zip(each, slopes["script"], strict=True)]),
            "speed": statistics.median(speeds),
        }
        for name, each in slopes.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="pairs of runs of each (default 4)")
    parser.add_argument("--steps", type=int, nargs=2, default=[20, 120], help="of both runs (default 20 120)")
    parser.add_argument("--pictures", type=int, default=1024, help="of the folder (default 1024)")
    parser.add_argument("--picture-size", type=int, default=96, help="their sides, pixels (default 96)")
    parser.add_argument("--image-size", type=int, default=64, help="of a sample, pixels (default 64)")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (default 8)")
    parser.add_argument("--workers", type=int, default=1, help="of the loaders (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--vae", default="builtin", help="`builtin` (default), `random`, channels, a folder")
    parser.add_argument("--child", nargs=3, metavar=("PICTURES", "OUTPUT", "STEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, every round included")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if args.child:
        pictures, output, steps = args.child
        script(Path(pictures), Path(output), int(steps), args)
        return 0
    size = {name: value for name, value in vars(args).items() if name not in ("json", "child")}
    size["load_at_start"] = os.getloadavg()
    with tempfile.TemporaryDirectory() as name, own_caches(Path(name)):
        args.vae = vae_of(args.vae, Path(name))
        slopes = measure(args, Path(name))
    clocks = {clock: compare(of_clock) for clock, of_clock in slopes.items()}
    for clock, rows in clocks.items():
        print(f"{clock + ' clock':20}{'ms/step':>9}{'speed':>8}   lowest to highest round")
        for name, row in rows.items():
            low, high = min(row["speeds"]), max(row["speeds"])
            print(f"{name:20}{row['step_milliseconds']:9.1f}{row['speed']:8.3f}   {low:.3f} to {high:.3f}")
        print()
    step_of = f"tiny model, VAE {size['vae']}, {args.picture_size} px JPEGs to {args.image_size} px, batch {args.batch}"
    of = f"medians of {args.rounds} rounds, slopes from {args.steps[0]} to {args.steps[1]} steps"
    print(f"{of}; {step_of}, {args.workers} worker, {args.threads} thread")
    conclude({**size, "slopes": slopes, "clocks": clocks}, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
