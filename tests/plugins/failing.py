"""Objectives and hooks that fail, each in its way."""

from __future__ import annotations

import itertools

import torch

from trainer.hook import CollectiveHook, MainHook
from trainer.objectives.flow import Flow

CALLS = itertools.count(1)


class Broken(Flow):
    """No loss is a number."""

    kind = "broken"

    def loss(self, pred, target):
        return super().loss(pred, target) * float("nan")


class HalfBroken(Flow):
    """The loss of the second sample of every micro batch is not a number."""

    kind = "half_broken"

    def loss(self, pred, target):
        losses = super().loss(pred, target)
        losses[1] *= float("nan")
        return losses


class Relapsing(Flow):
    """The second, third and fourth loss is not a number; those after them are."""

    kind = "relapsing"

    def loss(self, pred, target):
        return super().loss(pred, target) * (float("nan") if next(CALLS) in (2, 3, 4) else 1)


class Hungry(Flow):
    """Asks for more memory than there is."""

    kind = "hungry"

    def loss(self, pred, target):
        return torch.empty(2**50)


class Faulty(Flow):
    """Raises what nobody foresaw, with a secret in its text."""

    kind = "faulty"

    def loss(self, pred, target):
        raise ValueError("the loss is lost at https://me:hunter2pass@tracker.example")


class Unreachable(MainHook):
    """A tracker without a network."""

    kind = "unreachable"

    def on_metrics(self, view, lines):
        raise ConnectionError("no route to the tracker")


class NoLuck(CollectiveHook):
    """Fails before the first step."""

    kind = "no_luck"

    def on_start(self, training):
        raise RuntimeError("no luck")
