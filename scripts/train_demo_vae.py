"""Train the small VAE that ships in trainer/models/builtin_vae: 64 px shapes to an 8x8 latent grid and back.

Every draw is a function of (seed, step), so a run with the same settings and thread count repeats itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.data.sources.shapes import BACKGROUNDS, COLOURS, ShapeRecords, coverage, place
from trainer.rng import draw_seed

IMAGE_SIZE = 64
POOL_SEED, FRESH_SEED = 64_001, 64_002  # data seeds of the shapes: trained on, and measured on
NUM_FRESH = 500
WARM_UP_STEPS = 50
EMA_DECAY = 0.995
CLIP_NORM = 1.0
LOG_EVERY = 50  # steps
START_LOG_VARIANCE = -4.0  # of the posterior, so that its noise does not drown the first signals
RANDOM_COLOUR = 0.2  # share of pictures whose colour is any RGB: a latent space with no holes between the hues
SHAPE_WEIGHT = 3.0  # added to a pixel's weight of 1 on the shape and 2 px around: most of a picture is background
CHROMA_WEIGHT = 2.0  # on the squared error that is left once the pixel's mean error is taken out: hue is learnt late
ABSOLUTE_WEIGHT = 0.2  # on the absolute error, for flat areas and sharp edges


def shape_masks(num_images: int, seed: int) -> Tensor:
    """How much of each pixel the shape covers, uint8 [N, 1, 64, 64], 255 for all of it."""
    records, masks = ShapeRecords(num_images, IMAGE_SIZE, seed=seed), []
    for index in range(num_images):
        combination = records.combination(index)
        mask = coverage(combination.shape, IMAGE_SIZE, place(combination, seed, index))
        masks.append(torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8))
    return torch.stack(masks).view(-1, 1, IMAGE_SIZE, IMAGE_SIZE)


def paint(masks: Tensor, colours: Tensor, backgrounds: Tensor) -> Tensor:
    """Pictures [B, 3, 64, 64] in [-1, 1], of 8-bit values, from masks in [0, 255] and RGB [B, 3] in [0, 255]."""
    colours, backgrounds = colours[:, :, None, None], backgrounds[:, :, None, None]
    return (backgrounds + (colours - backgrounds) * (masks / 255)).round() / 127.5 - 1


def batch_of(pool: Tensor, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, 64, 64] in [-1, 1] and their masks [B, 1, 64, 64] in [0, 1], for one step."""
    generator = torch.Generator().manual_seed(draw_seed(seed, "demo_vae/batch", step))

    def pick(n: int, *shape: int) -> Tensor:
        return torch.randint(n, (batch_size, *shape), generator=generator)

    masks = pool[pick(len(pool))].float()
    masks = torch.where(pick(2, 1, 1, 1) == 1, masks.flip(-1), masks)
    colours = torch.tensor(list(COLOURS.values())).float()[pick(len(COLOURS))]
    any_colour = torch.rand((batch_size, 1), generator=generator) < RANDOM_COLOUR
    colours = torch.where(any_colour, pick(256, 3).float(), colours)
    backgrounds = torch.tensor(list(BACKGROUNDS.values())).float()[pick(len(BACKGROUNDS))]
    return paint(masks, colours, backgrounds), masks / 255


def build(arguments: argparse.Namespace) -> AutoencoderKL:
    widths = tuple(arguments.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * len(widths),  # pyright: ignore[reportArgumentType]
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=arguments.latent_channels,
        norm_num_groups=arguments.norm_groups,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,  # standardize() sees to it
        force_upcast=False,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def start_as_pooling(vae: nn.Module) -> None:
    """Starts the residual trunk as the identity, its resampling as average pooling and nearest repetition.

    Residual branches end in zeros (Goyal et al. 2017, section 5.1) and the other convolutions of the trunk pass
    channel i on to channel i, so that colour reaches the latents, and the output, from the first step on.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        same = torch.arange(n := min(module.in_channels, module.out_channels))
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
        elif name.endswith(("conv_shortcut", "encoder.conv_in")) or "samplers" in name:
            module.weight[:n] = 0
            middle = module.kernel_size[0] // 2
            if "downsamplers" in name:  # padded on the right and below only: its 2x2 pixels are the first two
                module.weight[same, same, :2, :2] = 0.25
            else:
                module.weight[same, same, middle, middle] = 1
        else:
            continue
        if module.bias is not None and not name.endswith("encoder.conv_in"):
            nn.init.zeros_(module.bias)
    bias = vae.get_parameter("quant_conv.bias")
    bias[len(bias) // 2 :] = START_LOG_VARIANCE


def loss_of(
    vae: nn.Module, pixels: Tensor, masks: Tensor, generator: torch.Generator, kl_weight: float
) -> tuple[Tensor, float]:
    """The scalar to minimise, and the mean squared error alone."""
    posterior = vae.encode(pixels).latent_dist  # pyright: ignore
    error = vae.decode(posterior.sample(generator)).sample - pixels  # pyright: ignore
    weight = 1 + SHAPE_WEIGHT * F.max_pool2d(masks, 5, stride=1, padding=2)
    chroma = error - error.mean(dim=1, keepdim=True)
    cost = error.square() + CHROMA_WEIGHT * chroma.square() + ABSOLUTE_WEIGHT * error.abs()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()  # nats a latent element
    return (weight * cost).mean() / weight.mean() + kl_weight * kl, error.detach().square().mean().item()


def train(vae: nn.Module, pool: Tensor, arguments: argparse.Namespace) -> nn.Module:
    """The moving average of the weights after all steps."""
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=arguments.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    started, spent = time.monotonic(), time.process_time()
    for step in range(arguments.steps):
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        pixels, masks = batch_of(pool, arguments.batch_size, arguments.seed, step)
        generator = torch.Generator().manual_seed(draw_seed(arguments.seed, "demo_vae/posterior", step))
        loss, mse = loss_of(vae, pixels, masks, generator, arguments.kl_weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), CLIP_NORM)
        optimizer.step()
        average.update_parameters(vae)
        if (step + 1) % LOG_EVERY == 0:
            took = f"{(time.monotonic() - started) / 60:.1f} min, {(time.process_time() - spent) / 60:.1f} of CPU time"
            print(f"step {step + 1}  loss {loss:.4f}  batch {10 * math.log10(4 / mse):.1f} dB  {took}", flush=True)
        if arguments.measure_every and (step + 1) % arguments.measure_every == 0:
            print(json.dumps(measure(average.module, num_images=96)), flush=True)
    return average.module


@torch.no_grad()
def standardize(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Gives each latent channel mean 0 and variance 1, by a change of units in the two 1x1 convolutions around it."""
    posterior, over = vae.encode(pixels).latent_dist, (0, 2, 3)  # pyright: ignore
    mean, std = posterior.mean.mean(over), (posterior.mean.var(over) + posterior.var.mean(over)).sqrt()
    weight, bias = vae.get_parameter("quant_conv.weight"), vae.get_parameter("quant_conv.bias")
    channels = len(std)
    weight[:channels] /= std[:, None, None, None]
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * std.log()  # the other half is the logarithm of the variance
    weight, bias = vae.get_parameter("post_quant_conv.weight"), vae.get_parameter("post_quant_conv.bias")
    bias += weight[:, :, 0, 0] @ mean
    weight *= std[None, :, None, None]


def nearest(rgb: Tensor, palette: list[tuple[int, int, int]]) -> Tensor:
    """Index [B] of the palette's colour nearest to RGB [B, 3] in [-1, 1]."""
    return torch.cdist(rgb, torch.tensor(palette) / 127.5 - 1).argmin(dim=1)


@torch.no_grad()
def measure(vae: nn.Module, num_images: int = NUM_FRESH) -> dict[str, float | list[float]]:
    """Figures over pictures never trained on; latents are drawn from the posterior, as in training."""
    records = ShapeRecords(num_images, IMAGE_SIZE, seed=FRESH_SEED)
    drawn = [records.combination(index) for index in range(num_images)]  # each of the 288 in turn
    masks = shape_masks(num_images, FRESH_SEED) / 255
    colours = torch.tensor([COLOURS[one.colour] for one in drawn]).float()
    backgrounds = torch.tensor([BACKGROUNDS[one.background] for one in drawn]).float()
    pixels = paint(masks * 255, colours, backgrounds)
    posteriors = [vae.encode(part).latent_dist for part in pixels.split(50)]  # pyright: ignore
    generator = torch.Generator().manual_seed(draw_seed(FRESH_SEED, "demo_vae/posterior", 0))
    latents, stds = torch.cat([p.sample(generator) for p in posteriors]), torch.cat([p.std for p in posteriors])
    output = torch.cat([vae.decode(part).sample for part in latents.split(50)]).clamp(-1, 1)  # pyright: ignore

    inside = (masks > 0.5).float()
    thin, core = (-F.max_pool2d(-inside, side, stride=1, padding=side // 2) for side in (3, 5))
    core = torch.where(core.sum((1, 2, 3), keepdim=True) > 0, core, thin)  # 2 px off the border; 1 in a small ring
    outside = 1 - F.max_pool2d(inside, 5, stride=1, padding=2)
    palette = [*COLOURS.values(), *BACKGROUNDS.values()]  # a shape lost to its background is wrong too
    colour = nearest((output * core).sum((2, 3)) / core.sum((2, 3)), palette)
    background = nearest((output * outside).sum((2, 3)) / outside.sum((2, 3)), list(BACKGROUNDS.values()))
    ink, ground = (colours / 127.5 - 1)[:, :, None, None], (backgrounds / 127.5 - 1)[:, :, None, None]
    found = ((output - ink).square().sum(1) < (output - ground).square().sum(1))[:, None]
    iou = (found & (inside > 0)).sum((1, 2, 3)) / (found | (inside > 0)).sum((1, 2, 3))
    mse = (output - pixels).square().mean(dim=(1, 2, 3))
    return {
        "psnr_db": round(10 * math.log10(4 / mse.mean().item()), 2),  # of the mean error; 4 is the range's square
        "worst_psnr_db": round(10 * math.log10(4 / mse.max().item()), 2),
        "colour_right": (colour == nearest(colours / 127.5 - 1, palette)).float().mean().item(),
        "background_right": (background == nearest(backgrounds / 127.5 - 1, palette[-3:])).float().mean().item(),
        "iou_mean": round(iou.mean().item(), 4),
        "iou_min": round(iou.min().item(), 4),
        "latent_mean": [round(value, 3) for value in latents.mean(dim=(0, 2, 3)).tolist()],
        "latent_std": [round(value, 3) for value in latents.std(dim=(0, 2, 3)).tolist()],
        "posterior_std": [round(value, 3) for value in stds.mean(dim=(0, 2, 3)).tolist()],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="gets config.json and the weights")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3, help="at its peak; falls to 0 along a cosine")
    parser.add_argument("--kl-weight", type=float, default=1e-3, help="of the mean KL, nats a latent element")
    parser.add_argument("--block-out-channels", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--latent-channels", type=int, default=8)
    parser.add_argument("--norm-groups", type=int, default=1)
    parser.add_argument("--plain-start", action="store_true", help="PyTorch's own initial weights")
    parser.add_argument("--pool", type=int, default=8192, help="masks drawn once; colours are drawn for each step")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--threads", type=int, default=1, help="on so small a network, more are slower")
    parser.add_argument("--measure-every", type=int, default=0, help="steps; 0 for at the end only")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)  # of the initial weights
    vae = build(arguments)
    if not arguments.plain_start:
        start_as_pooling(vae)
    print(f"{sum(p.numel() for p in vae.parameters()):,} weights; drawing {arguments.pool} masks", flush=True)
    pool = shape_masks(arguments.pool, POOL_SEED)
    vae.load_state_dict(train(vae, pool, arguments).state_dict())
    standardize(vae, batch_of(pool, 1024, arguments.seed, arguments.steps)[0])
    nn.Module.half(vae)  # diffusers' own warns of half precision on a CPU
    vae.save_pretrained(arguments.output_dir)
    stored = AutoencoderKL.from_pretrained(arguments.output_dir, torch_dtype=torch.float32)
    print(json.dumps(measure(stored), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
