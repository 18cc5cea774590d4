"""The noise schedules and the sampler, against diffusers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from pydantic import ValidationError
from torch import Tensor

from trainer.objectives.base import Objective, per_image
from trainer.objectives.diffusion import DiffusionObjective
from trainer.sampler import Sampler
from trainer.schedule import ScheduleName, alpha_bars

CPU = torch.device("cpu")
SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
THEIRS: dict[str, Any] = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}


def bars(name: ScheduleName, zero_terminal_snr: bool = False, num_timesteps: int = 1000) -> Tensor:
    return alpha_bars(name, SD["beta_start"], SD["beta_end"], num_timesteps, zero_terminal_snr, CPU)


def objective(kind: str, **values: Any) -> Objective:
    return Objective.parse({"kind": kind, **values})


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
@pytest.mark.parametrize("num_timesteps", [1000, 100])
def test_schedules_are_those_of_diffusers(name: ScheduleName, num_timesteps: int):
    theirs = DDPMScheduler(num_train_timesteps=num_timesteps, beta_schedule=THEIRS[name], **SD)
    # Theirs are products of up to 1000 float32 factors, ours of float64 ones: they part by their rounding.
    torch.testing.assert_close(
        bars(name, num_timesteps=num_timesteps), theirs.alphas_cumprod.float(), rtol=3e-5, atol=1e-8
    )


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
def test_zero_terminal_snr_is_that_of_diffusers_and_ends_without_any_signal(name: ScheduleName):
    betas = DDPMScheduler(beta_schedule=THEIRS[name], **SD).betas
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    torch.testing.assert_close(bars(name, zero_terminal_snr=True), theirs.float(), rtol=1e-3, atol=1e-6)
    assert bars(name, zero_terminal_snr=True)[-1] == 0
    torch.testing.assert_close(bars(name, zero_terminal_snr=True)[0], bars(name)[0])


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
def test_the_signal_only_falls(name: ScheduleName):
    for zero_terminal_snr in (False, True):
        table = bars(name, zero_terminal_snr)
        assert (table.diff() < 0).all()
        assert 0.99 < table[0] < 1


def test_epsilon_with_zero_terminal_snr_is_refused():
    with pytest.raises(ValidationError, match="use v_prediction with zero_terminal_snr"):
        objective("epsilon", zero_terminal_snr=True)
    objective("v_prediction", zero_terminal_snr=True)
    objective("sample", zero_terminal_snr=True)


@pytest.mark.parametrize("num_timesteps", [1000, 17])
def test_every_noise_level_belongs_to_an_equal_share_of_time(num_timesteps: int):
    diffusion = objective("epsilon", num_timesteps=num_timesteps)
    assert isinstance(diffusion, DiffusionObjective)
    centres = (torch.arange(num_timesteps) + 0.5) / num_timesteps
    assert torch.equal(diffusion.level(centres), torch.arange(num_timesteps))
    assert torch.equal(
        diffusion.level(torch.tensor([0.0, 1 - 2**-24, 1.0])), torch.tensor([0, *[num_timesteps - 1] * 2])
    )


def test_what_the_network_is_told_of_time_is_what_it_was_pretrained_with():
    times = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert objective("epsilon").model_time(times).tolist() == [0, 500, 999]
    assert objective("flow").model_time(times).tolist() == pytest.approx([0, 500, 1000])


# The sampler, around networks that are plain functions of (x_t [B, C, h, w], time [B]).

Answer = Callable[[Tensor, Tensor], Tensor]


class Network:
    """What the sampler asks of a model family and of a VAE that leaves pixels as they are, and what it asked."""

    def __init__(self, answer: Answer, guided: Callable[[Tensor], Tensor] = lambda cond: torch.zeros(())):
        self.answer, self.guided = answer, guided
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []
        self.latents = torch.empty(0, 3, 8, 8)

    def latent_shape(self, vae_config: Any, width: int, height: int) -> tuple[int, int, int]:
        return 3, height, width

    def tokenize(self, tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, int]:
        return torch.tensor([[[len(caption)]] for caption in captions]), 0

    def encode_text(self, text_encoder: Any, tokens: Tensor) -> Tensor:
        return tokens[:, 0].float()

    def predict(self, unet: Any, x_t: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        answer = self.answer(x_t, time) + self.guided(cond)
        self.asked.append((x_t, time, answer))
        return answer

    def decode(self, x0: Tensor) -> Tensor:
        self.latents = torch.cat([self.latents, x0])
        return x0.clamp(-1, 1)


def draw(network: Network, of: Objective, steps: int, prompts: Sequence[str] = ("a",), guidance: float = 1.0) -> Any:
    unloaded = dict.fromkeys(("vae", "vae_config", "tokenizer", "text_encoder"))
    components = SimpleNamespace(unet=SimpleNamespace(device=CPU), **unloaded)
    sampler = Sampler(network, components, of, network, 8, steps, guidance)  # pyright: ignore[reportArgumentType]
    return sampler.draw(prompts, 0, range(len(prompts)))


KINDS = sorted(Objective.kinds())


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_network_that_knows_the_picture_the_sampler_reaches_it(kind: str, steps: int):
    of = objective(kind)
    levels = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    x0 = levels / 127.5 - 1

    def oracle(x_t: Tensor, time: Tensor) -> Tensor:
        # The middle of the noise level that `time` names, for a diffusion; the time itself, for a flow.
        t = (time + 0.5) / 1000 if isinstance(of, DiffusionObjective) else time / 1000
        alpha, sigma = per_image(*of.alpha_sigma(t))
        return of.target(x0, (x_t - alpha * x0) / sigma, t)

    network = Network(oracle)
    (picture,) = draw(network, of, steps)
    torch.testing.assert_close(network.latents, x0, rtol=0, atol=1e-3)
    assert np.array_equal(np.asarray(picture), levels[0].permute(1, 2, 0).numpy().astype(np.uint8))
    assert len(network.asked) == steps


def wavy(x_t: Tensor, time: Tensor) -> Tensor:
    """Some network: smooth, bounded, and in need of both of its arguments."""
    return torch.sin(2 * x_t + time.view(-1, 1, 1, 1).float() / 100)


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_step_of_the_sampler_is_the_ddim_step_of_diffusers(kind: str, steps: int):
    network = Network(wavy)
    draw(network, objective(kind), steps)
    settings = SD | {"beta_schedule": "scaled_linear", "clip_sample": False, "prediction_type": kind}
    theirs = DDIMScheduler(**settings)
    theirs.set_timesteps(steps)
    compared = 0
    for (x, time, pred), (next_x, next_time, _) in zip(network.asked, network.asked[1:], strict=False):
        if time - next_time != 1000 // steps:
            assert time == 999  # the first step starts at the last level, one level above a multiple of the stride
            continue
        step = theirs.step(pred, int(time), x)
        torch.testing.assert_close(next_x, step.prev_sample, rtol=1e-4, atol=1e-4)  # pyright: ignore
        compared += 1
    assert compared == steps - 2
    x, time, pred = network.asked[-1]
    last = theirs.step(pred, int(time), x).pred_original_sample  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(network.latents, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [10, 28])
def test_a_step_of_the_sampler_is_the_euler_step_of_diffusers_for_flow(steps: int):
    network = Network(wavy)
    draw(network, objective("flow"), steps)
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[step / steps for step in range(steps, 0, -1)])
    assert isinstance(theirs.timesteps, Tensor)
    reached = [x for x, _, _ in network.asked[1:]] + [network.latents]
    for at, (x, time, pred), next_x in zip(theirs.timesteps, network.asked, reached, strict=True):
        torch.testing.assert_close(time, at.expand(1), rtol=1e-6, atol=0)
        step = theirs.step(pred, at, x)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(next_x, step.prev_sample, rtol=1e-4, atol=1e-4)  # pyright: ignore


def test_guidance_moves_from_the_empty_prompt_past_the_given_one():
    network = Network(lambda x_t, time: torch.zeros_like(x_t), guided=lambda cond: cond.view(-1, 1, 1, 1))
    draw(network, objective("sample"), steps=1, prompts=["four", ""], guidance=3.0)
    assert torch.equal(network.latents[0], torch.full((3, 8, 8), 0 + 3.0 * (4 - 0)))
    assert torch.equal(network.latents[1], torch.zeros(3, 8, 8))


def test_guidance_of_one_asks_the_network_once():
    network = Network(wavy)
    draw(network, objective("flow"), steps=2, prompts=["a", "b"], guidance=1.0)
    assert [len(x) for x, _, _ in network.asked] == [2, 2]


def test_a_picture_depends_on_its_seed_and_place_alone():
    alone, both = Network(wavy), Network(wavy)
    draw(alone, objective("flow"), steps=3, prompts=["a"])
    draw(both, objective("flow"), steps=3, prompts=list("abcdef"))  # more than are drawn at once
    assert len(both.latents) == 6
    assert torch.equal(alone.latents[0], both.latents[0])
    assert not torch.equal(both.latents[0], both.latents[1])
