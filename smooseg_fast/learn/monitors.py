"""Recognise heads in trouble by the lines of metrics.jsonl, without any ground truth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from ..config import Variant

COLLAPSED = 1.05  # a perplexity below it means one group in use
COLLAPSE = "puts everything into one group; a higher --granularity, or higher thresholds, give more groups"

# Drift (labels come to stand for whole images) shows in I(image;label) / H(label). On CamVid, over all images and with
# network features, it stayed between .04 and .11 in runs without drift, like that of the ground truth (.09), and went
# from .10 to .30 with drift. On the watched squares and filterbank features it went from .14 to .15 at most and then
# down to .06 to .11 without drift, and from .14 to .20 with it. The thresholds below separate these; apart from them
# only the demo was looked at, where it falls from .36 to .31.
LINES = 3  # compare medians of this many lines: one line covers few images
FLOOR = 0.15  # no drift below it
RATIO = 1.3  # times the lowest median so far
RISE = 0.04  # and above it by as much


def drifts(information: Sequence[float]) -> bool:
    """True if the last LINES values of I(image;label)/H(label) lie well above the lowest earlier ones; oldest first."""
    levels = [median(information[end - LINES : end]) for end in range(LINES, len(information) + 1)]
    return bool(levels) and levels[-1] > max(FLOOR, RATIO * min(levels), RISE + min(levels))


class Watch:
    """Follows the records of a run's heads, and reports each trouble of each head once.

    Its state comes from the records alone, so a resumed run knows what the stopped one knew.
    """

    def __init__(self, variants: Iterable[Variant]):
        self._labels = {variant.name: variant.label() for variant in variants}
        self._information: dict[str, list[float]] = {name: [] for name in self._labels}
        self.broken: set[str] = set()  # names of heads whose loss is NaN or infinite
        self.collapsed: set[str] = set()
        self.drifted: set[str] = set()

    def see(self, record: dict[str, Any]) -> str | None:
        """Say what is new with the head of `record`; None if nothing is."""
        name, step, total = record["head"], record["step"], record["total"]
        if name in self.broken:
            return None
        label = self._labels[name]
        if total is None or not math.isfinite(total):
            self.broken.add(name)
            return f"step {step}: {label}: loss is NaN or infinite; this head is dropped"
        if record["perplexity"] < COLLAPSED and name not in self.collapsed:
            self.collapsed.add(name)
            return f"step {step}: {label} {COLLAPSE}"
        past = self._information[name]
        past.append(record["image_information"])
        if name not in self.drifted and drifts(past):
            self.drifted.add(name)
            return (
                f"step {step}: {label}: labels now tell whole images apart instead of the things in them; "
                "use fewer --steps, or --granularity in place of thresholds"
            )
        return None

    @property
    def all_broken(self) -> bool:
        return len(self.broken) == len(self._labels)

    @property
    def all_drifted(self) -> bool:
        """True once every head that still counts has drifted."""
        return not self.all_broken and self.broken | self.drifted == set(self._labels)
