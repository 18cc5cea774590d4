"""Every kind of every family keeps its family's contract. A new kind is picked up here without a change.

Only a kind with a required argument of a new name needs an entry in `REQUIRED` of part_cases.py.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from part_cases import Make, kinds

from trainer.config import Config
from trainer.config_file import load_config
from trainer.data.record import Records, Source
from trainer.hook import CollectiveHook, Hook, MainHook
from trainer.lr import LrLaw
from trainer.models.base import ModelFamily
from trainer.optimizers import OptimizerSpec
from trainer.preflight import preflight
from trainer.registry import Part
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.step import step_unless, step_unless_flagged, train_step
from trainer.timesteps import TimestepLaw
from trainer.training import assemble

FAMILIES = {family.__name__: family for family in Part.__subclasses__()}


def test_every_family_of_the_config_is_known_to_these_tests():
    assert set(FAMILIES) == {
        *(
            "ModelFamily",
            "Source",
            "Objective",
            "Weighting",
            "TimestepLaw",
            "OptimizerSpec",
            "LrLaw",
            "EncodingCache",
            "Hook",
        )
    }
    for family in FAMILIES.values():
        assert family is Hook or family.kinds(), f"{family.__name__} has no kind"


@pytest.mark.parametrize("part", [each for family in FAMILIES.values() for each in kinds(family)])
def test_every_kind_says_what_it_is(part: type[Part]):
    assert part.__doc__
    assert part.__doc__ != part.family.__doc__
    assert part.kinds()[part.kind] is part


SECTIONS = {
    option: name
    for name, field in Config.model_fields.items()
    for option in (field.annotation, *typing.get_args(field.annotation))
    if isinstance(option, type) and issubclass(option, Part)
}
BASE = {
    "model": {"kind": "tiny"},
    "data": {"kind": "shapes", "image_size": 32},
    "train": {"max_steps": 1, "global_batch_size": 1},
    "objective": {"kind": "epsilon"},
    "lr": {"peak": 1e-4},
}


@pytest.mark.parametrize("part", [each for family in FAMILIES.values() for each in kinds(family)])
def test_every_kind_comes_back_from_yaml_as_it_was(part: type[Part], make: Make, write_config: Callable[[str], Path]):
    values = make(part).model_dump(mode="json")
    assert values["kind"] == part.kind
    section = {"hooks": [values]} if part.family is Hook else {SECTIONS[part.family]: values}
    first = load_config(write_config(yaml.safe_dump(BASE | section))).config
    again = load_config(write_config(first.to_yaml())).config
    assert again == first
    assert again.to_yaml() == first.to_yaml()
    assert type(first.hooks[0] if part.family is Hook else getattr(first, SECTIONS[part.family])) is part


# Timestep laws

every_timestep_law = pytest.mark.parametrize("part", kinds(TimestepLaw))


@every_timestep_law
@pytest.mark.parametrize("stratified", [True, False])
def test_drawn_times_lie_in_the_half_open_unit_interval(part: type[TimestepLaw], stratified: bool, make: Make):
    times = make(part, stratified=stratified).draw(0, range(20_000), 16)
    assert all(0 <= t < 1 for t in times)
    assert torch.tensor(times, dtype=torch.float32).max() < 1
    assert len({round(t * 10) for t in times}) > 3  # a law, not a constant


@every_timestep_law
def test_a_quantile_function_rises_and_stays_in_the_unit_interval(part: type[TimestepLaw], make: Make):
    law = make(part)
    quantiles = [law.quantile(u) for u in [0.0, 2**-60, *(i / 1000 for i in range(1, 1000)), 1 - 2**-53]]
    assert quantiles == sorted(quantiles)
    assert 0 <= quantiles[0] < quantiles[-1] <= 1


@every_timestep_law
@pytest.mark.parametrize("stratified", [True, False])
def test_a_drawn_time_depends_on_its_slot_alone(part: type[TimestepLaw], stratified: bool, make: Make):
    law = make(part, stratified=stratified)
    slots = [5, 3, 1000, 17]
    assert law.draw(1, slots, 8) == [law.draw(1, [slot], 8)[0] for slot in slots]
    assert law.draw(1, slots, 8) != law.draw(2, slots, 8)


@every_timestep_law
def test_stratified_draws_follow_the_same_law_as_independent_ones(part: type[TimestepLaw], make: Make):
    means = [
        torch.tensor(make(part, stratified=stratified).draw(0, range(20_000), 16)).mean()
        for stratified in (True, False)
    ]
    assert abs(means[0] - means[1]) < 0.01


@pytest.mark.parametrize("mean", [-800.0, -50.0, 50.0, 800.0])
def test_times_of_an_extreme_law_still_lie_in_the_half_open_unit_interval(mean: float):
    times = TimestepLaw.parse({"kind": "logit_normal", "mean": mean}).draw(0, range(64), 8)
    times = torch.tensor(times, dtype=torch.float32)
    assert (times >= 0).all()
    assert (times < 1).all()
    assert ((times > 0.5) == (mean > 0)).all()


@pytest.mark.parametrize("global_batch", [1, 4, 7, 32])
def test_stratified_times_hit_every_stratum_of_a_batch_once(global_batch: int):
    law = TimestepLaw.parse({"kind": "uniform"})
    offsets = set()
    for step in range(50):
        times = law.draw(0, range(step * global_batch, (step + 1) * global_batch), global_batch)
        assert sorted(int(t * global_batch) for t in times) == list(range(global_batch))
        offsets.add(times[0])
    assert len(offsets) == 50


# Learning rate laws

every_lr_law = pytest.mark.parametrize("part", kinds(LrLaw))


@every_lr_law
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_a_learning_rate_rises_in_a_line_and_stays_within_its_peak(part: type[LrLaw], warmup_steps: int, make: Make):
    law = make(part, peak=3e-4, warmup_steps=warmup_steps)
    rates = [law.rate(step, 100) for step in range(100)]
    assert rates[:warmup_steps] == [3e-4 * (step + 1) / warmup_steps for step in range(warmup_steps)]
    assert max(rates) == 3e-4 == rates[warmup_steps]
    assert all(rate >= 0 for rate in [*rates, law.rate(100, 100), law.rate(1000, 100)])
    assert all(math.isfinite(law.rate(step, 1)) for step in range(20))  # a warm-up that outlasts the run


@every_lr_law
def test_a_learning_rate_says_whether_it_depends_on_the_length(part: type[LrLaw], make: Make):
    law = make(part, warmup_steps=5)
    forwards = [law.rate(step, 50) for step in range(50)]
    backwards = [law.rate(step, 50) for step in reversed(range(50))]
    assert forwards == backwards[::-1]
    longer = [law.rate(step, 80) for step in range(50)]
    assert (longer != forwards) == law.depends_on_max_steps


@every_lr_law
def test_a_falling_learning_rate_ends_at_its_final_fraction(part: type[LrLaw], make: Make):
    if "final_fraction" in part.model_fields:
        law = make(part, peak=1.0, final_fraction=0.1)
        assert law.rate(1000, 1000) == pytest.approx(0.1)
        assert law.rate(500, 1000) == pytest.approx(0.55)  # all there are so far are symmetric about the middle


# Optimizers

every_optimizer = pytest.mark.parametrize("part", kinds(OptimizerSpec))
TAKEN, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


class OneOptimizer:
    """A few parameters, an optimizer over them, and steps whose gradients depend on the step alone."""

    def __init__(self, spec: OptimizerSpec, how: Callable[[torch.optim.Optimizer, torch.Tensor], None] = step_unless):
        self.how = how
        generator = torch.Generator().manual_seed(0)
        shapes = {"linear.weight": (8, 8), "linear.bias": (8,), "conv.weight": (4, 2, 3, 3), "embedding.weight": (5, 8)}
        weights = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
        self.parameters = list(weights.values())
        self.optimizer = spec.build(weights)

    def step(self, number: int, skipped: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01
        for index, parameter in enumerate(self.parameters):
            generator = torch.Generator().manual_seed(100 * number + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if skipped:
                parameter.grad.view(-1)[0] = math.nan
        self.how(self.optimizer, skipped)

    def tensors(self) -> list[torch.Tensor]:
        state = self.optimizer.state_dict()["state"]
        held = [value for key in sorted(state) for _, value in sorted(state[key].items()) if torch.is_tensor(value)]
        return [tensor.detach().clone() for tensor in (*self.parameters, *held)]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("how", [step_unless, step_unless_flagged])
@every_optimizer
def test_a_skipped_step_changes_no_bit_of_weights_and_state(
    part: type[OptimizerSpec], how: Callable[[torch.optim.Optimizer, torch.Tensor], None], make: Make
):
    one = OneOptimizer(make(part), how)
    one.step(0, TAKEN)
    before = one.tensors()
    one.step(1, SKIPPED)
    assert equal(one.tensors(), before)
    one.step(1, TAKEN)
    changed = one.tensors()
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(changed, before, strict=True))
    assert all(torch.isfinite(tensor).all() for tensor in changed)


@pytest.mark.parametrize("how", [step_unless, step_unless_flagged])
@every_optimizer
def test_a_run_whose_first_step_was_skipped_goes_on_as_if_it_had_not_been(part: type[OptimizerSpec], how, make: Make):
    one, other = OneOptimizer(make(part), how), OneOptimizer(make(part))
    one.step(7, SKIPPED)
    for number in range(3):
        one.step(number, TAKEN)
        other.step(number, TAKEN)
    assert equal(one.tensors(), other.tensors())


@every_optimizer
def test_an_optimizer_goes_on_from_its_state_to_the_bit(part: type[OptimizerSpec], make: Make):
    one, other = OneOptimizer(make(part)), OneOptimizer(make(part))
    one.step(0, TAKEN)
    with torch.no_grad():
        for ours, theirs in zip(one.parameters, other.parameters, strict=True):
            theirs.copy_(ours)
    other.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))  # it would share the tensors
    one.step(1, TAKEN)
    other.step(1, TAKEN)
    assert equal(one.tensors(), other.tensors())


# Sources

every_source = pytest.mark.parametrize("part", kinds(Source))


def contents(records: Records) -> list[Any]:
    """What the first records hold: key, captions, and the decoded picture."""
    held = []
    for index in range(min(6, len(records))):
        image = records.image(index)
        assert image.mode == "RGB"
        held.append((records[index], image.size, image.tobytes()))
    return held


@every_source
def test_a_source_reads_the_same_records_each_time_it_is_opened(part: type[Source], make: Make):
    source = make(part)
    records = source.open()
    first = contents(records)
    assert contents(records) == first
    assert contents(source.open()) == first
    assert contents(pickle.loads(pickle.dumps(records))) == first
    assert source.open().fingerprint() == records.fingerprint() == pickle.loads(pickle.dumps(records)).fingerprint()


@every_source
def test_a_source_names_every_record_once_and_captions_it(part: type[Source], make: Make):
    records = make(part).open()
    keys = {records[index].key for index in range(len(records))}
    assert len(keys) == len(records) > 0
    assert all(records[index].captions for index in range(len(records)))
    assert len(pickle.dumps(records)) < 100_000  # every loader worker gets a copy


# Model families

every_family = pytest.mark.parametrize("part", kinds(ModelFamily))
STEPS, BOUND = 12, 0.2


@every_family
@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_a_family_learns_one_batch_by_heart(
    part: type[ModelFamily], train_text_encoder: bool, make: Make, write_config: Callable[[str], Path], tmp_path: Path
):
    model = make(part, train_text_encoder=train_text_encoder).model_dump(mode="json")
    values = BASE | {
        "model": model,
        "data": {"kind": "shapes", "image_size": 32, "num_workers": 0},
        "train": {"seed": 7, "max_steps": STEPS, "global_batch_size": 4},
        "lr": {"peak": 3e-3},
        "ema": {"decay": 0.9},
    }
    checked = preflight(load_config(write_config(yaml.safe_dump(values))), rank=0, world_size=1)
    runtime = Runtime("fp32", deterministic=False)
    try:
        training = assemble(checked, runtime, RunDir(tmp_path / "run"), start=None)
        before = {name: weight.detach().clone() for name, weight in training.state.weights().items()}
        batch = itertools.repeat(next(training.batches(0, 1)))
        losses = [train_step(training, batch).sums[0].item() for _ in range(STEPS)]
        assert 0.5 < losses[0] < 2  # of unit noise, by a network that knows nothing yet
        assert losses[-1] < BOUND
        after = training.state.weights()
        unchanged = [name for name in before if torch.equal(before[name], after[name])]
        assert not unchanged, "trainable, but the loss does not reach it"
        assert any(name.startswith("text_encoder.") for name in before) == train_text_encoder
        assert not any(weight.requires_grad for weight in training.components.vae.parameters())
    finally:
        runtime.close()


@every_family
def test_a_family_counts_the_captions_it_cuts(part: type[ModelFamily], make: Make):
    family = make(part)
    tokens, cut = family.tokenize(family.load(0).tokenizer, ["a cat", "", "cat " * 200])
    assert tokens.shape == (3, family.prompt_chunks, 77)
    assert tokens.dtype == torch.int64
    assert cut == 1
    assert not torch.equal(tokens[0], tokens[1])


# Hooks


def test_every_kind_of_hook_is_for_the_main_rank_or_for_all():
    assert all(issubclass(part, (MainHook, CollectiveHook)) for part in Hook.kinds().values())
