"""What rows say of the goals: each as a line, with its figure or the word that it was not measured.

Needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Row = dict[str, Any]
HOST_MICROSECONDS = 500  # of a step without the network, on one core


def goals(rows: Iterable[Row]) -> Iterator[str]:
    """One line for each goal that some row speaks of."""
    by_stem: dict[str, dict[str, Row]] = {}
    for row in rows:
        stem, _, plan = row["name"].rpartition(": ")
        by_stem.setdefault(stem, {})[plan] = row
    for stem, plans in by_stem.items():
        for text, over, under, goal, more in (
            ("difftrain over bare", "difftrain", "bare", 1.02, False),
            ("bare again over bare (the noise)", "bare again", "bare", None, False),
            ("EMA over none", "difftrain", "EMA off", 1.02, False),
            ("speed of deterministic", "difftrain", "deterministic", 0.85, True),
            ("speed over the script with encoders", "script, encoders at each step", "difftrain", 1.8, True),
            ("speed over the script, cached", "script, cached", "difftrain", None, True),
        ):
            if (a := time_of(plans, over)) and (b := time_of(plans, under)):
                yield line(stem, text, a / b, goal, more)
        stalls = [plans.get(name, {}).get("stall_ms") for name in ("a save, in the background", "a save, steps wait")]
        if stalls[0] is not None and stalls[1]:
            yield line(stem, "stall of a save over one that steps wait for", stalls[0] / stalls[1], 0.1, False)
        percents = {name: row["percent_of_matmul"] for name, row in plans.items() if is_goal_of_speed(name, row)}
        if percents:
            best = max(percents, key=lambda name: percents[name])
            goal = 46 if plans[best]["pixels"] >= 512 else 30
            yield line(stem, f"percent of the matmul rate ({best})", percents[best], goal, True)
        for row in plans.values():
            if row.get("ranks") == 1 and "microseconds" in row:
                yield line(stem, "microseconds of the host", row["microseconds"], HOST_MICROSECONDS, False)


def is_goal_of_speed(name: str, row: Row) -> bool:
    """Whether a row is one of difftrain's, of a model and of a batch for which there is a goal."""
    ours = not name.startswith(("bare", "script"))
    return ours and "error" not in row and row.get("model") in ("sd15", "sd21") and row.get("batch", 0) >= 32


def time_of(plans: dict[str, Row], name: str) -> float | None:
    """Milliseconds of a step; None if it was not measured, or not rightly."""
    row = plans.get(name, {})
    return None if "error" in row else row.get("ms")


def line(stem: str, text: str, figure: float, goal: float | None, more: bool) -> str:
    """A goal and its figure."""
    if goal is None:
        return f"       {stem}: {text} {figure:.3g}"
    met = figure >= goal if more else figure <= goal
    return f"{'met   ' if met else 'MISSED'} {stem}: {text} {figure:.3g}, goal {'>=' if more else '<='} {goal:g}"
