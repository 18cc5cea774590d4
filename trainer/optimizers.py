"""Optimizers by kind. Each is built over fp32 master weights and can skip a step on the device (`found_inf`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from trainer.registry import Part

if TYPE_CHECKING:
    import torch


class OptimizerSpec(Part, home="trainer.optimizers", default_kind="adamw"):
    """How gradients become weight updates; the learning rate is set from `lr` at every step."""

    @abstractmethod
    def build(self, weights: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer over `weights`, by their dotted names; it has no state yet."""


class Adam(OptimizerSpec):
    """The settings of Adam's moments, which every kind here has."""

    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(
        default=0.01, ge=0, description="Decoupled weight decay, multiplied by the learning rate."
    )


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), PyTorch's fused implementation."""

    kind = "adamw"

    def build(self, weights: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(
            weights.values(), lr=0.0, betas=betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


class Muon(Adam):
    """Orthogonalised momentum for matrices and convolutions (Jordan et al. 2024), AdamW for all other weights.

    Scaled so that both take the same learning rate (Liu et al. 2025, eq. 4). From random weights it learns more from
    the same samples than AdamW does (docs/demo.md), at the price of matrix products in every step.
    """

    kind = "muon"

    momentum: float = Field(default=0.95, ge=0, lt=1, description="Decay of the momentum of matrices.")
    adamw_for: tuple[str, ...] = Field(
        default=("embedding.", "conv_in.", "conv_out."),
        description="Parts of the names of weights that take AdamW although they are matrices or convolutions.",
    )

    def build(self, weights: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        from trainer.muon import Muon as MuonOptimizer

        def is_matrix(name: str, weight: torch.nn.Parameter) -> bool:
            return weight.ndim >= 2 and not any(part in name for part in self.adamw_for)

        return MuonOptimizer(
            matrices=[weight for name, weight in weights.items() if is_matrix(name, weight)],
            others=[weight for name, weight in weights.items() if not is_matrix(name, weight)],
            momentum=self.momentum,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
