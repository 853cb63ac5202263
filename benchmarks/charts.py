"""The picture of how time and memory grow, as SVG in inks for light and dark pages; it carries a digest of its data."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable

import numpy as np
import pandas as pd

STYLE = 3  # raise it when the drawing changes, so that a picture of the same data is drawn again
INKS, GREY = {"dense": "#e0562b", "torch": "#2d8fd5", "triton": "#2fa36b"}, "#7d8690"
MARKERS = {"dense": "s", "torch": "o", "triton": "D"}
FIGURES = {"median_ms": ("milliseconds", 1.0), "peak_bytes": ("MB beyond the inputs", 1e-6)}


def panels(sweeps: Iterable[tuple[str, str, pd.DataFrame]]) -> list:
    """[title, {implementation: [[size, value], ...]}] for each (device, letter, lines by size `at`) and figure."""
    found = []
    for device, letter, sweep in sweeps:
        for figure, (title, scale) in FIGURES.items():
            timed = sweep[["impl", "at", figure]].dropna()
            groups = timed.groupby("impl", sort=False)
            curves = {impl: [[int(x), float(y) * scale] for _, x, y in part.to_numpy()] for impl, part in groups}
            if curves:
                found.append([f"{title} against {letter}, {'GPU' if device == 'cuda' else 'CPU'}", curves])
    return found


def digest(data: list) -> str:
    return hashlib.sha256(json.dumps([STYLE, data]).encode()).hexdigest()[:16]


def svg(data: list) -> str:
    """Log-log, so that a power is a straight line. A curve of the dense form ends where its matrices no longer fit."""
    import matplotlib
    from matplotlib.figure import Figure

    lines, file = -(-len(data) // 2), io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "smooseg_fast", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9.2, 3 * lines), layout="constrained")
        for at, (title, curves) in enumerate(data, 1):
            axes = figure.add_subplot(lines, 2, at)
            for impl, points in curves.items():
                axes.loglog(*zip(*points), color=INKS[impl], marker=MARKERS[impl], label=impl)
            axes.set_xticks(sorted({x for points in curves.values() for x, _ in points}))
            axes.set_ylim(10 ** np.floor(np.log10(axes.get_ylim()[0])), 10 ** np.ceil(np.log10(axes.get_ylim()[1])))
            axes.minorticks_off()
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_title(title, loc="left", fontsize=10, color=GREY, fontweight="bold")
            axes.tick_params(which="both", colors=GREY, labelsize=8, length=0)
            axes.grid(color=GREY, alpha=0.3)
            axes.spines[:].set_visible(False)
            axes.legend(frameon=False, labelcolor=GREY, fontsize=8)
        metadata = {"Date": None, "Creator": None, "Description": f"digest {digest(data)}"}
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
