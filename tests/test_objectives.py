"""Every objective keeps its contract, under every weighting. A new kind is picked up here without a change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from part_cases import Make, kinds

from trainer.objectives.base import Objective
from trainer.objectives.diffusion import DiffusionObjective
from trainer.timesteps import LARGEST_T
from trainer.weighting import Weighting

# Times over the whole range that training draws, and three pictures at each.

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
def test_an_objective_recovers_x0_from_x_t_and_the_target(part: type[Objective], values: dict[str, Any], make: Make):
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
