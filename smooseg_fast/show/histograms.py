"""A picture of histograms and of the values that divide them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .charts import BLUE, DPI, MARK, plain_axes, put, rendered
from .pictures import GREY, INK, PAPER

Mark = tuple[float, str, str, str | tuple[int, tuple[int, int]]]  # value, name, colour, matplotlib's line style


@dataclass(frozen=True)
class Histogram:
    """Counts [n] between evenly spaced edges [n + 1], their mean, and named values to mark."""

    edges: Sequence[float]
    counts: Sequence[int]
    mean: float
    marks: Mapping[str, float]

    def span(self) -> tuple[float, float]:
        """Return the edges around all but half a thousandth of the counts on either side."""
        share = np.cumsum(self.counts) / sum(self.counts)
        first, last = int(np.searchsorted(share, 0.0005)), min(int(np.searchsorted(share, 0.9995)), len(share) - 1)
        return self.edges[first], self.edges[last + 1]


def histograms_picture(panels: Mapping[str, Histogram], title: str = "", note: str = "") -> Image.Image:
    """Draw histograms one below the other on one x axis, each with its mean and its marks.

    The axis spans all but a thousandth of each histogram, its mean and its marks. ValueError without panels or counts.
    """
    from matplotlib.figure import Figure

    if not panels or not all(sum(panel.counts) for panel in panels.values()):
        raise ValueError("a picture of histograms needs at least one, each with something counted")
    rows = 1 + max(len(panel.marks) for panel in panels.values())
    height = (3 + 0.3 * rows) * len(panels) + 0.5 * bool(title)
    figure = Figure((11.2, height), dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    ends = [end for panel in panels.values() for end in (*panel.span(), panel.mean, *panel.marks.values())]
    edge = 0.03 * (max(ends) - min(ends)) or 0.01
    axes[0].set_xlim(min(ends) - edge, max(ends) + edge)
    for axis, (name, panel) in zip(axes, panels.items()):
        _histogram_panel(axis, name, panel)
    label = "W, closeness of two patches" + (f"; {note}" if note else "")
    axes[-1].set_xlabel(label, fontsize=9, color=GREY, parse_math=False)
    return rendered(figure, title)


def _histogram_panel(axes: Any, name: str, panel: Histogram) -> None:
    """Draw one histogram; marks are lines across it, their names in rows above the bars from left to right."""
    edges, shares = np.asarray(panel.edges), 100 * np.asarray(panel.counts) / sum(panel.counts)
    low, high = axes.get_xlim()
    width = (edges[-1] - edges[0]) / len(shares)
    merged = max(1, round((high - low) / 200 / width))  # bins are a pixel or two wide: draw about 200 bars
    starts = np.arange(0, len(shares) // merged * merged, merged)
    bars = np.add.reduceat(shares, starts)
    axes.stairs(bars, edges[[*starts, starts[-1] + merged]], fill=True, color=BLUE, linewidth=0)
    mean: Mark = (panel.mean, f"mean {panel.mean:+.3f}", INK, "-")
    marks = sorted([*((x, label, MARK, (0, (4, 2))) for label, x in panel.marks.items()), mean], key=lambda m: m[:2])
    row_height = 0.25 / axes.figure.get_figheight() * len(axes.figure.axes)
    axes.set_ylim(0, bars.max() / (1 - row_height * len(marks)))
    right = panel.mean < (low + high) / 2  # on the emptier side
    for row, (x, label, colour, dashes) in enumerate(marks if right else reversed(marks)):
        top, at = 1 - row_height * row, x + (0.004 if right else -0.004) * (high - low)
        axes.axvline(x, ymax=top, color=colour, linewidth=1.2, linestyle=dashes)
        place = {"transform": axes.get_xaxis_transform(), "ha": "left" if right else "right", "va": "top"}
        put(axes, (at, top), label, 12, colour, **place)
    axes.set_ylabel(f"% of pairs in {merged * width:.2g}", fontsize=9, color=GREY)
    plain_axes(axes, name)
