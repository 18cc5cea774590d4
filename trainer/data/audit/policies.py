"""What each setting of `data.on_bad` and `data.on_missing_caption` would make of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from trainer.data.plan import Plan
from trainer.data.record import Source
from trainer.data.roll import LeftOut, RollCall, call_roll
from trainer.errors import UserError

if TYPE_CHECKING:
    from numpy import ndarray

    from trainer.data.record import Records


@dataclass(frozen=True)
class Outcome:
    """What the start of a run would say of the records; `call` and `plan` are None if it would refuse them."""

    on_bad: str
    on_missing_caption: str
    refused: str | None  # the first line of why
    too_many_bad: bool  # more than data.max_bad_fraction, whatever else is wrong
    call: RollCall | None = None
    plan: Plan | None = None

    @property
    def exit_code(self) -> int:
        """Of a run that would be refused for its data, or 0."""
        return 0 if self.refused is None else UserError.exit_code


@dataclass(frozen=True)
class Facts:
    """What a start knows of the records before it decides."""

    records: Records
    sizes: ndarray  # [N, 2]: width and height of each picture, 0 if it cannot be read
    bad: Sequence[LeftOut]
    without_caption: int
    global_batch: int
    seed: int


def outcomes(source: Source, facts: Facts) -> list[Outcome]:
    """One for each pair of settings, in their order; the rest of `source` stays as it is."""
    found: dict[tuple[str, str], Outcome] = {}
    for on_bad in _choices("on_bad"):
        for on_missing in _choices("on_missing_caption"):
            # Without a bad picture or a missing caption all settings come to the same.
            same = next((one for one in found.values() if _alike(one, on_bad, on_missing, facts)), None)
            outcome = same or outcome_of(source, facts, on_bad, on_missing)
            told = outcome.refused, outcome.too_many_bad, outcome.call, outcome.plan
            found[on_bad, on_missing] = Outcome(on_bad, on_missing, *told)
    return list(found.values())


def outcome_of(source: Source, facts: Facts, on_bad: str, on_missing_caption: str) -> Outcome:
    """What a start with these settings would do, by the very functions that it calls."""
    too_many = len(facts.bad) > source.max_bad_fraction * len(facts.records)
    source = source.model_copy(update={"on_bad": on_bad, "on_missing_caption": on_missing_caption})
    try:
        call = call_roll(source, facts.records, facts.sizes, facts.bad)
        plan = call.roll.plan(source, facts.global_batch, facts.seed)
    except UserError as error:
        return Outcome(on_bad, on_missing_caption, error.what.splitlines()[0].rstrip(": "), too_many)
    return Outcome(on_bad, on_missing_caption, None, too_many, call, plan)


def _alike(one: Outcome, on_bad: str, on_missing_caption: str, facts: Facts) -> bool:
    same_bad = one.on_bad == on_bad or not facts.bad
    return same_bad and (one.on_missing_caption == on_missing_caption or not facts.without_caption)


def _choices(name: str) -> tuple[str, ...]:
    return get_args(Source.model_fields[name].annotation)
