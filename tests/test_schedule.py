"""The noise schedules and the sampler, against diffusers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL.Image import Image
from pydantic import ValidationError
from torch import Tensor, nn

from trainer.latents import OnlineVae
from trainer.models.base import Components
from trainer.models.tiny import Tiny
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
def test_zero_terminal_snr_is_that_of_diffusers(name: ScheduleName):
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


# The sampler, with the tiny family's VAE and text encoder around denoisers that are plain functions.

Answer = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x_t [B, C, h, w], time [B] and cond [B, tokens, width]
TINY = Tiny()
SHAPE = (4, 8, 8)  # of its latents at 64 pixels


class Denoiser(nn.Module):
    """In the place of the UNet: answers by a function, and keeps what it was asked and answered."""

    device = CPU

    def __init__(self, answer: Answer):
        super().__init__()
        self.answer = answer
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, time: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        self.asked.append((x_t, time, self.answer(x_t, time, encoder_hidden_states)))
        return (self.asked[-1][2],)


class Decoder(OnlineVae):
    """Keeps the latents that it decodes."""

    latents_seen = torch.empty(0, *SHAPE)

    def decode(self, x0: Tensor) -> Tensor:
        self.latents_seen = torch.cat([self.latents_seen, x0])
        return super().decode(x0)


@pytest.fixture(scope="module")
def loaded() -> Components:
    components = TINY.load(0)
    assert components.vae is not None
    assert components.text_encoder is not None
    return components


Draw = Callable[..., tuple[list[Image], Tensor]]


@pytest.fixture
def draw(loaded: Components) -> Draw:
    """Draw prompts with a denoiser: the pictures, and the latents that they were decoded from."""

    def draw(denoiser: Denoiser, of: Objective, steps: int, prompts: Sequence[str] = ("a",), guidance: float = 1.0):
        components = copy(loaded)
        components.unet = denoiser  # pyright: ignore[reportAttributeAccessIssue]
        vae = Decoder(components.vae, "fp32")
        pictures = Sampler(TINY, components, of, vae, 64, steps, guidance).draw(prompts, 0, range(len(prompts)))
        return pictures, vae.latents_seen

    return draw


KINDS = sorted(Objective.kinds())


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_denoiser_that_knows_the_latents_the_sampler_reaches_them(kind: str, steps: int, draw: Draw):
    of = objective(kind)
    x0 = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))

    def oracle(x_t: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        # The middle of the noise level that `time` names, for a diffusion; the time itself, for a flow.
        t = (time + 0.5) / 1000 if isinstance(of, DiffusionObjective) else time / 1000
        alpha, sigma = per_image(*of.alpha_sigma(t))
        return of.target(x0, (x_t - alpha * x0) / sigma, t)

    denoiser = Denoiser(oracle)
    _, latents = draw(denoiser, of, steps)
    torch.testing.assert_close(latents, x0, rtol=0, atol=1e-3)
    assert len(denoiser.asked) == steps


def test_a_picture_is_what_the_vae_decodes_in_256_levels(draw: Draw, loaded: Components):
    (picture,), latents = draw(Denoiser(wavy), objective("flow"), steps=2)
    pixels = OnlineVae(loaded.vae, "fp32").decode(latents)[0]
    assert np.abs(np.asarray(picture) - (pixels.permute(1, 2, 0).numpy() + 1) * 127.5).max() <= 0.5001


def wavy(x_t: Tensor, time: Tensor, cond: Tensor) -> Tensor:
    """Some denoiser: smooth, bounded, and in need of x_t and time."""
    return torch.sin(2 * x_t + time.view(-1, 1, 1, 1).float() / 100)


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_step_of_the_sampler_is_the_ddim_step_of_diffusers(kind: str, steps: int, draw: Draw):
    denoiser = Denoiser(wavy)
    _, latents = draw(denoiser, objective(kind), steps)
    settings = SD | {"beta_schedule": "scaled_linear", "clip_sample": False, "prediction_type": kind}
    theirs = DDIMScheduler(**settings)
    theirs.set_timesteps(steps)
    compared = 0
    for (x, time, pred), (next_x, next_time, _) in zip(denoiser.asked, denoiser.asked[1:], strict=False):
        if time - next_time != 1000 // steps:
            assert time == 999  # the first step starts at the last level, one level above a multiple of the stride
            continue
        step = theirs.step(pred, int(time), x)
        torch.testing.assert_close(next_x, step.prev_sample, rtol=1e-4, atol=1e-4)  # pyright: ignore
        compared += 1
    assert compared == steps - 2
    x, time, pred = denoiser.asked[-1]
    last = theirs.step(pred, int(time), x).pred_original_sample  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(latents, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [10, 28])
def test_a_step_of_the_sampler_is_the_euler_step_of_diffusers_for_flow(steps: int, draw: Draw):
    denoiser = Denoiser(wavy)
    _, latents = draw(denoiser, objective("flow"), steps)
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[step / steps for step in range(steps, 0, -1)])
    assert isinstance(theirs.timesteps, Tensor)
    reached = [x for x, _, _ in denoiser.asked[1:]] + [latents]
    for at, (x, time, pred), next_x in zip(theirs.timesteps, denoiser.asked, reached, strict=True):
        torch.testing.assert_close(time, at.expand(1), rtol=1e-6, atol=0)
        step = theirs.step(pred, at, x)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(next_x, step.prev_sample, rtol=1e-4, atol=1e-4)  # pyright: ignore


def level_of(cond: Tensor) -> Tensor:
    """One number for each prompt, which only its own encoding gives."""
    return cond[:, :, 0].mean(dim=1).view(-1, 1, 1, 1)


def test_guidance_moves_from_the_empty_prompt_past_the_given_one(draw: Draw, loaded: Components):
    denoiser = Denoiser(lambda x_t, time, cond: level_of(cond).expand_as(x_t))
    _, latents = draw(denoiser, objective("sample"), steps=1, prompts=["a red circle", ""], guidance=3.0)
    with torch.no_grad():
        tokens, _ = TINY.tokenize(loaded.tokenizer, ["a red circle", ""])
        under, without = level_of(TINY.encode_text(loaded.text_encoder, tokens))
    assert abs(float(under - without)) > 1e-3
    torch.testing.assert_close(latents[0], (without + 3.0 * (under - without)).expand(SHAPE))
    torch.testing.assert_close(latents[1], without.expand(SHAPE))


def test_guidance_of_one_asks_the_denoiser_once(draw: Draw):
    denoiser = Denoiser(wavy)
    draw(denoiser, objective("flow"), steps=2, prompts=["a", "b"], guidance=1.0)
    assert [len(x) for x, _, _ in denoiser.asked] == [2, 2]


def test_a_picture_depends_on_its_seed_and_place_alone(draw: Draw):
    _, alone = draw(Denoiser(wavy), objective("flow"), steps=3, prompts=["a"])
    _, both = draw(Denoiser(wavy), objective("flow"), steps=3, prompts=list("abcdef"))  # more than are drawn at once
    assert len(both) == 6
    assert torch.equal(alone[0], both[0])
    assert not torch.equal(both[0], both[1])
