"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices and convolutions.

PyTorch's own takes matrices alone, no convolutions, and orthogonalises in bf16, which a CPU without bf16 arithmetic has
to emulate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: singular values end between 0.7 and 1.2
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Two groups: `matrices` (two or more dimensions) by orthogonalised momentum, `others` by AdamW.

    With `found_inf` set, a 0-dim float32 tensor on the weights' device, a step changes no bit where it is 1, and waits
    for no device to find out. On CUDA matrices are orthogonalised in bf16, as Jordan does.
    """

    _step_supports_amp_scaling = True  # as torch's fused optimizers say that they read the flag
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
    _skips: Tensor | None = None  # `found_inf` of this step, as a bool

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        groups = [
            {"params": list(matrices), "momentum": momentum},
            {"params": list(others), "betas": betas, "eps": eps, "fused": True},  # its step counts live on the device
        ]
        # An empty group, as of a model without vectors, is left out: torch refuses it.
        super().__init__([group for group in groups if group["params"]], {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every weight that has a gradient."""
        assert closure is None, "the loss is computed once, before the step"
        assert self.grad_scale is None, "gradients are unscaled before the step"
        self._skips = None if self.found_inf is None else self.found_inf.bool()
        for group in self.param_groups:
            (self._step_matrices if "momentum" in group else self._step_others)(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)  # those of one shape are one batch
        for weight in weights:
            momentum = self.state[weight]["momentum"]
            self._put(momentum, momentum.lerp(weight.grad, 1 - group["momentum"]))
            alike[weight.flatten(1).shape].append(weight)
        for shape, batch in alike.items():
            momenta = torch.stack([self.state[weight]["momentum"].flatten(1) for weight in batch])
            gradients = torch.stack([weight.grad.flatten(1) for weight in batch if weight.grad is not None])
            updates = orthogonalised(gradients.lerp_(momenta, group["momentum"]))  # Nesterov's momentum
            # Liu et al. 2025, eq. 4: the update's root mean square is then about that of AdamW, 0.2 times lr.
            updates *= -0.2 * math.sqrt(max(shape)) * group["lr"]
            for weight, update in zip(batch, updates, strict=True):
                self._put(weight, weight.mul(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(weight)))

    def _put(self, tensor: Tensor, new: Tensor) -> None:
        """Give `tensor` new values, unless this step is skipped; not by a product, for NaN times 0 is NaN."""
        tensor.copy_(new if self._skips is None else torch.where(self._skips, tensor, new))

    def _step_others(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {
                    "step": torch.zeros((), device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        states = [self.state[weight] for weight in weights]
        adamw(
            weights,
            [weight.grad for weight in weights],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            found_inf=self.found_inf,
        )


def orthogonalised(matrices: Tensor) -> Tensor:
    """`matrices` [N, rows, columns] with every singular value moved to about 1: Jordan's Newton-Schulz iteration."""
    return in_bf16(matrices) if matrices.is_cuda else in_fp32(matrices)


def in_bf16(matrices: Tensor) -> Tensor:
    """The iteration in its usual form, X <- a X + (b A + c A A) X with A = X X^T, every product in bf16.

    Not by way of X X^T alone, which squares the singular values: bf16 would lose the smaller ones.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return in_bf16(matrices.mT).mT
    a, b, c = QUINTIC
    x = (matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)).bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def in_fp32(matrices: Tensor) -> Tensor:
    """The same in fewer products of the matrices' own precision, which on a CPU are what it costs.

    Each iteration multiplies X by a polynomial P of X X^T, so all of them together are one product Q X. Q is worked out
    on X X^T alone, which is the smaller the longer X is: a convolution's costs a third of the usual form.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return in_fp32(matrices.mT).mT
    a, b, c = QUINTIC
    gram = matrices @ matrices.mT
    square_norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] + 1e-14
    gram = gram / square_norm
    total = None
    for last in (False,) * (ITERATIONS - 1) + (True,):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        total = polynomial if total is None else polynomial @ total
        if not last:
            gram = polynomial @ (polynomial @ gram)
    assert total is not None, "at least one iteration"
    return (total / square_norm.sqrt()) @ matrices
