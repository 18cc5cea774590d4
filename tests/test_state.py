"""What a state becomes when it is loaded: on the device and in the order of memory that its weights have."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trainer.optimizers import AdamW, Muon, OptimizerSpec
from trainer.state import TrainState

SPECS = [AdamW(), Muon(adamw_for=())]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3))


def state_of(module: nn.Module, spec: OptimizerSpec) -> TrainState:
    weights = {f"unet.{name}": parameter for name, parameter in module.named_parameters()}
    return TrainState({"unet": module}, spec.build(weights), None, None)


def step(state: TrainState, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in state.weights().values():
        # preserve_format, as autograd makes gradients: of the weight's own order
        weight.grad = torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=generator))
    for group in state.optimizer.param_groups:
        group["lr"] = 0.1
    state.optimizer.step()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_contiguous_state_goes_on_in_channels_last_order(spec: OptimizerSpec):
    one = state_of(network(), spec)
    step(one, 1)
    other = state_of(network().to(memory_format=torch.channels_last), spec)  # pyright: ignore[reportCallIssue]
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    step(one, 2)
    step(other, 2)
    for weight, theirs in zip(one.weights().values(), other.weights().values(), strict=True):
        torch.testing.assert_close(theirs, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_every_tensor_of_the_optimizer_is_where_its_weight_is(spec: OptimizerSpec):
    one = state_of(network(), spec)
    step(one, 1)
    other = state_of(network().to("meta"), spec)  # a device that is not the one of the checkpoint
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.optimizer.state
    for entry in other.optimizer.state.values():
        assert {value.device.type for value in entry.values() if torch.is_tensor(value)} == {"meta"}
