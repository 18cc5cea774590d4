"""A cache gives the latents that encoding on the fly gives, and no step waits for a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from trainer.latent_cache import CHUNK, Memory

from trainer.cli import main
from trainer.config_file import load_config
from trainer.preflight import preflight
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.training import assemble

CONFIG = """\
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 70, center_crop: true, caption_dropout: 0.2}
train: {seed: 7, max_steps: 4, global_batch_size: 4, log_every: 1}
objective: {kind: flow}
lr: {peak: 1e-3}
checkpoint: {every_steps: 2}
cache: {kind: memory}
"""

Write = Callable[[str], Path]


def train(config: Path, run: Path, *options: str) -> int:
    return main(["train", "--config", str(config), "--output-dir", str(run), *options])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def runtime():
    runtime = Runtime("fp32", deterministic=False)
    yield runtime
    runtime.close()


def test_cached_latents_are_those_of_encoding_on_the_fly(write_config: Write, tmp_path: Path, runtime: Runtime):
    checked = preflight(load_config(write_config(CONFIG)), 0, 1)
    training = assemble(checked, runtime, RunDir(tmp_path / "run"), None)
    online = assemble(
        preflight(load_config(write_config(CONFIG), ["cache=null"]), 0, 1), runtime, RunDir(tmp_path), None
    )
    seen = set()
    for cached, fresh in zip(training.batches(0, 40), online.batches(0, 40), strict=True):
        assert cached.pixels is None, "no step waits for a picture that it does not need"
        assert (cached.slots, cached.keys, cached.captions) == (fresh.slots, fresh.keys, fresh.captions)
        assert torch.equal(cached.eps, fresh.eps)
        x0 = training.latent_source.latents(cached)
        assert torch.allclose(x0, online.latent_source.latents(fresh), atol=1e-5)
        seen.update(cached.keys)
    assert len(seen) == 70, "every record was compared"


def test_a_cached_record_still_has_another_latent_in_every_slot(write_config: Write, tmp_path: Path, runtime: Runtime):
    loaded = load_config(write_config(CONFIG), ["data.num_images=1"])
    training = assemble(preflight(loaded, 0, 1), runtime, RunDir(tmp_path / "run"), None)
    x0 = training.latent_source.latents(next(training.batches(0, 1)))
    assert len(x0.unique(dim=0)) == 4


def test_ranks_build_the_cache_that_one_rank_builds_bit_for_bit(write_config: Write, tmp_path: Path, runtime: Runtime):
    training = assemble(preflight(load_config(write_config(CONFIG)), 0, 1), runtime, RunDir(tmp_path / "run"), None)
    alone = training.samples.moments
    assert alone is not None
    shares: list = [None, None]
    assert len(alone) > 2 * CHUNK, "an odd number of chunks, the last one not full"

    def moments(rank: int, gather: Callable) -> torch.Tensor:
        ranks = SimpleNamespace(device=runtime.device, rank=rank, world_size=2, gather=gather, say=lambda line: None)
        return Memory().moments(training.samples, training.vae, cast("Runtime", ranks))

    for rank in (0, 1):

        def keep(mine: list, rank: int = rank) -> list:
            shares[rank] = mine
            return [mine * 2, mine * 2]  # not yet the other's: what comes of it is thrown away

        moments(rank, keep)
    assert torch.equal(moments(0, lambda mine: shares), alone)


def test_training_from_a_cache_resumes_exactly_and_agrees_with_training_without(write_config: Write, tmp_path: Path):
    config = write_config(CONFIG)
    assert train(config, tmp_path / "whole") == 0
    assert train(config, tmp_path / "broken", "--set", "train.max_steps=2") == 0
    assert train(config, tmp_path / "broken", "--resume", "auto", "--set", "data.num_workers=2") == 0
    assert train(config, tmp_path / "online", "--set", "cache=null") == 0
    whole, broken = (
        torch.load(tmp_path / name / "checkpoint-4.pt", weights_only=True)["modules"]["unet"]
        for name in ("whole", "broken")
    )
    assert all(torch.equal(weight, broken[name]) for name, weight in whole.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "online"), rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "where"), [("random_flip=true", "random_flip"), ("center_crop=false", "center_crop")]
)
def test_what_a_cache_cannot_keep_is_refused_before_anything_slow(write_config, tmp_path, capsys, setting, where):
    assert train(write_config(CONFIG), tmp_path / "run", "--set", f"data.{setting}") == 2
    assert f"data.{where}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_cache_that_does_not_fit_in_memory_is_refused_before_it_is_built(write_config, tmp_path, capsys, monkeypatch):
    import psutil

    free = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert train(write_config(CONFIG), tmp_path / "run") == 2
    assert "half of 0.01 MiB is free for it" in capsys.readouterr().err
