"""A run is a function of its config and its step: however it is cut over ranks and starts, and whatever breaks it."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import checkpoint, ended, finish, manifest, metrics, same, same_run, saved

from trainer.hooks.checkpointing import tensors
from trainer.models.tiny import Tiny

# 10 records and batches of 4: most steps begin in the middle of an epoch, and half of them run over its end.
CONFIG = """\
plugins: [plugged]
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 10, caption_dropout: 0.2, random_flip: true}
train: {seed: 7, max_steps: 20, global_batch_size: 4, micro_batch_size: 1, log_every: 3}
objective: {kind: watched}
lr: {kind: constant, peak: 1e-3, warmup_steps: 3}
ema: {decay: 0.9}
checkpoint: {every_steps: 5, keep_last: 2}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the config in it."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def train(folder: Path, name: str, *overrides: str) -> int:
    return runs.train(folder / "config.yaml", folder / name, "--resume", "auto", "--set", *overrides)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `run`: 20 steps of one process, 4 micro batches of one image each, and of `fed-0`."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "config.yaml").write_text(CONFIG)
    said = finish(folder, "run", WATCH="fed")
    assert "batch  4 images = 1 image x 1 rank x 4 accumulation" in said
    return folder


def fed(folder: Path, name: str, ranks: int = 1) -> list[str]:
    """What the objective was fed, in the order of the slots: one image a micro batch, dealt to the ranks in turn."""
    of_rank = [(folder / f"{name}-{rank}").read_text().splitlines() for rank in range(ranks)]
    return [sample for turn in zip(*of_rank, strict=True) for sample in turn]


def assert_equal_but_for_rounding(run: Path, other: Path) -> None:
    """Sums over ranks and micro batches are rounded in another order; all else in the metrics is equal."""
    for a, b in zip(metrics(run), metrics(other), strict=True):
        assert a.pop("loss") == pytest.approx(b.pop("loss"), rel=1e-5), a["step"]
        assert a.pop("grad_norm") == pytest.approx(b.pop("grad_norm"), rel=1e-4), a["step"]
        assert a.get("batch"), "a digest of the slots, records and captions of the step"
        assert a == b


def largest_difference(run: Path, other: Path, step: int) -> float:
    """Of any weight of the UNet."""
    a, b = (checkpoint(path, step)["modules"]["unet"] for path in (run, other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# Where a gradient is nothing but rounding, Adam, which divides it by its own size, could turn other rounding into a
# whole step of lr = 1e-3. No weight of this UNet has such a gradient: 20 steps drift apart by 2.4e-7. A sample fed
# twice, or with other noise, moves nearly every weight by more than this bound in one step.
DRIFT = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_and_accumulation_cut_a_batch_in_any_way(folder, unbroken, ranks):
    said = finish(folder, "run", WATCH="fed", ranks=ranks)
    assert f"batch  4 images = 1 image x {ranks} ranks x {4 // ranks} accumulation" in said
    assert len(fed(unbroken, "fed")) == 80
    assert fed(folder, "fed", ranks) == fed(unbroken, "fed"), "time, noise and latents of each slot, to the bit"
    assert_equal_but_for_rounding(folder / "run", unbroken / "run")
    assert largest_difference(folder / "run", unbroken / "run", 20) < DRIFT


@pytest.mark.slow
def test_starts_on_2_1_and_2_ranks_in_mid_epoch_are_one_run(folder, unbroken):
    finish(folder, "run", "train.max_steps=7", "train.micro_batch_size=1", "data.num_workers=0", ranks=2)
    finish(folder, "run", "train.max_steps=14", "train.micro_batch_size=4", "data.num_workers=2")
    finish(folder, "run", "train.max_steps=20", "train.micro_batch_size=2", "data.num_workers=1", ranks=2)
    starts = [(start["from_step"], start["topology"]) for start in manifest(folder / "run")["starts"]]
    assert [step for step, _ in starts] == [0, 7, 14]
    dealt = [(deal["world_size"], deal["micro_batch_size"], deal["accumulation"]) for _, deal in starts]
    assert dealt == [(2, 1, 2), (1, 4, 1), (2, 2, 1)]
    assert_equal_but_for_rounding(folder / "run", unbroken / "run")
    assert largest_difference(folder / "run", unbroken / "run", 20) < DRIFT


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_kill_in_mid_accumulation_costs_steps_and_no_bit(folder, unbroken, workers):
    loading = f"data.num_workers={workers}"
    code, said = ended(folder, "run", loading, KILL_AT="50")  # the second micro batch of step 13
    assert code == -signal.SIGKILL, said
    assert [line["step"] for line in metrics(folder / "run")] == list(range(1, 13))
    assert "at step 10" in finish(folder, "run", loading, WATCH="fed")
    assert fed(folder, "fed") == fed(unbroken, "fed")[40:]
    assert same_run(folder / "run", unbroken / "run", 20)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_on_one_rank_skips_the_step_on_all(folder):
    options = ["objective.kind=not_a_number", "hooks=[{kind: rank_weights}]", "train.max_bad_steps=3"]
    options += ["train.micro_batch_size=2", "train.log_every=1", "checkpoint.every_steps=1", "checkpoint.keep_last=9"]
    code, said = ended(folder, "run", *options, ranks=2)
    run = folder / "run"
    assert code == 76
    assert "not finite in 3 steps in a row" in said
    assert (manifest(run)["status"]["state"], manifest(run)["status"]["exit_code"]) == ("diverged", 76)
    lines = metrics(run)
    assert [line["step"] for line in lines if line["skipped"]] == [3, 6, 7, 8]
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 6, 7, 8]
    assert len(lines) == 8

    of_rank = [(folder / f"weights-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert of_rank[0] == of_rank[1], "the ranks hold the same weights after every step"
    changed = [step for step in range(2, 9) if of_rank[0][step - 1] != of_rank[0][step - 2]]
    assert changed == [2, 4, 5]

    assert saved(run) == list(range(1, 9))
    contents = {step: checkpoint(run, step) for step in range(1, 9)}
    for content in contents.values():
        assert all(torch.isfinite(tensor).all() for tensor in tensors(content))
    for skipped in (3, 6, 7, 8):
        before, after = contents[skipped - 1], contents[skipped]
        assert same([before["modules"], before["ema"]], [after["modules"], after["ema"]])
        assert same(before["optimizer"]["state"], after["optimizer"]["state"])


def test_ranks_accumulate_in_the_memory_of_ddps_buckets(folder):
    options = ["objective.kind=placed", "hooks=[{kind: gradient_places}]", "train.max_steps=4"]
    finish(folder, "run", *options, ranks=2)
    for rank in (0, 1):
        places = (folder / f"places-{rank}").read_text().splitlines()  # of two micro batches a step
        assert len(places) == 8
        assert len(set(places[4:])) == 1, "DDP lays its buckets anew after the first step"


@pytest.mark.usefixtures("plugins")
def test_a_run_that_trains_part_of_a_network_resumes_to_the_bit(folder):
    options = ["model.kind=attention_only", "objective.kind=epsilon", "checkpoint.every_steps=2"]
    options += ["train.micro_batch_size=2"]
    assert train(folder, "whole", *options, "train.max_steps=7") == 0
    assert train(folder, "broken", *options, "train.max_steps=3") == 0
    assert train(folder, "broken", *options, "train.max_steps=5", "data.num_workers=2") == 0
    for newest in (folder / "broken").glob("checkpoint-5.*"):
        newest.unlink()  # as a kill during step 5 would have it, its line written: the next start goes back to step 4
    assert train(folder, "broken", *options, "train.max_steps=7") == 0
    assert [start["from_step"] for start in manifest(folder / "broken")["starts"]] == [0, 3, 4]

    assert same_run(folder / "whole", folder / "broken", 7)
    whole = checkpoint(folder / "whole", 7)
    first, last = Tiny().load(7).unet.state_dict(), whole["modules"]["unet"]
    changed = {name for name in last if not torch.equal(first[name], last[name])}
    assert changed == {name for name in last if ".attn" in name and ".to_" in name}
    assert 0 < len(changed) < len(last) / 2
    assert whole["ema"].keys() == {f"unet.{name}" for name in changed}
    assert len(whole["optimizer"]["state"]) == len(changed)
    assert sum(len(group["params"]) for group in whole["optimizer"]["param_groups"]) == len(changed)


def sha256(content: dict[str, Any]) -> str:
    """Of all weights and their averages in a checkpoint."""
    digest = hashlib.sha256()
    for tensor in tensors([content["modules"], content["ema"]]):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.usefixtures("plugins")
def test_two_deterministic_runs_end_with_one_hash_of_their_weights(folder):
    options = ["train.deterministic=true", "objective.kind=epsilon", "train.max_steps=4", "checkpoint.every_steps=3"]
    for name in ("one", "other"):
        assert train(folder, name, *options) == 0
    one, other = ([sha256(checkpoint(folder / name, step)) for step in (3, 4)] for name in ("one", "other"))
    assert one == other
    assert one[0] != one[1], "a hash that tells one step"


@pytest.mark.usefixtures("plugins")
def test_a_deterministic_run_refuses_an_operation_that_is_not(folder):
    options = ["objective.kind=put", "train.max_steps=2"]
    code, said = ended(folder, "refused", *options, "train.deterministic=true")
    assert code == 2
    assert "put_ has no deterministic implementation on this device\n  in train.deterministic\n" in said
    assert "Traceback" not in said
    assert train(folder, "allowed", *options, "train.deterministic=false") == 0
