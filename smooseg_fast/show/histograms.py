"""A picture of histograms and of the values that divide them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .charts import BLUE, MARK, rendered, styled
from .pictures import INK

Mark = tuple[float, str, str, str | tuple[int, tuple[int, int]]]  # value, name, colour, matplotlib's line style


@dataclass(frozen=True)
class Histogram:
    """Counts [n] between evenly spaced edges [n + 1], their mean, and named values to mark."""

    edges: Sequence[float]
    counts: Sequence[int]
    mean: float
    marks: Mapping[str, float]


@styled()
def histograms_picture(panels: Mapping[str, Histogram], title: str = "", note: str = "") -> Image.Image:
    """Draw histograms one below the other on one x axis, each with its mean and its marks.

    The axis spans all but a thousandth of each histogram, its mean and its marks. Marks are lines across a histogram;
    their names stand in rows above the bars, from left to right.
    """
    from matplotlib.figure import Figure

    height = 3.3 + 0.3 * max(len(panel.marks) for panel in panels.values())  # of a panel, in inches
    row = 0.25 / height
    figure = Figure((11.2, height * len(panels) + 0.5 * bool(title)), layout="constrained")
    all_axes, ends = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], []
    for axes, (name, panel) in zip(all_axes, panels.items()):
        shares = 100 * np.asarray(panel.counts) / sum(panel.counts)
        axes.set(title=name, ylabel=f"% of pairs in {panel.edges[1] - panel.edges[0]:.2g}")
        axes.stairs(shares, panel.edges, fill=True, color=BLUE)
        marks = [(panel.mean, f"mean {panel.mean:+.3f}", INK, "-")]
        marks = sorted([*marks, *((x, label, MARK, "--") for label, x in panel.marks.items())])
        axes.set_ylim(0, shares.max() / (1 - row * len(marks)))
        for i, (x, label, colour, dashes) in enumerate(marks):
            axes.axvline(x, ymax=1 - row * i, color=colour, linewidth=1.2, linestyle=dashes)
            place = {"transform": axes.get_xaxis_transform(), "va": "top"}
            axes.text(x, 1 - row * i, f" {label}", color=colour, size=9, **place)
        ends += [*np.interp((0.05, 99.95), np.cumsum(shares), panel.edges[1:]), panel.mean, *panel.marks.values()]
    edge = 0.03 * (max(ends) - min(ends)) or 0.01
    all_axes[-1].set_xlim(min(ends) - edge, max(ends) + edge)
    all_axes[-1].set_xlabel("W, closeness of two patches" + f"; {note}" * bool(note))
    return rendered(figure, title)
