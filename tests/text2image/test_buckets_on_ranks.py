"""With buckets and a cache, on any number of ranks, every step reads what the plan says, and nobody waits for ever."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import checkpoint, finish, launch, metrics, same, wait_for

from trainer.config_file import load_config
from trainer.data.loader import digest
from trainer.data.plan import BucketPlan
from trainer.preflight import preflight

pytestmark = [pytest.mark.slow, pytest.mark.text2image]

CONFIG = """\
model: {kind: tiny, unet_channels: [16], unet_attention_levels: []}
data:
  kind: imagefolder
  data_root: pictures
  image_size: 32
  num_workers: 1
  bucket_step_px: 8
  random_flip: true
  caption_dropout: 0.1
  caption_templates: ["a photo of {caption}", "{caption}, high quality"]
train: {seed: 7, max_steps: 200, global_batch_size: 8, micro_batch_size: 4, log_every: 10, deterministic: true}
objective: {kind: flow}
lr: {peak: 1e-3}
cache: {dir: cache, crops: 2}
checkpoint: {every_steps: 100}
"""
SHAPES = [(32, 32), (48, 24), (24, 48), (64, 20), (40, 30), (33, 90), (100, 35)]
COUNT = 61  # no shape has a whole number of batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    pictures = root / "pictures"
    pictures.mkdir()
    rows = []
    for index in range(COUNT):
        width, height = SHAPES[index % len(SHAPES)]
        noise = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": [f"picture {index}", "a square"]}) + "\n")
    (pictures / "metadata.jsonl").write_text("".join(rows))
    (root / "config.yaml").write_text(CONFIG)
    return root


def test_every_step_of_two_ranks_reads_what_the_plan_says(folder: Path, monkeypatch):
    said = finish(folder, "two", ranks=2)
    assert "2 ranks x 1 accumulation" in said
    read = [line["batch"] for line in metrics(folder / "two")]
    assert len(read) == 200
    monkeypatch.chdir(folder)
    checked = preflight(load_config(folder / "config.yaml"), 0, 1)
    data, records, seed = checked.config.data, checked.records, checked.config.train.seed
    plan = checked.seen.call.roll.plan(data, 8, seed)
    assert isinstance(plan, BucketPlan)
    from trainer.data.captions import caption_of

    often = dict.fromkeys(range(COUNT), 0)
    for step in range(200):
        slots = range(8 * step, 8 * step + 8)
        indices = [plan.record(slot) for slot in slots]
        keys = [records[index].key for index in indices]
        captions = [caption_of(data, records[i].captions, seed, slot) for i, slot in zip(indices, slots, strict=True)]
        assert read[step] == f"{digest(slots, keys, captions):016x}", f"step {step + 1}"
        assert len({plan.bucket(slot) for slot in slots}) == 1
        for index in indices:
            often[index] += 1
    epochs = plan.epoch(200)
    assert epochs > 20
    assert min(often.values()) >= epochs, "no record is dropped"
    assert sum(often.values()) == 1600


def test_cuts_of_the_batch_and_resumes_on_other_ranks_are_one_run(folder: Path):
    steps = "train.max_steps=30"
    finish(folder, "one", steps, "train.micro_batch_size=2")
    finish(folder, "pair", steps, ranks=2)
    for until, ranks in ((11, 2), (19, 1), (30, 2)):
        finish(folder, "elastic", f"train.max_steps={until}", "data.num_workers=0", ranks=ranks)
    one, pair, elastic = (metrics(folder / name) for name in ("one", "pair", "elastic"))
    assert [line["batch"] for line in one] == [line["batch"] for line in pair] == [line["batch"] for line in elastic]
    for other in (pair, elastic):
        assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-5)


def test_a_kill_in_mid_run_costs_steps_and_no_bit(folder: Path):
    often = ("train.max_steps=30", "train.log_every=1", "checkpoint.every_steps=3", "train.micro_batch_size=2")
    finish(folder, "unbroken", *often)
    with launch(folder, "killed", *often) as job:
        wait_for(lambda: (folder / "killed" / "checkpoint-6.json").exists(), job)
        job.send_signal(signal.SIGKILL)
        assert job.wait(60) == -signal.SIGKILL, "it had ended before it was killed"
    assert len(metrics(folder / "killed")) < 30
    finish(folder, "killed", *often)
    for part in ("modules", "optimizer"):
        assert same(checkpoint(folder / "killed", 30)[part], checkpoint(folder / "unbroken", 30)[part]), part
    assert metrics(folder / "killed") == metrics(folder / "unbroken")


def test_a_loss_that_is_not_a_number_skips_the_step_of_a_cached_run(folder: Path):
    options = ["plugins=[plugged]", "train.max_steps=5", "train.log_every=1"]
    finish(folder, "sick", *options, "objective.kind=not_a_number", ranks=2)
    finish(folder, "well", *options, ranks=2)
    sick, well = metrics(folder / "sick"), metrics(folder / "well")
    assert [line["skipped"] for line in sick] == [False, False, True, False, False]
    assert [line["batch"] for line in sick] == [line["batch"] for line in well]
