"""Tables in plain text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """One line for each row, columns two blanks apart; those numbered in `left` are flush left, the others flush
    right."""
    widths = [max(map(_width, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(row, widths)]
        cells = (cell + gap if n in left else gap + cell for n, (cell, gap) in enumerate(zip(row, gaps)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _width(text: str) -> int:
    """The columns that `text` takes in a terminal: two for a wide character, none for a combining mark."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
