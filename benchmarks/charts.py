"""Pictures of results as SVG without a background, in light and dark ink.

The same data make the same bytes with one version of matplotlib; each picture carries a digest of its data, for the others.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import goals
import tables
from cells import age, threads_text
from sweeps import Sweep, sweeps
from tables import Cells

STYLE = 1  # raised when the drawing changes, so that pictures of the same data are drawn anew
THEMES = {
    "light": dict(ink="#1d2126", grey="#59636e", rule="#d9dde1", paper="#ffffff"),
    "dark": dict(ink="#e6edf3", grey="#9198a1", rule="#30363d", paper="#0d1117"),
}
COLOURS = {
    "light": {"dense": "#d1410c", "torch": "#0c73b4", "triton": "#1b7f4b", "keops": "#8250a8"},
    "dark": {"dense": "#ff8559", "torch": "#53aef2", "triton": "#4ac585", "keops": "#c297e8"},
}
NAMES = {"P": "patches P", "H": "heads H", "K": "prototypes K", "B": "images B"}
MARKERS = {"dense": "s", "torch": "o", "triton": "D", "keops": "v"}


@dataclass(frozen=True)
class Chart:
    """`draw(theme)` gives a matplotlib figure of `data`, which is all that it shows."""

    alt: str
    data: Any
    draw: Callable[[str], Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([STYLE, self.data]).encode()).hexdigest()[:16]

    def svg(self, theme: str) -> str:
        import matplotlib

        with matplotlib.rc_context(
            {"svg.hashsalt": "smooseg_fast", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
        ):
            file = io.StringIO()
            metadata = {"Date": None, "Creator": None, "Description": f"digest {self.digest}"}
            self.draw(theme).savefig(file, format="svg", transparent=True, metadata=metadata)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def digest_of(svg: str) -> str | None:
    found = re.search(r"digest ([0-9a-f]{16})", svg)
    return found and found[1]


def charts(cells: Cells) -> dict[str, Chart]:
    """By the stem of their files. None where there is nothing to draw."""
    found = {}
    if rows := objective_rows(cells):
        alt = "Time of the objective and of a training step by implementation, beside the counted floor"
        found["objective"] = Chart(alt, rows, lambda theme: draw_objective(rows, theme))
    by_place: dict[tuple, list[Sweep]] = {}
    for sweep in sweeps(cells):
        by_place.setdefault(sweep.cell[:3], []).append(sweep)
    for place, group in by_place.items():
        panels = [panel for sweep in group if (panel := panel_of(sweep))["time"]]
        if panels:
            who = threads_text(*place[1:])
            stem = "scaling-" + "-".join(re.findall("[a-z0-9]+", who.lower()))
            draw = lambda theme, panels=panels, who=who: draw_scaling(panels, who, theme)  # noqa: E731
            found[stem] = Chart(f"Time and memory against the sizes, {who}", [who, panels], draw)
    return found


def embed(stem: str, chart: Chart, folder: str) -> str:
    light, dark = (f"{folder}{stem}-{theme}.svg" for theme in THEMES)
    return f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}"><img alt="{chart.alt}" src="{light}"></picture>'


def objective_rows(cells: Cells) -> list[list[Any]]:
    """[label, floor ms, {implementation: [p20, median, p80]}] of the README's rows, each of one run: the newest with the most numbers."""
    rows = []
    for label, wanted in goals.ROWS.items():
        group = goals.chosen(cells, wanted)
        timed = [(run, cell, row) for cell, runs in group.items() for run, row in runs.items() if "median_ms" in row]
        if not timed:
            continue
        runs = [run for run, _, _ in timed]
        best = max(timed, key=lambda item: (runs.count(item[0]), *age(item[2])))
        points = {
            cell.impl: [row.get(name, row["median_ms"]) for name in ("p20_ms", "median_ms", "p80_ms")]
            for run, cell, row in timed
            if run == best[0]
        }
        who = threads_text(best[1].machine, best[1].threads)
        rows.append(
            [
                label if not label.startswith("the same") else "objective, 16 heads at once",
                who,
                best[2].get("floor_ms"),
                points,
            ]
        )
    return rows


def draw_objective(rows: list[list[Any]], theme: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    ink = THEMES[theme]
    figure = Figure(figsize=(8.6, 1.0 + 0.72 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for at, (label, who, floor, points) in enumerate(rows):
        y = len(rows) - at
        if floor:
            axes.plot([floor, floor], [y - 0.3, y + 0.3], color=ink["ink"], linewidth=2)
        for impl, (low, median, high) in points.items():
            style = style_of(impl, theme)
            axes.plot([low, high], [y, y], color=style["color"], linewidth=2)
            axes.plot(
                [median], [y], linestyle="none", **{name: value for name, value in style.items() if name != "linestyle"}
            )
            side = dict(xytext=(0, -8), va="top") if "compile" in impl else dict(xytext=(0, 7), va="bottom")
            place = dict(xy=(median, y), textcoords="offset points", ha="center", **side)
            axes.annotate(tables.milliseconds(median), **place, color=style["color"], fontsize=9)
        beside = dict(
            xy=(0, y), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="center"
        )
        axes.annotate(label, xytext=(-8, 5), **beside, color=ink["ink"], fontsize=9)
        axes.annotate(who, xytext=(-8, -7), **beside, color=ink["grey"], fontsize=8)
    axes.set_xscale("log")
    axes.set_ylim(0.4, len(rows) + 0.7)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("milliseconds, forward + backward (median; bars p20 to p80)", color=ink["grey"], fontsize=9)
    finish(axes, ink, grid="x")
    legend(figure, [impl for row in rows for impl in row[3]], theme, floor=any(row[2] for row in rows))
    return figure


def panel_of(sweep: Sweep) -> dict[str, Any]:
    """What one letter's two panels show."""
    fixed = ", ".join(f"{letter} {value}" for letter, value in sweep.cell.sizes if letter != sweep.letter)
    return {
        "letter": sweep.letter,
        "fixed": fixed,
        "time": {name: points for name in sweep.lines if (points := sweep.points(name, "median_ms"))},
        "memory": {name: points for name in sweep.lines if (points := sweep.points(name, "peak_bytes"))},
        "stops": {name: [stop[0], tables.short(stop[1])] for name in sweep.lines if (stop := sweep.stopped(name))},
    }


def draw_scaling(panels: list[dict[str, Any]], who: str, theme: str) -> Any:
    from matplotlib.figure import Figure

    ink = THEMES[theme]
    shown = [(panel, kind) for panel in panels for kind in ("time", "memory") if panel[kind]]
    columns = min(len(shown), 2)
    lines = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * lines + 0.6), layout="constrained")
    for at, (panel, kind) in enumerate(shown, 1):
        draw_panel(figure.add_subplot(lines, columns, at), panel, kind, theme)
    legend(figure, [name for panel, kind in shown for name in panel[kind]], theme, title=who)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    for axes in figure.axes:
        finish(axes, ink, grid="both")
    return figure


def draw_panel(axes: Any, panel: dict[str, Any], kind: str, theme: str) -> None:
    """Log-log, so that a power is a straight line. A curve that stops says why at the top."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    ink, scale = THEMES[theme], 1 if kind == "time" else 1e-6
    curves = {name: [(x, y * scale) for x, y in points] for name, points in panel[kind].items()}
    for name, points in curves.items():
        axes.plot(*zip(*points), **style_of(name, theme))
    axes.set_xscale("log")
    axes.set_yscale("log")
    values = sorted({x for points in curves.values() for x, _ in points})
    axes.xaxis.set_major_locator(FixedLocator(apart(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high < 30 * low:  # too little for two labels
        axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    notes = [
        note
        for name, stop in panel["stops"].items()
        if name in curves
        for note in stop_note(name, stop, panel["letter"])
    ]
    for line, (name, text) in enumerate(reversed(notes)):
        place = dict(xy=(0, 1), xycoords="axes fraction", xytext=(0, 5 + 11 * line), textcoords="offset points")
        axes.annotate(text, **place, fontsize=8, color=style_of(name, theme)["color"], parse_math=False)
    for name in panel["stops"].keys() & curves.keys():
        axes.plot(
            *curves[name][-1], marker="x", markersize=10, markeredgewidth=2.2, color=style_of(name, theme)["color"]
        )
    title = f"{'milliseconds' if kind == 'time' else 'MB beyond the inputs'} against {panel['letter']}"
    axes.set_title(title, loc="left", fontsize=10, color=ink["ink"], fontweight="bold", pad=6 + 11 * len(notes))
    axes.set_xlabel(
        NAMES[panel["letter"]] + (f"   ({panel['fixed']})" if panel["fixed"] else ""), fontsize=9, color=ink["grey"]
    )


def stop_note(name: str, stop: list[Any], letter: str) -> list[tuple[str, str]]:
    return [(name, line) for line in textwrap.wrap(f"× {name} stops before {letter} {stop[0]}: {stop[1]}", 62)[:4]]


def apart(values: list[int]) -> list[int]:
    """The largest and every one far enough below the last taken for its label."""
    taken: list[int] = []
    gap = (values[-1] / values[0]) ** 0.14
    for value in reversed(values):
        if not taken or taken[-1] / value >= gap:
            taken.append(value)
    return taken


def style_of(name: str, theme: str) -> dict[str, Any]:
    """Colour and marker by implementation; hollow and dashed through torch.compile."""
    base, compiled = name.split(" +")[0].split(",")[0], "compile" in name
    colour = COLOURS[theme].get(base, THEMES[theme]["ink"])
    hollow = THEMES[theme]["paper"] if compiled else colour
    style = dict(color=colour, marker=MARKERS.get(base, "^"), markersize=6, markerfacecolor=hollow, linewidth=1.8)
    return {**style, "linestyle": "--" if compiled else "-"}


def finish(axes: Any, ink: dict[str, str], grid: str) -> None:
    axes.tick_params(which="both", colors=ink["grey"], labelsize=9, length=0)
    axes.grid(axis=grid, color=ink["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(ink["rule"])


def legend(figure: Any, names: list[str], theme: str, title: str = "", floor: bool = False) -> None:
    from matplotlib.lines import Line2D

    ink = THEMES[theme]
    names = sorted(set(names), key=lambda name: (*goals.COLUMNS, name).index(name))
    handles = [Line2D([], [], label=name, **style_of(name, theme)) for name in names]
    if floor:
        handles.append(
            Line2D(
                [],
                [],
                label="counted floor",
                color=ink["ink"],
                marker="|",
                markersize=12,
                markeredgewidth=2,
                linestyle="none",
            )
        )
    made = figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=ink["ink"],
        title=title or None,
    )
    made.get_title().set(color=ink["ink"], fontsize=10)
