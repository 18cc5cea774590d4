"""A cache whose builds were killed again and again is, file for file, the cache of one build that was not."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
from forked import Job

from trainer.cached.tensor_files import map_tensors

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.text2image]

CONFIG = """\
model: {kind: tiny}
data: {kind: shapes, image_size: 64, num_images: 600, num_workers: 1, center_crop: true, random_flip: true}
train: {seed: 7, max_steps: 4, global_batch_size: 4}
objective: {kind: flow}
lr: {peak: 1e-3}
cache: {dir: cache}
"""
ENTRIES = re.compile(r"cache  ([\d,]+) entries = ([\d,]+) kept \+ ([\d,]+) to encode, in (\d+) shards")


def build(folder: Path, cache: str, ranks: int = 1) -> Job:
    words = ("cache", "--config", "config.yaml", "--set", f"cache.dir={cache}")
    return Job(*words, cwd=folder, ranks=ranks, PYTHONUNBUFFERED="1")


def finished(job: Job) -> str:
    with job:
        said, _ = job.communicate(timeout=300)
        assert job.wait() == 0, said
    return said


def shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("shard-*"))}


def latents_kept(folder: Path) -> int:
    """How many entries the whole shards of a cache hold."""
    return sum(map_tensors(path).tensors["keys"].shape[0] for path in folder.glob("latents-*/shard-*"))


@pytest.mark.parametrize("kills", [3, pytest.param(12, marks=pytest.mark.nightly)])
def test_killed_builds_end_in_the_cache_of_an_unbroken_one(tmp_path: Path, kills: int):
    (tmp_path / "config.yaml").write_text(CONFIG)
    finished(build(tmp_path, "whole"))
    whole = shards(tmp_path / "whole")
    chance, broken, killed = random.Random(0), tmp_path / "broken", 0
    for trial in range(kills):
        expected = latents_kept(broken)
        with build(tmp_path, "broken", ranks=2) as job:
            found = next(filter(None, map(ENTRIES.search, job.stdout)))
            assert int(found[2].replace(",", "")) == expected, "what earlier builds had written is kept"
            left = len(whole) - len(shards(broken))
            at_least = len(shards(broken)) + chance.randrange(1, max(2, left // (kills - trial + 1)))
            while job.poll() is None and len(shards(broken)) < at_least:
                time.sleep(0.002)
            killed += job.poll() is None
            job.kill()
    assert killed == kills, "a build had ended before it was killed: give it more to do"
    assert 0 < latents_kept(broken) < latents_kept(tmp_path / "whole")
    finished(build(tmp_path, "broken", ranks=2))
    assert shards(broken) == whole
