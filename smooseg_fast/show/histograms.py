"""A picture of histograms, with what divides them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .charts import BLUES, MARK, plain_axes, under_title
from .pictures import GREY, INK, PAPER


@dataclass(frozen=True)
class Histogram:
    """What `histograms_picture` draws: counts between edges of one distance, one more than them; values marked by a name."""

    edges: Sequence[float]
    counts: Sequence[int]
    mean: float
    marks: Mapping[str, float]

    def span(self) -> tuple[float, float]:
        """The edges around all but half a thousandth of the counts on either side."""
        share = np.cumsum(self.counts) / sum(self.counts)
        first, last = np.searchsorted(share, 0.0005), min(np.searchsorted(share, 0.9995), len(share) - 1)
        return self.edges[first], self.edges[last + 1]


def histograms_picture(panels: Mapping[str, Histogram], title: str = "", note: str = "") -> Image.Image:
    """Histograms below each other, their values on one x axis, each with its mean and its marks.

    The axis spans what holds all but a thousandth of each histogram, its mean and its marks. ValueError without panels or counts.
    """
    from matplotlib.figure import Figure

    if not panels or not all(sum(panel.counts) for panel in panels.values()):
        raise ValueError("a picture of histograms needs at least one, each with something counted")
    rows = 1 + max(len(panel.marks) for panel in panels.values())
    figure = Figure(figsize=(11.2, (3 + 0.3 * rows) * len(panels)), dpi=100, facecolor=PAPER, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    ends = [end for panel in panels.values() for end in (*panel.span(), panel.mean, *panel.marks.values())]
    edge = 0.03 * (max(ends) - min(ends)) or 0.01
    axes[0].set_xlim(min(ends) - edge, max(ends) + edge)
    for axis, (name, panel) in zip(axes, panels.items()):
        _histogram_panel(axis, name, panel)
    axes[-1].set_xlabel(
        "W, closeness of two patches" + (f"; {note}" if note else ""), fontsize=9, color=GREY, parse_math=False
    )
    return under_title(figure, title)


def _histogram_panel(axes: Any, name: str, panel: Histogram) -> None:
    """One histogram on a matplotlib `axes`; marks are lines across it, named in rows above it from left to right."""
    edges, shares = np.asarray(panel.edges), 100 * np.asarray(panel.counts) / sum(panel.counts)
    # a bin is a pixel or two wide: as many together as make about 200 of the span
    low, high = axes.get_xlim()
    width = (edges[-1] - edges[0]) / len(shares)
    together = max(1, round((high - low) / 200 / width))
    whole = len(shares) // together * together
    bars = shares[:whole].reshape(-1, together).sum(1)
    axes.stairs(bars, edges[: whole + 1 : together], fill=True, color=BLUES[2], linewidth=0)
    marks = sorted(
        [(x, label, MARK) for label, x in panel.marks.items()] + [(panel.mean, f"mean {panel.mean:+.3f}", INK)]
    )
    row_height = 0.2 / axes.figure.get_figheight() * len(axes.figure.axes) * 1.25
    axes.set_ylim(0, bars.max() / (1 - row_height * len(marks)))  # the names stand above the bars, one to a row
    right = panel.mean < (low + high) / 2
    for row, (x, label, colour) in enumerate(marks if right else reversed(marks)):
        top = 1 - row_height * row
        axes.axvline(x, ymax=top, color=colour, linewidth=1.2, linestyle="-" if colour == INK else (0, (4, 2)))
        axes.text(
            x + (0.004 if right else -0.004) * (high - low),
            top,
            label,
            transform=axes.get_xaxis_transform(),
            color=colour,
            fontsize=9,
            ha="left" if right else "right",
            va="top",
            parse_math=False,
        )
    axes.set_ylabel(f"% of pairs in {together * width:.2g}", fontsize=9, color=GREY)
    plain_axes(axes, name)
