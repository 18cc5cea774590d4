"""Training from a cache is training without one, and what is kept is encoded once and never stale."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.cached.tensor_files import map_tensors
from trainer.cli import main
from trainer.config_file import load_config
from trainer.data.loader import Batch
from trainer.encoder_cache.disk import Disk
from trainer.latents import OnlineVae
from trainer.preflight import preflight
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.training import Training, assemble

CONFIG = """\
model: {{kind: tiny}}
data: {{kind: imagefolder, data_root: {pictures}, image_size: 64, num_workers: 0, center_crop: true}}
train: {{seed: 7, max_steps: 4, global_batch_size: 4, log_every: 1, deterministic: true}}
objective: {{kind: flow}}
lr: {{peak: 1e-3}}
checkpoint: {{every_steps: 2}}
cache: {{dir: {cache}, dtype: fp32}}
"""
SIZES = [(96, 64), (64, 96), (64, 64), (128, 64), (80, 72), (200, 90), (60, 150)]
KEPT = re.compile(r"cache  (\d+) entries(?:, all of them kept| = (\d+) kept \+ (\d+) to encode)")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """21 captioned pictures of seven shapes."""
    root = tmp_path / "pictures"
    root.mkdir()
    rows = []
    for index in range(21):
        paint(root / f"{index}.png", index)
        rows.append({"file_name": f"{index}.png", "text": [f"picture {index}", "a red circle"]})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def paint(path: Path, index: int, seed: int = 0) -> None:
    coarse = np.random.default_rng([seed, index]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(SIZES[index % len(SIZES)], Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(pictures=pictures, cache=tmp_path / "cache"))
    return path


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    runtime = Runtime("fp32", deterministic=False)
    yield runtime
    runtime.close()


@pytest.fixture
def assembled(config: Path, tmp_path: Path, runtime: Runtime) -> Callable[..., Training]:
    def build(*overrides: str) -> Training:
        checked = preflight(load_config(config, list(overrides)), 0, 1)
        return assemble(checked, runtime, RunDir(tmp_path / "run"), None)

    return build


def train(config: Path, run: Path, *options: str) -> int:
    return main(["train", "--config", str(config), "--output-dir", str(run), *options])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def encoded(capsys: pytest.CaptureFixture[str]) -> list[int]:
    """How many entries each build has encoded since the last call: latents, then texts."""
    return [int(match[3] or 0) for match in KEPT.finditer(capsys.readouterr().out)]


def weights(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / f"checkpoint-{step}.pt", weights_only=True)["modules"]["unet"]


def from_cache(training: Training, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """x0, and the prediction that the denoiser makes of it."""
    x0 = training.latent_source.latents(batch)
    with torch.no_grad():
        return x0, training.denoiser(x0, batch.t, batch.text)


BUCKETS = ("data.bucket_step_px=16",)
FLIPS = ("data.random_flip=true", "data.caption_dropout=0.3", "data.caption_prefix=a photo of ")


@pytest.mark.parametrize("options", [(), BUCKETS, (*BUCKETS, *FLIPS)], ids=["squares", "buckets", "flips"])
@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_cached_inputs_are_those_of_encoding_on_the_fly(assembled: Callable[..., Training], kind: str, options):
    cached = assembled(*options) if kind == "disk" else assembled("cache.kind=memory", *options)
    online = assembled("cache=null", *options)
    seen = set()
    for kept, fresh in zip(cached.batches(0, 12), online.batches(0, 12), strict=True):
        assert (kept.pixels, fresh.moments) == (None, None), "no step waits for a picture that it does not need"
        assert (kept.slots, kept.keys, kept.captions, kept.digest) == (
            *(fresh.slots, fresh.keys, fresh.captions, fresh.digest),
        )
        assert torch.equal(kept.sizes, fresh.sizes)
        for ours, theirs in zip(from_cache(cached, kept), from_cache(online, fresh), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
        seen.update(kept.keys)
    assert len(seen) == 21, "every record was compared"


def test_a_text_condition_is_the_same_from_the_cache_as_online_in_bf16(config: Path, tmp_path: Path):
    for name, text in (("kept", "true"), ("online", "false")):
        options = ["--set", "train.precision=bf16", f"cache.text={text}"]
        assert train(config, tmp_path / name, *options) == 0
    assert losses(tmp_path / "kept") == losses(tmp_path / "online")


def test_a_cached_record_still_has_another_latent_in_every_slot(assembled: Callable[..., Training]):
    training = assembled("train.global_batch_size=42")
    batch = next(training.batches(0, 1))
    x0 = training.latent_source.latents(batch)
    assert len(x0.unique(dim=0)) == 42 > len(set(batch.keys))


def test_several_crops_of_a_record_are_kept_and_drawn(assembled: Callable[..., Training]):
    training = assembled("data.center_crop=false", "cache.crops=3", "data.random_flip=true")
    shown: dict[str, set[tuple[int, ...]]] = {}
    for batch in training.batches(0, 80):
        for key, sizes in zip(batch.keys, batch.sizes.tolist(), strict=True):
            shown.setdefault(key, set()).add(tuple(sizes[2:4]))
    assert {len(places) for places in shown.values()} <= {1, 2, 3}
    assert len(shown["5.png"]) == 3, "200 x 90 pixels: a square has room to move"
    assert shown["2.png"] == {(0, 0)}, "64 x 64 pixels: it has none"


def test_training_from_a_full_cache_loads_neither_vae_nor_text_encoder(assembled: Callable[..., Training], monkeypatch):
    assembled()
    training = assembled()
    assert [training.components.loaded(name) for name in ("unet", "vae", "text_encoder")] == [True, False, False]
    assert training.denoiser.text_encoder is None
    trained = assembled("model.train_text_encoder=true")
    assert [trained.components.loaded(name) for name in ("vae", "text_encoder")] == [False, True]


def test_sample_grids_bring_the_encoders_back_for_as_long_as_they_draw(assembled: Callable[..., Training]):
    training = assembled()
    sampler = training.sampler(steps=2, guidance=2.0)
    with training.evaluating():
        assert len(sampler.draw(["a red circle"], 0, [0])) == 1
    assert not training.components.loaded("vae")
    assert not training.components.loaded("text_encoder")


def test_a_change_encodes_exactly_what_it_must(config: Path, pictures: Path, capsys: pytest.CaptureFixture[str]):
    def build(*overrides: str) -> list[int]:
        assert main(["cache", "--config", str(config), *(("--set", *overrides) if overrides else ())]) == 0
        return encoded(capsys)

    assert build() == [21, 23], "21 pictures; the empty caption, 21 captions and one that they share"
    assert build() == [0, 0]
    paint(pictures / "4.png", 4, seed=1)
    assert build() == [1, 0], "one picture changed"
    rows = (pictures / "metadata.jsonl").read_text().replace("picture 7", "picture seven")
    (pictures / "metadata.jsonl").write_text(rows)
    assert build() == [0, 1], "one caption changed"
    assert build("data.image_size=32") == [21, 0], "the resolution changed"
    assert build("data.random_flip=true") == [21, 0], "the pictures as they are were kept; the flipped ones are new"
    assert build("data.bucket_step_px=16") == [15, 0], "all but the six that stay square"
    assert build("train.seed=8") == [21, 23], "the seed makes this model's encoders: other networks"
    assert build("model.vae=builtin") == [21, 0], "the VAE changed"
    assert build("model.clip_skip=1") == [0, 23], "the text encoder is used in another way"
    assert build("cache.dtype=bf16") == [21, 23]
    assert build() == [0, 0], "and all that was there stays"


def test_a_flipped_bit_in_the_cache_is_found_where_it_is_read(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["cache", "--config", str(config)]) == 0
    for shard in (tmp_path / "cache").glob("latents-*/shard-*"):
        data = bytearray(shard.read_bytes())
        for row in range(map_tensors(shard).tensors["payload"].shape[0]):
            data[-1 - 2 * 4 * 8 * 8 * 4 * row] ^= 4
        shard.write_bytes(data)
    assert main(["cache", "--config", str(config), "--verify"]) == 1
    assert train(config, tmp_path / "run") == 2
    said = capsys.readouterr()
    assert "is not what was written" in said.err
    for shard in (tmp_path / "cache").glob("latents-*/shard-*"):
        shard.unlink()
    assert train(config, tmp_path / "run", "--resume", "auto") == 0
    assert encoded(capsys) == [21, 0]


def test_a_changed_picture_is_not_cached_under_the_key_of_the_old_one(
    config: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    long_ago = 1_600_000_000 * 10**9
    for name, value in (("old", 1), ("new", 2)):
        Image.new("RGB", (64, 64), (value, 0, 0)).save(tmp_path / f"{name}.bmp")
    metadata = (pictures / "metadata.jsonl").read_text().replace('"4.png', '"4.bmp')
    (pictures / "metadata.jsonl").write_text(metadata)

    def put(name: str) -> None:
        (pictures / "4.bmp").write_bytes((tmp_path / f"{name}.bmp").read_bytes())
        os.utime(pictures / "4.bmp", ns=(long_ago, long_ago))

    put("old")
    assert main(["validate", "--config", str(config), "--output-dir", str(tmp_path / "validated")]) == 0
    put("new")
    assert main(["cache", "--config", str(config)]) == 2
    assert "picture changed since it was looked at" in capsys.readouterr().err
    assert main(["cache", "--config", str(config)]) == 0, "it was looked at again"
    put("old")
    os.utime(pictures / "4.bmp", ns=(long_ago + 1, long_ago + 1))
    capsys.readouterr()
    assert main(["cache", "--config", str(config)]) == 0
    assert encoded(capsys) == [1, 0]


def test_the_vae_is_given_a_million_pixels_at_once_whatever_the_chunk(assembled, monkeypatch):
    counts = []
    posterior = OnlineVae.posterior

    def counted(self: OnlineVae, pixels: torch.Tensor) -> Any:
        counts.append(tuple(pixels.shape))
        return posterior(self, pixels)

    monkeypatch.setattr(OnlineVae, "posterior", counted)
    monkeypatch.setattr("trainer.encoder_cache.base.MOST_PIXELS", 4 * 64 * 64)
    assembled()
    assert counts == [(4, 3, 64, 64)] * 5 + [(1, 3, 64, 64)]


def test_a_full_cache_is_not_written_to(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert train(config, tmp_path / "one") == 0

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("trainer.cached.lookup.write_parts", refused)
    monkeypatch.setattr("trainer.cached.tensor_files.write_parts", refused)
    assert train(config, tmp_path / "two") == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


@pytest.mark.slow
def test_a_cached_run_with_buckets_resumes_to_the_bit(config: Path, tmp_path: Path):
    buckets = ("--set", *BUCKETS, *FLIPS, "data.center_crop=false", "cache.crops=2")
    assert train(config, tmp_path / "whole", *buckets) == 0
    assert train(config, tmp_path / "broken", *buckets, "train.max_steps=2") == 0
    assert train(config, tmp_path / "broken", *buckets, "data.num_workers=2", "--resume", "auto") == 0
    whole, broken = weights(tmp_path / "whole", 4), weights(tmp_path / "broken", 4)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert train(config, tmp_path / "kept", "--set", *BUCKETS) == 0
    assert train(config, tmp_path / "online", "--set", *BUCKETS, "cache=null") == 0
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "online"), rel=1e-4)


def test_cached_held_out_records_give_the_loss_of_encoding_on_the_fly(config: Path, tmp_path: Path):
    validation = ("--set", "data.validation_fraction=0.3", "validation={every_steps: 2, max_records: 3}", *BUCKETS)
    found = []
    for name, more in {"kept": (), "online": ("cache=null",)}.items():
        assert train(config, tmp_path / name, *validation, *more) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append([line["validation_loss"] for line in lines if "validation_loss" in line])
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-4)


class TwoRanks:
    """The collectives of two ranks that are two threads."""

    def __init__(self) -> None:
        self.items: list[Any] = [None, None]
        self.meet = threading.Barrier(2)

    def rank(self, number: int) -> Any:
        def gather(item: Any) -> list[Any]:
            self.meet.wait()
            self.items[number] = item
            self.meet.wait()
            return list(self.items)

        class Rank:
            rank, world_size, local_world_size, is_main = number, 2, 2, number == 0

            def say(self, line: str) -> None: ...

            def gather(self, item: Any) -> list[Any]:
                return gather(item)

            def from_main(self, action: Callable[[], Any]) -> Any:
                return gather(action() if self.is_main else None)[0]

        return Rank()


def test_two_ranks_build_the_files_that_one_rank_builds_bit_for_bit(config: Path, tmp_path: Path, runtime: Runtime):
    from trainer.encoding import Encoders, job_of

    folders = {}
    for ranks in (1, 2):
        checked = preflight(load_config(config, [f"cache.dir={tmp_path}/{ranks}", "cache.crops=1"]), 0, 1)
        cache, together = checked.config.cache, TwoRanks()
        assert isinstance(cache, Disk)

        def work(number: int, ranks: int = ranks, checked=checked, cache=cache, together=together) -> None:
            components = checked.config.model.load(7)
            encoders = Encoders(components, runtime.device, "fp32")
            job = job_of(checked, checked.seen.call.roll, components, encoders, runtime.device)
            cache.encode(job, True, together.rank(number) if ranks == 2 else runtime)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        folders[ranks] = {
            str(path.relative_to(tmp_path / str(ranks))): path.read_bytes()
            for path in sorted((tmp_path / str(ranks)).rglob("*"))
            if path.is_file()
        }
    assert len(folders[1]) > 6
    assert folders[1] == folders[2]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["data.center_crop=false"], "one random place for ever"),
        (["cache.crops=2"], "there is one crop of a record"),
        (["cache.dir=/dev/null/cache"], "'/dev/null' is not a folder"),
        (["data.caption_shuffle_tags=true"], "every order of its tags"),
        (["cache.kind=memory", "data.center_crop=false"], "one random place for ever"),
    ],
)
def test_a_cache_that_could_not_give_what_the_config_asks_for_is_refused(
    config: Path, tmp_path: Path, overrides: list[str], reason: str, capsys: pytest.CaptureFixture[str]
):
    assert train(config, tmp_path / "run", "--set", *overrides) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_encodes_what_its_step_needs_and_leaves_the_cache_alone(config: Path, tmp_path: Path, capsys):
    assert train(config, tmp_path / "run", "--dry-run", "--set", *BUCKETS) == 0
    said = capsys.readouterr().out
    assert "nothing was written" in said
    assert "text encoder not loaded: cached, vae not loaded: cached" in said
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()


def test_a_cache_in_memory_that_would_not_fit_is_refused(config: Path, tmp_path: Path, monkeypatch, capsys):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**16}))
    assert train(config, tmp_path / "run", "--set", "cache.kind=memory") == 2
    assert "MiB is free for it" in capsys.readouterr().err
