"""Optimizers by kind. Each is built over fp32 master weights and can skip a step on the device (`found_inf`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import Field

from trainer.registry import Part

if TYPE_CHECKING:
    import torch


class OptimizerSpec(Part, home="trainer.optimizers", default_kind="adamw"):
    """How gradients become weight updates; the learning rate is set from `lr` at every step."""

    @abstractmethod
    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer over `parameters`, with no state yet."""


class AdamW(OptimizerSpec):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), PyTorch's fused implementation."""

    kind = "adamw"

    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(
        default=0.01, ge=0, description="Decoupled weight decay, multiplied by the learning rate."
    )

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            parameters, lr=0.0, betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay, fused=True
        )
