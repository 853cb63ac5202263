"""What the lines of metrics.jsonl say about a head that is in trouble. No label is ever read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from ..config import Variant

COLLAPSED = 1.05  # a perplexity below it: one label in use

# Drift, labels that turn into kinds of images, is seen in I(image;label) / H(label). On CamVid, over all images and with features of a
# network, it stayed between .04 and .11 in runs without drift, as the true labels' does (.09), and went from .10 to .30 with it. On the
# watched squares and filterbank features it went from .14 to .15 at most and then down to .06 to .11 without, and from .14 to .20 with it.
# The numbers below part these; no other set was looked at but the demo, where it falls from .36 to .31.
LINES = 3  # the median of as many lines is looked at: one line is of few images
FLOOR = 0.15  # no drift below it
RATIO = 1.3  # times the lowest median so far
RISE = 0.04  # and above it by as much


def drifts(information: Sequence[float]) -> bool:
    """Whether the last LINES values of I(image;label)/H(label), oldest first, lie well above the lowest LINES in a row before."""
    levels = [median(information[end - LINES : end]) for end in range(LINES, len(information) + 1)]
    return bool(levels) and levels[-1] > max(FLOOR, RATIO * min(levels), RISE + min(levels))


class Watch:
    """Follows the records of a run's heads, and names each trouble of each head once.

    All that it knows comes from the records, so that a resumed run knows what the stopped one knew. With one group asked for, one label
    in use is no trouble.
    """

    def __init__(self, variants: Iterable[Variant], groups: int | None = None):
        self._groups = groups
        self._labels = {variant.name: variant.label() for variant in variants}
        self._information: dict[str, list[float]] = {name: [] for name in self._labels}
        self.broken: set[str] = set()  # names of heads whose losses are no numbers any more
        self.collapsed: set[str] = set()
        self.drifted: set[str] = set()

    def see(self, record: dict[str, Any]) -> str | None:
        """What is new with the head of `record`, in words."""
        name, step, total = record["head"], record["step"], record["total"]
        if name in self.broken:
            return None
        label = self._labels[name]
        if total is None or not math.isfinite(total):
            self.broken.add(name)
            return f"step {step}: the losses of {label} are no numbers any more; it is left out at the end"
        if record["perplexity"] < COLLAPSED and self._groups != 1 and name not in self.collapsed:
            self.collapsed.add(name)
            return f"step {step}: {label} has collapsed, {collapse(record['perplexity'])}"
        past = self._information[name]
        past.append(record["image_information"])
        if name not in self.drifted and drifts(past):
            self.drifted.add(name)
            return (
                f"step {step}: the labels of {label} turn into kinds of images: I(image;label)/H(label) is {past[-1]:.2f} and was "
                f"{min(past):.2f}; fewer --steps, or --granularity in place of thresholds, keep them apart"
            )
        return None

    @property
    def all_broken(self) -> bool:
        return len(self.broken) == len(self._labels)

    @property
    def all_drifted(self) -> bool:
        """Every head that still counts."""
        return not self.all_broken and self.broken | self.drifted == set(self._labels)


def collapse(perplexity: float) -> str:
    return (
        f"one label is in use (perplexity {perplexity:.2f}); a higher --granularity, or higher thresholds, split groups"
    )
