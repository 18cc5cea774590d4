"""Bar charts as inline SVG, in the colours of the page around them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

ROW, LABEL, WIDTH, VALUE = 22, 150, 760, 230  # pixels of the drawing, which scales with the page


class Bar(NamedTuple):
    """One row of a chart."""

    label: str
    value: float
    note: str = ""  # behind the value
    loud: bool = False  # to be seen first


def bars(rows: Sequence[Bar], title: str) -> str:
    """The rows from the top down, as one `<svg>`; `title` is for those who cannot see it."""
    most = max((row.value for row in rows), default=0) or 1
    room = WIDTH - LABEL - VALUE
    parts = []
    for place, row in enumerate(rows):
        y = place * ROW
        length = max(room * row.value / most, 1.5 if row.value else 0)
        loud = ' class="loud"' if row.loud else ""
        told = f"{row.value:,g}" + (f"  {row.note}" if row.note else "")
        parts.append(
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(row.label)}</text>'
            f'<rect x="{LABEL}" y="{y + 4}" width="{length:.1f}" height="{ROW - 8}" rx="2"'
            f"{loud}/>"
            f'<text x="{LABEL + length + 6:.1f}" y="{y + 15}" class="value">{escape(told)}</text>'
        )
    height = len(rows) * ROW
    return (
        f'<svg class="bars" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
