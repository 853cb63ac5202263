"""A few items of many, evenly spaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` of the items, evenly spaced, the first among them."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]
