"""What the loader hands out is a function of the slot: not of ranks, micro batches, workers or where a start began."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image

from trainer.data.loader import Samples, SlotSchedule, load_batches
from trainer.data.plan import BatchPlan
from trainer.data.sources.imagefolder import ImageFolder
from trainer.data.topology import deal
from trainer.models.clip_bpe import clip_tokenizer, merges_for
from trainer.models.tiny import WORDS, Tiny
from trainer.rng import normal
from trainer.timesteps import TimestepLaw

STEPS, GLOBAL_BATCH, SEED = 6, 4, 7
SIZES = [(48, 32), (32, 57), (40, 64), (64, 33), (90, 41)]  # none square: each has a crop to draw
ROWS = ("keys", "captions", "text", "pixels", "t", "eps", "posterior_eps")

Slots = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for index, (width, height) in enumerate(SIZES):
        noise = (normal(0, "picture", [index], (height, width, 3))[0] * 60 + 128).clamp(0, 255).to(torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": ["a red circle", f"picture {index}"]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    source = ImageFolder(data_root=str(folder), image_size=32, num_workers=0, random_flip=True, caption_dropout=0.3)
    family = Tiny()
    return Samples(
        source=source,
        records=source.open(),
        plan=BatchPlan(range(len(SIZES)), SEED),
        timesteps=TimestepLaw.parse({}),
        tokenize=partial(family.tokenize, clip_tokenizer(merges_for(WORDS), max_length=family.prompt_tokens)),
        latent_shape=lambda width, height: (4, height // 8, width // 8),
        global_batch=GLOBAL_BATCH,
        seed=SEED,
    )


def with_workers(samples: Samples, workers: int) -> Samples:
    return changed(samples, source=samples.source.model_copy(update={"num_workers": workers}))


def changed(samples: Samples, **attributes: Any) -> Samples:
    """A copy with other attributes."""
    other = copy.deepcopy(samples)
    vars(other).update(attributes)
    return other


def read(samples: Samples, micro_batch: int, world_size: int, first_step: int = 0) -> tuple[Slots, dict[int, int]]:
    """What the ranks are handed for each slot, and the digest of each step."""
    slots: Slots = {}
    digests: dict[int, int] = defaultdict(int)
    for rank in range(world_size):
        schedule = SlotSchedule(deal(GLOBAL_BATCH, micro_batch, rank, world_size), first_step, STEPS)
        for batch in load_batches(samples, schedule, pin_memory=False):
            for row, slot in enumerate(batch.slots):
                assert slot not in slots, f"slot {slot} was handed out twice"
                slots[slot] = {name: getattr(batch, name)[row] for name in ROWS}
            digests[batch.slots[0] // GLOBAL_BATCH] += batch.digest
    return slots, {step: total % 2**64 for step, total in sorted(digests.items())}


@pytest.fixture(scope="module")
def one_by_one(samples: Samples) -> tuple[Slots, dict[int, int]]:
    """One rank that loads one picture at a time, in its own process: 1 rank x 1 image x accumulation 4."""
    slots, digests = read(samples, micro_batch=1, world_size=1)
    assert list(slots) == list(range(STEPS * GLOBAL_BATCH))
    assert len(set(digests.values())) == STEPS
    return slots, digests


def assert_equal(ours: Slots, theirs: Slots) -> None:
    assert ours.keys() == theirs.keys()
    for slot in ours:
        for name in ROWS:
            a, b = ours[slot][name], theirs[slot][name]
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b, f"{name} of slot {slot}"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("world_size", "micro_batch"),
    [
        pytest.param(1, 1, id="1 rank x accumulation 4"),
        pytest.param(2, 1, id="2 ranks x accumulation 2"),
        pytest.param(4, 1, id="4 ranks x accumulation 1"),
        pytest.param(1, 4, id="1 rank, no accumulation"),
        pytest.param(2, 2, id="2 ranks, no accumulation"),
    ],
)
def test_a_slot_holds_the_same_bits_on_any_ranks_micro_batch_and_workers(
    samples, one_by_one, world_size, micro_batch, workers
):
    slots, digests = read(with_workers(samples, workers), micro_batch, world_size)
    assert_equal(slots, one_by_one[0])
    assert digests == one_by_one[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_mid_epoch_hands_out_the_rest_of_the_unbroken_run(samples, one_by_one, workers):
    slots, digests = read(with_workers(samples, workers), micro_batch=2, world_size=2, first_step=3)
    assert_equal(slots, {slot: one_by_one[0][slot] for slot in range(3 * GLOBAL_BATCH, STEPS * GLOBAL_BATCH)})
    assert digests == {step: one_by_one[1][step] for step in range(3, STEPS)}


def test_the_slots_of_one_record_differ_in_all_that_is_drawn(one_by_one):
    """What the equalities above would not notice: draws that are constant."""
    of_record = defaultdict(list)
    for slot in one_by_one[0].values():
        of_record[slot["keys"]].append(slot)
    assert len(of_record) == len(SIZES)
    for drawn in of_record.values():
        for name in ("pixels", "t", "eps", "posterior_eps"):
            values = [slot[name] for slot in drawn]
            assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i]), name
    captions = [slot["captions"] for slot in one_by_one[0].values()]
    assert 0 < captions.count("") < len(captions) / 2
    assert "a red circle" in captions
    assert any(caption.startswith("picture") for caption in captions)


def test_the_digest_of_a_step_tells_another_seed_and_another_caption(samples, one_by_one):
    _, other_captions = read(changed(samples, seed=SEED + 1), micro_batch=4, world_size=1)
    _, other_order = read(changed(samples, plan=BatchPlan(range(len(SIZES)), SEED + 1)), micro_batch=4, world_size=1)
    for digests in (other_captions, other_order):
        assert sum(digests[step] == one_by_one[1][step] for step in range(STEPS)) <= 1
