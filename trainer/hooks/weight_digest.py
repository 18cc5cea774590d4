"""A hash of the weights in the metrics, so that two runs can be compared to the bit without their checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainer.hook import CollectiveHook

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.training import Training


class WeightDigest(CollectiveHook):
    """Adds `weights_sha256` to the metrics line: of every trained tensor, which is copied to the host for it."""

    kind = "weight_digest"
    repeatable: ClassVar[bool] = True

    every_steps: int = Field(
        default=100,
        ge=1,
        description="Optimizer steps between two hashes; each copies all weights from the device.",
    )

    def due(self, step: int, last: bool) -> bool:
        return step % self.every_steps == 0

    def measure(self, training: Training) -> dict[str, Any]:
        return {"weights_sha256": sha256_of(training.state.weights().values())}


def sha256_of(tensors: Iterable[Tensor]) -> str:
    """The sha256 of the bytes of `tensors`, of any type and device, in their order: 64 hex digits."""
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
