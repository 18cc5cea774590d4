"""Objectives that are watched, killed or spoilt, a hook that hashes weights, a family that trains a part of a network.

The environment says which: WATCH, KILL_AT.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
from typing import Any, ClassVar

import torch

from trainer.hook import CollectiveHook
from trainer.models.tiny import Tiny
from trainer.objectives.epsilon import Epsilon

RANK = os.environ.get("RANK", "0")
CALLS = itertools.count(1)


def sha256(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Watched(Epsilon):
    """Writes each sample it is fed to $WATCH-RANK; its process kills itself at call $KILL_AT of `loss`."""

    kind = "watched"

    def corrupt(self, x0, eps, t):
        if watch := os.environ.get("WATCH"):
            with open(f"{watch}-{RANK}", "a") as file:
                for sample in zip(t, eps, x0, strict=True):
                    file.write(f"{float(sample[0]).hex()} {sha256(sample[1])} {sha256(sample[2])}\n")
        return super().corrupt(x0, eps, t)

    def loss(self, pred, target):
        if str(next(CALLS)) == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(pred, target)


class NotANumber(Epsilon):
    """On rank 1 alone, the loss of call 3, and of call 6 and all later ones, is not a number."""

    kind = "not_a_number"

    def loss(self, pred, target):
        call = next(CALLS)
        spoilt = RANK == "1" and (call == 3 or call >= 6)
        return super().loss(pred, target) * (float("nan") if spoilt else 1.0)


class RankWeights(CollectiveHook):
    """Writes the sha256 of this rank's weights after each step to weights-RANK."""

    kind = "rank_weights"

    def due(self, step, last):
        return True

    def after_step(self, training, last):
        with open(f"weights-{RANK}", "a") as file:
            file.write(sha256(*training.state.weights().values()) + "\n")


class GradientPlaces(CollectiveHook):
    """Lets the objective `placed` see the run."""

    kind = "gradient_places"
    training: ClassVar[Any] = None

    def due(self, step, last):
        return False

    def on_start(self, training):
        GradientPlaces.training = training


class Placed(Epsilon):
    """Writes to places-RANK, at each loss, where the memory of the gradients is that there are by then."""

    kind = "placed"

    def loss(self, pred, target):
        assert GradientPlaces.training is not None
        gradients = [weight.grad for weight in GradientPlaces.training.state.weights().values()]
        places = tuple(gradient.data_ptr() for gradient in gradients if gradient is not None)
        with open(f"places-{RANK}", "a") as file:
            file.write(f"{hash(places)}\n")
        return super().loss(pred, target)


class Put(Epsilon):
    """Uses an operation that has no deterministic implementation, on any device."""

    kind = "put"

    def loss(self, pred, target):
        nothing = torch.zeros(1, device=pred.device)
        nothing.put_(torch.zeros(1, dtype=torch.int64, device=pred.device), nothing.clone())
        return super().loss(pred, target) + nothing


class AttentionOnly(Tiny):
    """Trains the projections of the attention layers and nothing else, as an adapter would."""

    kind = "attention_only"

    def trainable(self, components):
        modules = super().trainable(components)
        for name, parameter in components.unet.named_parameters():
            parameter.requires_grad_(".attn" in name and ".to_" in name)
        return modules
