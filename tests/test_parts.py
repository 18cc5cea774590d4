"""Every kind of every family keeps its family's contract. A new kind is picked up here without a change.

Only a kind with a required argument of a new name needs an entry in `REQUIRED`.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainer.config import Config
from trainer.config_file import load_config
from trainer.data.dummy import write_dummy_imagefolder
from trainer.data.record import Records, Source
from trainer.hook import CollectiveHook, Hook, MainHook
from trainer.lr import LrLaw
from trainer.models.base import ModelFamily
from trainer.models.folder import save_diffusers_folder
from trainer.objectives.base import Objective
from trainer.objectives.diffusion import DiffusionObjective
from trainer.optimizers import OptimizerSpec
from trainer.preflight import preflight
from trainer.registry import Part
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.step import step_unless, step_unless_flagged, train_step
from trainer.timesteps import LARGEST_T, TimestepLaw
from trainer.training import assemble
from trainer.weighting import Weighting


def _pictures(folder: Path) -> str:
    write_dummy_imagefolder(folder / "pictures", num_images=6, image_size=40)
    return str(folder / "pictures")


def _pretrained(folder: Path) -> str:
    save_diffusers_folder(ModelFamily.parse({"kind": "tiny"}).load(0), folder / "model")
    return str(folder / "model")


# The values of arguments that some kind requires, by name; each is made once, below a folder of its own.
REQUIRED: dict[str, Callable[[Path], Any]] = {
    "image_size": lambda folder: 32,
    "peak": lambda folder: 1e-3,
    "data_root": _pictures,
    "pretrained": _pretrained,
}
FAMILIES = {family.__name__: family for family in Part.__subclasses__()}


def kinds(family: type[Part]) -> list[Any]:
    return [pytest.param(part, id=kind) for kind, part in family.kinds().items()]


Make = Callable[..., Any]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Build a kind, with what it requires beyond the given values."""
    made: dict[str, Any] = {}

    def build(part: type[Part], **values: Any) -> Part:
        for name, field in part.model_fields.items():
            if field.is_required() and name not in values:
                if name not in made:
                    made[name] = REQUIRED[name](tmp_path_factory.mktemp(name))
                values[name] = made[name]
        return part(**values)

    return build


def test_every_family_of_the_config_is_known_to_these_tests():
    assert set(FAMILIES) == {
        *("ModelFamily", "Source", "Objective", "Weighting", "TimestepLaw", "OptimizerSpec", "LrLaw", "Hook")
    }
    for family in FAMILIES.values():
        assert family is Hook or family.kinds(), f"{family.__name__} has no kind"


@pytest.mark.parametrize("part", [each for family in FAMILIES.values() for each in kinds(family)])
def test_every_kind_says_what_it_is(part: type[Part]):
    assert part.__doc__
    assert part.__doc__ != part.family.__doc__
    assert part.kinds()[part.kind] is part


SECTIONS = {
    field.annotation: name
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Part)
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


# Objectives. Times over the whole range that training draws, and three pictures at each.

TIMES = torch.cat([torch.tensor([0.0, LARGEST_T]), torch.linspace(0.001, 0.999, 62)])


def objective_variants() -> list[Any]:
    """Each kind as it stands, and the diffusion kinds under every schedule."""
    variants = []
    for kind, part in Objective.kinds().items():
        variants.append(pytest.param(part, {}, id=kind))
        if issubclass(part, DiffusionObjective):
            for schedule in ("linear", "cosine"):
                variants.append(pytest.param(part, {"schedule": schedule}, id=f"{kind}-{schedule}"))
            if kind != "epsilon":
                variants.append(pytest.param(part, {"zero_terminal_snr": True}, id=f"{kind}-zero_terminal_snr"))
    return variants


every_objective = pytest.mark.parametrize("part, values", objective_variants())


def latents(seed: int, times: torch.Tensor = TIMES, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(len(times), 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@every_objective
def test_an_objective_recovers_the_data_from_the_noisy_data_and_the_target(
    part: type[Objective], values: dict[str, Any], make: Make
):
    objective, x0, eps = make(part, **values), latents(0), latents(1)
    x_t, target = objective.corrupt(x0, eps, TIMES)
    assert x_t.shape == target.shape == x0.shape
    # An error of the target, its rounding included, is 1 / sqrt(x0_factor) times as large in x0.
    well_posed = objective.x0_factor(TIMES) > 1e-3
    assert well_posed.sum() > len(TIMES) / 2
    found = objective.x0(x_t, target, TIMES)
    torch.testing.assert_close(found[well_posed], x0[well_posed], rtol=0, atol=1e-4)


@every_objective
def test_an_objective_mixes_in_noise_by_its_alpha_and_sigma(part: type[Objective], values: dict[str, Any], make: Make):
    objective, x0, eps = make(part, **values), latents(0), latents(1)
    alpha, sigma = objective.alpha_sigma(TIMES)
    x_t, _ = objective.corrupt(x0, eps, TIMES)
    expected = [a * x + s * e for a, s, x, e in zip(alpha, sigma, x0, eps, strict=True)]
    torch.testing.assert_close(x_t, torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert (alpha >= 0).all()
    assert (sigma >= 0).all()
    torch.testing.assert_close(objective.snr(TIMES), alpha**2 / sigma**2)


@every_objective
def test_a_path_keeps_the_variance_or_is_straight(part: type[Objective], values: dict[str, Any], make: Make):
    alpha, sigma = make(part, **values).alpha_sigma(TIMES)
    keeps_variance = torch.allclose(alpha**2 + sigma**2, torch.ones(len(TIMES)), atol=1e-6)
    straight = torch.allclose(alpha + sigma, torch.ones(len(TIMES)), atol=1e-6)
    assert keeps_variance if issubclass(part, DiffusionObjective) else straight or keeps_variance
    if part.kind == "flow":
        assert straight


@every_objective
def test_the_loss_of_an_objective_is_per_sample_and_zero_at_the_target(
    part: type[Objective], values: dict[str, Any], make: Make
):
    objective = make(part, **values)
    _, target = objective.corrupt(latents(0), latents(1), TIMES)
    assert torch.equal(objective.loss(target, target), torch.zeros(len(TIMES)))
    pred = target.clone()
    pred[3] += 1
    loss = objective.loss(pred.bfloat16().float(), target.bfloat16().float())
    assert loss.shape == (len(TIMES),)
    assert loss.dtype == torch.float32
    assert loss.nonzero().tolist() == [[3]]
    single = objective.loss(pred[3:4], target[3:4])
    torch.testing.assert_close(objective.loss(pred, target)[3:4], single)


@every_objective
def test_x0_factor_is_the_loss_over_the_loss_of_the_data_that_it_means(
    part: type[Objective], values: dict[str, Any], make: Make
):
    times = torch.linspace(0.02, 0.9, 40)
    objective = make(part, **values)
    x0, eps, wrong = (latents(seed, times, torch.float64) for seed in range(3))
    x_t, target = objective.corrupt(x0, eps, times)
    pred = target + wrong
    of_x0 = objective.loss(objective.x0(x_t, pred, times), objective.x0(x_t, target, times))
    torch.testing.assert_close(objective.x0_factor(times), objective.loss(pred, target) / of_x0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("law", kinds(Weighting))
@every_objective
def test_every_weight_of_every_objective_is_finite_and_not_negative(
    part: type[Objective], values: dict[str, Any], law: type[Weighting], make: Make
):
    objective = make(part, **values)
    weight = make(law).weight(objective.snr(TIMES), objective.x0_factor(TIMES))
    assert weight.shape == (len(TIMES),)
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()


@pytest.mark.parametrize(
    ("kind", "published"),
    [
        ("epsilon", lambda snr, gamma: snr.clamp(max=gamma) / snr),
        ("v_prediction", lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1)),
        ("sample", lambda snr, gamma: snr.clamp(max=gamma)),
    ],
)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_published_form_of_each_objective(kind: str, published: Any, gamma: float):
    objective, weighting = Objective.parse({"kind": kind}), Weighting.parse({"kind": "min_snr", "gamma": gamma})
    snr = objective.snr(TIMES)
    assert snr.min() < 1 < 5 < snr.max()
    torch.testing.assert_close(weighting.weight(snr, objective.x0_factor(TIMES)), published(snr, gamma))


def test_uniform_weighting_leaves_the_loss_as_it_is():
    snr = torch.tensor([0.0, 1.0, math.inf])
    assert torch.equal(Weighting.parse({"kind": "uniform"}).weight(snr, snr), torch.ones(3))


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
def test_stratified_uniform_times_hit_every_stratum_of_the_global_batch_once(global_batch: int):
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
def test_a_learning_rate_rises_in_a_line_to_its_peak_and_never_leaves_it_upwards_or_below_zero(
    part: type[LrLaw], warmup_steps: int, make: Make
):
    law = make(part, peak=3e-4, warmup_steps=warmup_steps)
    rates = [law.rate(step, 100) for step in range(100)]
    assert rates[:warmup_steps] == [3e-4 * (step + 1) / warmup_steps for step in range(warmup_steps)]
    assert max(rates) == 3e-4 == rates[warmup_steps]
    assert all(rate >= 0 for rate in [*rates, law.rate(100, 100), law.rate(1000, 100)])
    assert all(math.isfinite(law.rate(step, 1)) for step in range(20))  # a warm-up that outlasts the run


@every_lr_law
def test_a_learning_rate_is_a_function_of_the_step_and_says_if_it_is_one_of_the_length_too(
    part: type[LrLaw], make: Make
):
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
        self.parameters = [
            torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 8), (8,), (4, 2, 3, 3))
        ]
        self.optimizer = spec.build(self.parameters)

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
def test_a_skipped_step_changes_no_bit_of_weights_and_state_and_a_taken_one_does(
    part: type[OptimizerSpec], how: Callable[[torch.optim.Optimizer, torch.Tensor], None], make: Make
):
    one = OneOptimizer(make(part), how)
    if how is step_unless_flagged and not getattr(one.optimizer, "_step_supports_amp_scaling", False):
        pytest.skip("this optimizer cannot read the flag on the device")
    one.step(0, TAKEN)
    before = one.tensors()
    one.step(1, SKIPPED)
    assert equal(one.tensors(), before)
    one.step(1, TAKEN)
    changed = one.tensors()
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(changed, before, strict=True))
    assert all(torch.isfinite(tensor).all() for tensor in changed)


@every_optimizer
def test_a_run_whose_first_step_was_skipped_goes_on_as_if_it_had_not_been(part: type[OptimizerSpec], make: Make):
    one, other = OneOptimizer(make(part)), OneOptimizer(make(part))
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
def test_a_source_reads_the_same_records_twice_and_after_reopening_and_in_another_process(
    part: type[Source], make: Make
):
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
    training = assemble(checked, Runtime("fp32", deterministic=False), RunDir(tmp_path / "run"), start=None)
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


# Plug-ins: a module beside the config, in a process of its own, since a kind once defined stays.

PLUGIN = '''
from trainer.hook import MainHook
from trainer.objectives.base import Objective
from trainer.weighting import Weighting


class Shifted(Objective):
    """A straight path whose target is the noise."""

    kind = "shifted"

    def alpha_sigma(self, t):
        return 1 - t, t

    def model_time(self, t):
        return 1000 * t

    def target(self, x0, eps, t):
        return eps

    def x0(self, x_t, pred, t):
        return (x_t - t.view(-1, 1, 1, 1) * pred) / (1 - t).view(-1, 1, 1, 1)

    def x0_factor(self, t):
        return ((1 - t) / t).square()


class Halves(Weighting):
    """Half of everything."""

    kind = "halves"

    share: float = 0.5

    def weight(self, snr, x0_factor):
        return self.share * snr.new_ones(snr.shape)


class Diary(MainHook):
    """Writes the step of every line."""

    kind = "diary"

    name: str = "diary.txt"

    def on_metrics(self, view, lines):
        with open(view.folder / self.name, "a") as file:
            file.writelines(f"{line['step']}\\n" for line in lines)
'''

PLUGGED = """
plugins: [my_losses]
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 16}
train: {max_steps: 3, global_batch_size: 2, log_every: 1}
objective: {kind: shifted}
weighting: {kind: halves, share: 0.25}
lr: {peak: 1e-4}
hooks: [{kind: diary, name: seen.txt}]
"""


def difftrain(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_module_beside_the_config_adds_an_objective_a_weighting_and_a_hook(
    tmp_path: Path, write_config: Callable[[str], Path]
):
    (tmp_path / "my_losses.py").write_text(PLUGIN)
    done = difftrain(tmp_path, "train", "--config", str(write_config(PLUGGED)), "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "shifted, halves weighting" in done.stdout
    assert (tmp_path / "run" / "seen.txt").read_text().split() == ["1", "2", "3"]
    resolved = (tmp_path / "run" / "config.resolved.yaml").read_text()
    assert "my_losses" in resolved
    assert "share: 0.25" in resolved
    assert "name: seen.txt" in resolved
    again = difftrain(tmp_path, "validate", "--config", "run/config.resolved.yaml", "--output-dir", "other")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "other" / "config.resolved.yaml").read_text() == resolved.replace(
        "output_dir: run", "output_dir: other"
    )


def test_a_kind_that_exists_already_is_refused(tmp_path: Path, write_config: Callable[[str], Path]):
    (tmp_path / "my_losses.py").write_text(PLUGIN.replace('"shifted"', '"epsilon"'))
    done = difftrain(
        tmp_path,
        "validate",
        "--config",
        str(write_config(PLUGGED.replace("shifted", "epsilon"))),
        "--output-dir",
        "run",
    )
    assert done.returncode == 2
    assert "objective kind 'epsilon' is defined twice" in done.stderr
    assert "my_losses" in done.stderr
    assert "trainer.objectives.epsilon" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_plugin_that_is_not_there_is_refused_with_its_line(tmp_path: Path, write_config: Callable[[str], Path]):
    config = write_config(PLUGGED)
    done = difftrain(tmp_path, "validate", "--config", str(config), "--output-dir", "run")
    assert done.returncode == 2
    assert "my_losses" in done.stderr
    assert f"{config}:2" in done.stderr
    assert "Traceback" not in done.stderr
