"""Loading: pictures a second of the trainer's loader, over those of a bare decode-and-resize loop on as many cores.

Claim: with all workers the loader gives 0.9 of the bare loop or more, though it also draws noise, counts tokens and
carries batches between processes. Beside it the data path of diffusers' train_text_to_image.py, on the same pictures.
How to read the result: README.md in this folder.

    OMP_NUM_THREADS=1 python benchmarks/loading.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from comparison import conclude, own_caches
from torch import Tensor

from trainer.config import Config
from trainer.config_file import LoadedConfig
from trainer.data.loader import SlotSchedule, load_batches
from trainer.data.transforms import View, as_float, fit, to_pixels
from trainer.preflight import preflight
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.training import Training, assemble

WAYS = ("bare", "bare again", "difftrain", "datasets + DataLoader")
AN_HOUR_AGO = 3600  # a younger file could change and keep its time, so nothing about it is remembered
WORDS = ("red", "green", "blue", "circle", "square", "star", "on", "a", "white", "black", "small", "large", "house")


class Case(NamedTuple):
    """Pictures of one size, and the square that a sample is."""

    width: int
    height: int
    image_size: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height} to {self.image_size}"


def make_pictures(folder: Path, count: int, width: int, height: int) -> None:
    """An `imagefolder` of JPEGs with a photograph's mix of coarse and fine detail, so that they take as long to decode.

    The files say that they are an hour old.
    """
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        pixels = np.zeros((height, width, 3), np.float32)
        for cells, strength in ((4, 50), (16, 30), (64, 15), (256, 8), (max(width, height), 4)):
            coarse = draw.integers(0, 256, (max(1, cells * height // width), cells, 3), dtype=np.uint8)
            fine = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
            pixels += (fine - 128) * (strength / 74)
        name = f"{number:06d}.jpg"
        Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
        lines.append(json.dumps({"file_name": name, "text": " ".join(draw.choice(WORDS, 9))}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    then = time.time() - AN_HOUR_AGO
    for file in folder.iterdir():
        os.utime(file, (then, then))


@contextmanager
def quietly() -> Iterator[None]:
    """Within it nothing is printed."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


class Ours:
    """`load_batches` itself, as a run with this config feeds its steps."""

    def __init__(self, pictures: Path, case: Case, batch: int):
        config = Config.model_validate(
            {
                "model": {"kind": "tiny"},
                "data": {
                    "kind": "imagefolder",
                    "data_root": str(pictures),
                    "image_size": case.image_size,
                    "random_flip": True,
                },
                "train": {"max_steps": 1_000_000, "global_batch_size": batch},
                "objective": {"kind": "epsilon"},
                "lr": {"kind": "constant", "peak": 1e-4, "warmup_steps": 0},
            }
        )
        checked = preflight(LoadedConfig(config, Path("loading"), "", {}), 0, 1)
        runtime = Runtime(config.train.precision, config.train.deterministic)
        self.training: Training = assemble(checked, runtime, RunDir(pictures / "no-run"), None)
        self._source = self.training.samples.source

    def batches(self, workers: int) -> Iterator[Any]:
        self.training.samples.source = self._source.model_copy(update={"num_workers": workers})
        return load_batches(self.training.samples, SlotSchedule(self.training.topology, 0, 1_000_000), pin_memory=False)


class Theirs:
    """The data path of diffusers' examples/text_to_image/train_text_to_image.py, with its default Lanczos filter.

    Written from knowledge of that script. It uses torchvision's transforms; here they are the same operations with
    Pillow and torch: resize the shorter side, crop at a random place, flip, to tensor, normalise. Workers live through
    all epochs, which is kind to it: the script starts them anew for each.
    """

    def __init__(self, pictures: Path, case: Case, batch: int, tokenizer: Any, center: bool = False):
        from datasets import load_dataset

        found = load_dataset("imagefolder", data_files={"train": str(pictures / "**")})["train"]
        size = case.image_size

        def preprocess(examples: dict[str, list[Any]]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in examples["image"]]
            examples["pixel_values"] = [diffusers_transform(image, size, center) for image in images]
            examples["input_ids"] = tokenizer(
                examples["text"],
                max_length=tokenizer.model_max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).input_ids
            return examples

        self.dataset, self.batch = found.with_transform(preprocess), batch

    def batches(self, workers: int) -> Iterator[Any]:
        return iter(self.loader(workers, 1_000_000 * self.batch))

    def loader(self, workers: int, samples: int | None = None) -> Any:
        """The script's DataLoader; of `samples` samples, or of one epoch."""
        data: Any = self.dataset
        return torch.utils.data.DataLoader(
            data,
            sampler=torch.utils.data.RandomSampler(data, num_samples=samples),
            collate_fn=collate,
            batch_size=self.batch,
            num_workers=workers,
        )


def diffusers_transform(image: Any, size: int, center: bool = False) -> Tensor:
    """torchvision's Resize(size), RandomCrop(size), RandomHorizontalFlip(), ToTensor(), Normalize([0.5], [0.5]).

    With `center` it crops the centre and does not flip.
    """
    import numpy as np
    from PIL import Image

    width, height = image.size
    if min(width, height) != size:
        wide, high = (size, size * height // width) if width < height else (size * width // height, size)
        image = image.resize((wide, high), Image.Resampling.LANCZOS)
    if center:
        left, top = ((side - size) // 2 for side in image.size)
    else:
        left, top = (int(torch.randint(0, side - size + 1, (1,))) for side in image.size)
    image = image.crop((left, top, left + size, top + size))
    if not center and torch.rand(1) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return pixels.clone().sub_(0.5).div_(0.5)


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of the script."""
    pixels = torch.stack([example["pixel_values"] for example in examples])
    pixels = pixels.to(memory_format=torch.contiguous_format).float()
    return {"pixel_values": pixels, "input_ids": torch.stack([example["input_ids"] for example in examples])}


class Bare:
    """Open, convert, resize and crop as the trainer does, to a tensor, in `workers` processes that hand out nothing."""

    def __init__(self, pictures: Path, case: Case):
        self.files, self.size = sorted(map(str, pictures.glob("*.jpg"))), case.image_size

    def one(self, number: int) -> Tensor:
        from PIL import Image

        draw = random.Random(number)
        view = View(self.size, self.size, draw.random(), draw.random(), draw.random() < 0.5)
        with Image.open(self.files[draw.randrange(len(self.files))]) as image:
            return as_float(to_pixels(fit(image.convert("RGB"), view)))

    def rate(self, workers: int, images: int) -> float:
        """Pictures a second; the processes take them one after the other, so that none is idle before the end."""
        if workers == 0:
            self.one(0)
            began = time.perf_counter()
            for number in range(images):
                self.one(number)
            return images / (time.perf_counter() - began)
        fork = multiprocessing.get_context("fork")
        taken, ready = fork.Value("l", 0), fork.Barrier(workers + 1)
        processes = [fork.Process(target=self._work, args=(taken, ready, images)) for _ in range(workers)]
        for process in processes:
            process.start()
        ready.wait()
        began = time.perf_counter()
        ready.wait()  # all are done
        seconds = time.perf_counter() - began
        for process in processes:
            process.join()
        return images / seconds

    def _work(self, taken: Any, ready: Any, images: int) -> None:
        torch.set_num_threads(1)
        self.one(0)
        ready.wait()
        while True:
            with taken.get_lock():
                number = taken.value
                taken.value += 1
            if number >= images:
                break
            self.one(number)
        ready.wait()


def rate_of(batches: Iterator[Any], batch: int, images: int, warm_up: int) -> float:
    """Pictures a second from after `warm_up` batches on; the loader has more to do than is asked of it."""
    for _ in range(warm_up):
        next(batches)
    count = -(-images // batch)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - began
    if isinstance(batches, Generator):
        batches.close()  # PyTorch's own iterator ends its workers when it goes
    return count * batch / seconds


def measure(args: argparse.Namespace, case: Case, folder: Path) -> dict[int, dict[str, list[float]]]:
    """By number of workers and way: pictures a second, round by round, in shuffled order."""
    pictures = folder / f"{case.width}x{case.height}"
    if not pictures.exists():
        make_pictures(pictures, args.pictures, case.width, case.height)
    with quietly():
        bare, ours = Bare(pictures, case), Ours(pictures, case, args.batch)
        theirs = Theirs(pictures, case, args.batch, ours.training.components.tokenizer)

    images = args.images * max(1, min(8, 10**6 // (case.width * case.height)))  # small ones are quick

    def turn(way: str, workers: int) -> float:
        if way.startswith("bare"):
            return bare.rate(workers, images)
        loader = ours if way == "difftrain" else theirs
        return rate_of(loader.batches(workers), args.batch, images, warm_up=1 + 3 * workers)

    rates = {workers: {way: list[float]() for way in WAYS} for workers in args.workers}
    turns: list[tuple[int, str]] = list(itertools.product(args.workers, WAYS))
    generator = random.Random(0)
    for number in range(args.rounds):
        for workers, way in generator.sample(turns, len(turns)):
            rates[workers][way].append(turn(way, workers))
        print(f"{case}: round {number + 1} of {args.rounds}", file=sys.stderr)
    return rates


def compare(rates: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """For each way its pictures a second and, round by round, these over the bare loop's."""
    return {
        way: {
            "images_per_second": statistics.median(each),
            "ratio": statistics.median(ratios := [a / b for a, b in zip(each, rates["bare"], strict=True)]),
            "ratios": ratios,
        }
        for way, each in rates.items()
    }


def print_rates(case: str, of_workers: dict[int, dict[str, dict[str, Any]]]) -> None:
    """The table of one case."""
    print(f"{case:24}{'workers':>8}{'images/s':>10}{'x bare':>8}   lowest to highest round")
    for workers, rows in of_workers.items():
        for way, row in rows.items():
            low, high = min(row["ratios"]), max(row["ratios"])
            print(
                f"{way:24}{workers:>8}{row['images_per_second']:10.1f}{row['ratio']:8.3f}   {low:.3f} to {high:.3f}",
                flush=True,
            )
    print()


def _case(text: str) -> Case:
    sides, _, size = text.partition(":")
    width, _, height = sides.partition("x")
    return Case(int(width), int(height), int(size))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the JSON: 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [Case(1152, 896, 512), Case(256, 256, 256)]
    parser.add_argument(
        "--cases", nargs="+", type=_case, default=cases, metavar="WxH:S", help="default 1152x896:512 256x256:256"
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (default 5)")
    parser.add_argument(
        "--images",
        type=int,
        default=128,
        help="large pictures of a turn, up to 8 times as many small ones (default 128)",
    )
    parser.add_argument("--pictures", type=int, default=64, help="different pictures (default 64)")
    parser.add_argument("--batch", type=int, default=8, help="pictures of a batch (default 8)")
    parser.add_argument("--folder", type=Path, help="for the pictures (default: the folder for temporary files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, every round included")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"load_at_start": os.getloadavg(), "loading": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as name, own_caches(Path(name)):
        for case in args.cases:
            of_workers = {workers: compare(rates) for workers, rates in measure(args, case, Path(name)).items()}
            result["loading"][str(case)] = of_workers
            print_rates(str(case), of_workers)
    of = f"medians of {args.rounds} rounds of {args.images} large or more small pictures out of {args.pictures}"
    print(f"{of}, batches of {args.batch}; one thread a process; files in the page cache")
    conclude(result, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
