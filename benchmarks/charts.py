"""Pictures of results as SVG without a background, in light and dark ink; each carries a digest of its data."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

STYLE = 2  # raise it when the drawing changes, so that pictures of the same data are drawn again
THEMES = {
    "light": dict(ink="#1d2126", grey="#59636e", rule="#d9dde1", dense="#d1410c", torch="#0c73b4", triton="#1b7f4b"),
    "dark": dict(ink="#e6edf3", grey="#9198a1", rule="#30363d", dense="#ff8559", torch="#53aef2", triton="#4ac585"),
}
MARKERS = {"dense": "s", "torch": "o", "triton": "D"}
LETTERS = {"P": "patches P", "H": "heads H", "K": "prototypes K", "B": "images B"}
FIGURES = {"median_ms": ("milliseconds", 1.0), "peak_bytes": ("MB beyond the inputs", 1e-6)}


@dataclass(frozen=True)
class Chart:
    """`draw(figure, data, ink)` shows `data` and nothing else."""

    alt: str
    data: Any
    draw: Callable[[Any, Any, dict[str, str]], None]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([STYLE, self.data]).encode()).hexdigest()[:16]

    def svg(self, theme: str) -> str:
        import matplotlib
        from matplotlib.figure import Figure

        options = {"svg.hashsalt": "smooseg_fast", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
        with matplotlib.rc_context(options):
            figure, file = Figure(layout="constrained"), io.StringIO()
            self.draw(figure, self.data, THEMES[theme])
            metadata = {"Date": None, "Creator": None, "Description": f"digest {self.digest}"}
            figure.savefig(file, format="svg", transparent=True, metadata=metadata)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def embed(drawn: dict[str, Chart], name: str, folder: str) -> str:
    """HTML of the pictures whose stem begins with `name`."""
    source = '<source media="(prefers-color-scheme: dark)" srcset="{0}-dark.svg">'
    page = f'<picture>{source}<img alt="{{1}}" src="{{0}}-light.svg"></picture>'
    stems = [stem for stem in drawn if stem.startswith(name)]
    return "\n\n".join(page.format(folder + stem, drawn[stem].alt) for stem in stems)


def charts(rows: list[tuple[pd.Series, pd.DataFrame]], sweeps: list[tuple[str, str, pd.DataFrame]]) -> dict[str, Chart]:
    """By the stem of their files; rows are (key, lines by implementation), sweeps (device, letter, lines)."""
    drawn, panels = {}, {}
    if data := [bars_of(key, run) for key, run in rows]:
        alt = "Time of the objective and of a training step by implementation, with the counted floor"
        drawn["objective"] = Chart(alt, data, draw_bars)
    for device, letter, sweep in sweeps:
        panels.setdefault((device, sweep["machine"].iloc[0]), []).extend(panels_of(letter, sweep))
    for (device, machine), data in panels.items():
        drawn[f"scaling-{device}"] = Chart(f"Time and memory against the sizes, {machine}", data, draw_panels)
    return drawn


def bars_of(key: pd.Series, run: pd.DataFrame) -> list:
    """[label, floor ms, {implementation: [p20, median, p80]}]"""
    timed = run[run["median_ms"].notna()]
    times = {impl: [line["p20_ms"], line["median_ms"], line["p80_ms"]] for impl, line in timed.iterrows()}
    label = f"{key['case']}, {'GPU' if key['device'] == 'cuda' else 'CPU'} {key['dtype']}\n{key['sizes']}"
    return [label, float(timed["floor_ms"].iloc[0]), times]


def stop_of(curve: pd.DataFrame, figure: str) -> str:
    """Say where a curve stops and why; "" where it does not."""
    last = curve["at"][curve[figure].notna()].max()
    for line in curve[curve["skipped"].notna() & (curve["at"] > last)].itertuples():
        return f"at {line.at}: needs {line.counted_bytes / 1e9:.1f} GB"
    return ""


def panels_of(letter: str, sweep: pd.DataFrame) -> list:
    """[title, x label, {implementation: points}, {implementation: where it stops}] for time and for memory."""
    panels, fixed = [], ", ".join(part for part in sweep["sizes"].iloc[0].split(", ") if part[0] != letter)
    for figure, (title, scale) in FIGURES.items():
        lines = {impl: curve for impl, curve in sweep.groupby("impl", sort=False) if curve[figure].notna().any()}
        stops = {impl: stop for impl, curve in lines.items() if (stop := stop_of(curve, figure))}
        points = {impl: curve[["at", figure]].dropna().astype(float) * [1, scale] for impl, curve in lines.items()}
        if lines:
            curves = {impl: curve.to_numpy().tolist() for impl, curve in points.items()}
            panels.append([f"{title} against {letter}", f"{LETTERS[letter]}   ({fixed})", curves, stops])
    return panels


def draw_bars(figure: Any, rows: list, ink: dict[str, str]) -> None:
    figure.set_size_inches(8.6, 1.0 + 0.6 * len(rows))
    axes = figure.add_subplot()
    for y, (_, floor_ms, times) in enumerate(rows):
        axes.plot([floor_ms] * 2, [y - 0.3, y + 0.3], color=ink["ink"], linewidth=2)
        for impl, (p20, median, p80) in times.items():
            look = style(impl, ink)
            axes.plot([p20, p80], [y, y], color=look["color"], linewidth=2)
            axes.plot([median], [y], **look | {"linestyle": "none"})
            place = dict(xytext=(0, 7 if "compile" not in impl else -15), textcoords="offset points", ha="center")
            axes.annotate(f"{median:.3g}", (median, y), **place, color=look["color"], fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("milliseconds, forward + backward (median; bars p20 to p80)", color=ink["grey"], fontsize=9)
    finish(axes, ink, "x")
    legend(figure, {impl for _, _, times in rows for impl in times}, ink, floor=True)


def draw_panels(figure: Any, panels: list, ink: dict[str, str]) -> None:
    """Log-log, so that a power is a straight line. A curve that stops says why."""
    lines = -(-len(panels) // 2)
    figure.set_size_inches(9.2, 3.3 * lines + 0.6)
    for at, (title, label, curves, stops) in enumerate(panels, 1):
        axes = figure.add_subplot(lines, 2, at)
        for impl, points in curves.items():
            look = style(impl, ink)
            axes.plot(*zip(*points), **look)
            if impl in stops:
                axes.plot(*points[-1], marker="x", markersize=10, markeredgewidth=2.2, color=look["color"])
                place = dict(xytext=(0, 5), textcoords="offset points", fontsize=8, color=look["color"])
                axes.annotate(f"× {impl} {stops[impl]}", (0, 1), xycoords="axes fraction", **place)
        values = sorted({x for points in curves.values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 30 * low:  # too little for two labels
            axes.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
        axes.set_xticks([x for i, x in enumerate(values) if i == len(values) - 1 or values[i + 1] >= 1.9 * x])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(title, loc="left", fontsize=10, color=ink["ink"], fontweight="bold", pad=18 if stops else 6)
        axes.set_xlabel(label, fontsize=9, color=ink["grey"])
        finish(axes, ink, "both")
    legend(figure, {impl for _, _, curves, _ in panels for impl in curves}, ink)


def style(impl: str, ink: dict[str, str]) -> dict[str, Any]:
    """Colour and marker by implementation; hollow and dashed through torch.compile."""
    base, compiled = impl.split(" +")[0], "compile" in impl
    look = dict(color=ink[base], marker=MARKERS[base], markersize=6, linewidth=1.8)
    return look | dict(markerfacecolor="none" if compiled else ink[base], linestyle="--" if compiled else "-")


def finish(axes: Any, ink: dict[str, str], grid: str) -> None:
    axes.tick_params(which="both", colors=ink["grey"], labelsize=8, length=0)
    axes.grid(axis=grid, color=ink["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(ink["rule"])


def legend(figure: Any, impls: set[str], ink: dict[str, str], floor: bool = False) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=impl, **style(impl, ink)) for impl in sorted(impls)]
    if floor:
        look = dict(color=ink["ink"], marker="|", markersize=12, markeredgewidth=2, linestyle="none")
        handles.append(Line2D([], [], label="counted floor", **look))
    place = dict(loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    figure.legend(handles=handles, labelcolor=ink["ink"], **place)
