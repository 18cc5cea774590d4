"""A cache whose builds were killed again and again is, file for file, the cache of one build that was not."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

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
KILLS = 3
ROOT = str(Path(__file__).parents[2])
ENTRIES = re.compile(r"cache  ([\d,]+) entries = ([\d,]+) kept \+ ([\d,]+) to encode, in (\d+) shards")


def build(folder: Path, cache: str, ranks: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "trainer", "cache", "--config", "config.yaml"]
    return subprocess.Popen(
        [*command, "--set", f"cache.dir={cache}"],
        cwd=folder,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("shard-*"))}


def latents_kept(folder: Path) -> int:
    """How many entries the whole shards of a cache hold."""
    return sum(map_tensors(path).tensors["keys"].shape[0] for path in folder.glob("latents-*/shard-*"))


def test_killed_builds_lose_no_shard_that_was_whole_and_end_in_the_cache_of_an_unbroken_one(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    finished(build(tmp_path, "whole"))
    whole = shards(tmp_path / "whole")
    chance, broken, kills = random.Random(0), tmp_path / "broken", 0
    for _ in range(KILLS):
        expected = latents_kept(broken)
        process = build(tmp_path, "broken", ranks=2)
        assert process.stdout is not None
        found = next(filter(None, map(ENTRIES.search, process.stdout)))
        assert int(found[2].replace(",", "")) == expected, "what earlier builds had written is kept"
        at_least = len(shards(broken)) + chance.randrange(1, 8)
        while process.poll() is None and len(shards(broken)) < at_least:
            time.sleep(0.01)
        kills += process.poll() is None
        everyone = [*psutil.Process(process.pid).children(recursive=True), process]  # ranks have groups of their own
        for each in everyone:
            each.kill()
        process.communicate(timeout=60)
    assert kills == KILLS, "a build had ended before it was killed: give it more to do"
    assert 0 < latents_kept(broken) < latents_kept(tmp_path / "whole")
    finished(build(tmp_path, "broken", ranks=2))
    assert shards(broken) == whole
