from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.ema import Ema, EmaSpec
from trainer.state import TrainState

STEPPED, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def weights(seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (4, 3, 3, 3), "bias": (4,), "scale": ()}
    return {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}


def test_the_average_follows_the_plain_formula():
    spec, start = EmaSpec(decay=0.9, warmup=True), weights(0)
    ema, plain = Ema(spec, start), {name: weight.double() for name, weight in start.items()}
    for step in range(20):
        now = weights(step + 1)
        ema.update(now, step, STEPPED)
        decay = min(0.9, (1 + step) / (10 + step))
        plain = {name: decay * plain[name] + (1 - decay) * now[name].double() for name in plain}
    for name in plain:
        torch.testing.assert_close(ema.average[name].double(), plain[name], rtol=1e-6, atol=1e-6)


def test_the_average_starts_at_the_weights_and_owns_its_memory():
    now = weights(0)
    ema = Ema(EmaSpec(), now)
    now["bias"] += 1
    assert torch.equal(ema.average["bias"], weights(0)["bias"])


def test_the_average_of_trained_weights_grows_no_graph():
    weights: dict[str, torch.Tensor] = {"w": nn.Parameter(torch.ones(3))}
    ema = Ema(EmaSpec(decay=0.5), weights)
    for step in range(3):
        ema.update(weights, step, torch.tensor(0.0))
    assert not ema.average["w"].requires_grad
    assert ema.average["w"].grad_fn is None


def test_warm_up_grows_to_the_decay_and_is_a_function_of_the_step():
    spec = EmaSpec(decay=0.99)
    decays = [spec.decay_at(step) for step in range(2000)]
    assert decays[0] == 1 / 10
    assert decays[90] == 91 / 100
    assert decays == sorted(decays)
    assert decays[-1] == 0.99
    assert spec.decay_at(90) == decays[90]


def test_without_warm_up_the_decay_is_the_same_at_every_step():
    assert {EmaSpec(decay=0.99, warmup=False).decay_at(step) for step in range(100)} == {0.99}


def test_decay_zero_keeps_the_newest_weights():
    ema = Ema(EmaSpec(decay=0.0), weights(0))
    ema.update(weights(1), 5, STEPPED)
    for name, weight in weights(1).items():  # but for the rounding of a + (w - a)
        torch.testing.assert_close(ema.average[name], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay", [0.9999, 0.99])
def test_at_usual_decays_the_average_is_that_of_lerp_to_the_bit(decay: float):
    ema, plain = Ema(EmaSpec(decay=decay, warmup=False), weights(0)), weights(0)
    for step in range(5):
        now = weights(step + 1)
        ema.update(now, step, STEPPED)
        plain = {name: average.lerp(now[name], 1 - decay) for name, average in plain.items()}
    assert all(torch.equal(ema.average[name], average) for name, average in plain.items())


def test_the_average_of_weights_in_channels_last_order_follows_them():
    strided = {"conv": torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)}
    ema = Ema(EmaSpec(decay=0.5, warmup=False), strided)
    ema.load({"conv": torch.zeros(8, 4, 3, 3)})  # as a checkpoint of contiguous weights has them
    ema.update(strided, 0, STEPPED)
    assert ema.average["conv"].stride() == strided["conv"].stride()
    assert torch.equal(ema.average["conv"], strided["conv"] / 2)


def test_a_skipped_step_changes_no_bit_of_the_average():
    ema = Ema(EmaSpec(decay=0.9), weights(0))
    broken = {name: torch.full_like(weight, float("nan")) for name, weight in weights(1).items()}
    for now in (weights(1), broken):
        ema.update(now, 0, SKIPPED)
        assert all(torch.equal(ema.average[name], weight) for name, weight in weights(0).items())


@pytest.mark.cuda
def test_on_a_gpu_a_skipped_step_changes_no_bit_of_the_average():
    host, device = Ema(EmaSpec(decay=0.9), weights(0)), Ema(EmaSpec(decay=0.9), weights(0, "cuda"))
    for step, skipped in enumerate((STEPPED, SKIPPED, STEPPED)):
        before = {name: average.clone() for name, average in device.average.items()}
        host.update(weights(step + 1), step, skipped)
        device.update(weights(step + 1, "cuda"), step, skipped.cuda())
        for name, average in device.average.items():
            assert torch.equal(average, before[name]) == bool(skipped)
            torch.testing.assert_close(average.cpu(), host.average[name], rtol=1e-6, atol=1e-6)


def small_state(ema: bool) -> TrainState:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    network[1].requires_grad_(False)
    state = TrainState({"unet": network}, torch.optim.SGD(network.parameters(), 0.1), None, None)
    if ema:
        state.ema = Ema(EmaSpec(decay=0.5), {name: weight + 1 for name, weight in state.weights().items()})
    return state


def test_averaged_weights_are_in_the_modules_only_inside_the_context():
    state = small_state(ema=True)
    assert state.ema is not None
    own = {name: weight.detach().clone() for name, weight in state.weights().items()}
    assert list(own) == ["unet.0.weight", "unet.0.bias"]  # the frozen layer is no trainable weight
    averages = {name: average.clone() for name, average in state.ema.average.items()}
    with state.averaged():
        assert all(torch.equal(weight, averages[name]) for name, weight in state.weights().items())
        with pytest.raises(AssertionError, match="changed places"):
            state.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in state.weights().items())
    assert all(torch.equal(average, averages[name]) for name, average in state.ema.average.items())


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that operations within it made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.clone:
            self.bytes += result.nbytes
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(result, self.release, result.nbytes)
        return result

    def release(self, size: int) -> None:
        self.bytes -= size


def test_averaged_weights_take_the_memory_of_one_more_tensor():
    state = small_state(ema=True)
    largest = max(weight.nbytes for weight in state.weights().values())
    with Held() as held, state.averaged():
        pass
    assert held.peak == largest < sum(weight.nbytes for weight in state.weights().values())


def test_averaged_weights_are_taken_out_again_after_an_error():
    state = small_state(ema=True)
    own = {name: weight.detach().clone() for name, weight in state.weights().items()}
    with pytest.raises(KeyError), state.averaged():
        raise KeyError("a hook failed")
    assert all(torch.equal(weight, own[name]) for name, weight in state.weights().items())


def test_without_an_average_the_context_leaves_the_weights_as_they_are():
    state = small_state(ema=False)
    before = {name: weight.detach().clone() for name, weight in state.weights().items()}
    with state.averaged():
        assert all(torch.equal(weight, before[name]) for name, weight in state.weights().items())


def test_the_average_comes_back_from_a_state_dict_to_the_bit():
    state, other = small_state(ema=True), small_state(ema=True)
    assert state.ema is not None
    assert other.ema is not None
    state.ema.update(state.weights(), 0, STEPPED)
    other.load_state_dict(state.state_dict())
    assert all(torch.equal(other.ema.average[name], average) for name, average in state.ema.average.items())
