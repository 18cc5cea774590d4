"""Defines a kind that the trainer has already."""

from __future__ import annotations

from trainer.objectives.flow import Flow


class SecondEpsilon(Flow):
    """Takes a name that is taken."""

    kind = "epsilon"
