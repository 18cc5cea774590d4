"""Rows for people: one line a row, the figures that it has. Needs the standard library alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

COLUMNS = (
    ("ms", "ms", 10),
    ("host_ms", "host ms", 9),
    ("images_per_second", "images/s", 10),
    ("tflops", "TFLOP/s", 9),
    ("percent_of_matmul", "% matmul", 9),
    ("over_bare", "x bare", 7),
    ("allocated_gb", "GB", 7),
    ("reserved_gb", "held GB", 8),
    ("clocks_sm", "MHz", 6),
    ("power_draw", "W", 6),
)
FURTHER = (
    *("unavailable", "loss_gap", "fp32_error", "attention", "gb_per_second", "stall_ms", "longest_ms"),
    *("microseconds", "parts", "first_forward_seconds", "forward_ms", "versions", "smi", "result", "seconds"),
    "row_seconds",
)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """All rows under one head; what has no column of its own follows, and an error or why a row was not run."""
    rows = list(rows)
    width = max([len(str(row["name"])) for row in rows] or [4])
    lines = ["name".ljust(width) + "".join(head.rjust(wide) for _, head, wide in COLUMNS)]
    for row in rows:
        cells = "".join(figure(row.get(key)).rjust(wide) for key, _, wide in COLUMNS)
        further = [f"{key} {figure(row[key])}" for key in FURTHER if row.get(key) is not None]
        further += [f"ERROR {row['error']}"] if "error" in row else []
        further += [f"not run: {row['not_run']}"] if "not_run" in row else []
        lines.append(f"{row['name']:{width}}{cells}  {', '.join(further)}".rstrip())
    return "\n".join(lines)


def figure(value: Any) -> str:
    """A number in four digits or so, anything else as it is, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {figure(each)}" for key, each in value.items()) + "}"
    return str(value)
