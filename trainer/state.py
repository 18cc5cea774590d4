"""Everything that training changes. Together with the config it is the whole run: what a checkpoint holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.ema import Ema


@dataclass
class TrainState:
    """The trainable modules by name, and what follows them from step to step."""

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    scaler: torch.amp.GradScaler | None
    step: int = 0  # optimizer steps done

    def __post_init__(self) -> None:
        self._weights = trainable_weights(self.modules)
        self._swapped = False  # the modules hold the averages, and the averages the weights

    def weights(self) -> Mapping[str, nn.Parameter]:
        """The trainable tensors by dotted name, in a fixed order."""
        return self._weights

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain dicts, floats and tensors, so that torch.load(weights_only=True) reads it back."""
        assert not self._swapped, "weights and averages have changed places"
        return {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.average if self.ema else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Become what `saved` says; raises if its names or shapes are others."""
        for name, module in self.modules.items():
            module.load_state_dict(saved["modules"][name])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, ours in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(ours)  # the config decides; the checkpoint's own settings were compared with it
        for weight, entry in self.optimizer.state.items():
            entry |= {name: _like_weight(weight, value) for name, value in entry.items() if torch.is_tensor(value)}
        if self.ema is not None:
            # Without a saved average (an allowed change of the config) it starts at the loaded weights.
            self.ema.load(saved["ema"] or {name: weight.detach() for name, weight in self._weights.items()})
        if self.scaler is not None and saved["scaler"] is not None:
            self.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the modules hold the EMA weights, if there are any; outside they are as before, to the bit.

        Weights and averages change places, tensor by tensor, so that it takes the memory of the largest one alone.
        """
        if self.ema is None:
            yield
            return
        self._swap(self.ema)
        try:
            yield
        finally:
            self._swap(self.ema)

    @torch.no_grad()
    def _swap(self, ema: Ema) -> None:
        for name, weight in self._weights.items():
            own = weight.clone()
            weight.copy_(ema.average[name])
            ema.average[name].copy_(own)
            del own  # else two copies would be alive at once
        self._swapped = not self._swapped


def trainable_weights(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The weights of `modules` that require a gradient, by dotted name, in a fixed order."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _like_weight(weight: Tensor, value: Tensor) -> Tensor:
    """An optimizer's `value` for a weight, in memory of its own where the weight is.

    Of the weight's strides if it has its shape: fused kernels walk memory, not indices, so a checkpoint of contiguous
    tensors would be read wrong for weights in channels-last order.
    """
    if value.shape == weight.shape:
        return torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)
    # Counts of steps too: those of fused optimizers are read there. A copy also on the CPU, where it would otherwise
    # live in the mapped checkpoint file.
    return value.to(weight.device, copy=True)
