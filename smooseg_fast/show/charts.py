"""Charts for people: the confusion table and training curves, and what charts have in common. Nothing here needs a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..measure.scores import Scores, percent
from .lettering import length, write
from .pictures import GREY, INK, PAPER, palette, to_oklab

RULE, MARK = "#d9dde1", "#e5480c"
BLUES = ("#f6f8fa", "#d3e3f0", "#92bfdd", "#3f86bd", "#0f4c86", "#082c56")  # 0 to 100 % in the confusion picture


def confusion_picture(confusion: np.ndarray, scores: Scores, class_names: Sequence[str] | None = None) -> Image.Image:
    """The table [K, C] of counts as a picture: a row a true class (its pixels are 100 %), a column a cluster, those of one class together.

    Outlined cells are what `scores` counts as right; clusters without a class stand apart on the right. Beside each row the class's
    share of the labelled pixels and its IoU. Numbers below 0.5 % are left out. ValueError when the table and the scores do not fit.
    """
    clusters, classes = confusion.shape
    names = [str(c) for c in range(classes)] if class_names is None else list(class_names)
    if (clusters, classes) != (len(scores.mapping), len(scores.iou)) or len(names) != classes:
        raise ValueError(
            f"confusion {confusion.shape}, {len(scores.mapping)} mapped clusters and {len(names)} class names do not fit"
        )
    pixels = confusion.sum(0)
    shares = confusion.T / np.maximum(pixels, 1)[:, None]  # [C, K]
    order = sorted(
        range(clusters), key=lambda k: (scores.mapping[k] % (classes + 1), -confusion[k].sum(), k)
    )  # -1 goes last
    side = int(np.clip(1500 / max(clusters, classes), 12, 44))
    size = int(np.clip(0.42 * side, 9, 15))
    text = min(max(size, 13), side - 1)
    matched = sum(c >= 0 for c in scores.mapping)
    apart = side // 2 if 0 < matched < clusters else 0
    margin, head = 32, 132
    left = margin + min(max(length(name, text) for name in names), 240) + 14
    right = left + side * clusters + apart
    width = max(right + 140, left + 500) + margin
    picture = Image.new("RGB", (width, head + side * classes + 76), PAPER)
    draw = ImageDraw.Draw(picture)
    write(draw, (margin, margin), f"{scores.matching.capitalize()} matching", 22, INK, bold=True)
    summary = (
        f"accuracy {percent(scores.accuracy)} %,  mean IoU {percent(scores.miou)} %,  {scores.pixels:,} labelled pixels"
    )
    write(draw, (margin, margin + 30), summary, 15, GREY)
    for x, label, anchor in ((left - 14, "class", "rm"), (right + 70, "share", "rm"), (right + 140, "IoU", "rm")):
        write(draw, (x, head - 14), label, text, GREY, anchor=anchor)
    stride = math.ceil((length(str(clusters - 1), size) + 4) / side)  # number every column where there is room
    xs = [left + side * i + (apart if i >= matched else 0) for i in range(clusters)]
    write(draw, (left, head - 36), "clusters", text, GREY)
    if apart:
        write(draw, (xs[matched], head - 36), "no class", text, GREY)
    for i, (x, k) in enumerate(zip(xs, order)):
        if i % stride == 0:
            write(draw, (x + side / 2, head - 14), str(k), size, INK, anchor="mm")
    for c, name in enumerate(names):
        y = head + side * c
        middle = y + side / 2
        write(draw, (left - 14, middle), name, text, INK if pixels[c] else GREY, room=240, anchor="rm")
        share = percent(pixels[c] / pixels.sum()) if pixels[c] else "-"
        write(draw, (right + 70, middle), share, text, GREY, anchor="rm")
        write(draw, (right + 140, middle), percent(scores.iou[c]), text, INK, bold=True, anchor="rm")
        for x, k in zip(xs, order):
            box = (x, y, x + side - 2, y + side - 2)
            draw.rectangle(box, fill=_shade(shares[c, k]) if pixels[c] else PAPER)
            if scores.mapping[k] == c and pixels[c]:
                draw.rectangle(box, outline=MARK, width=2)
            if side >= 22 and shares[c, k] >= 0.005:
                ink = PAPER if shares[c, k] > 0.5 else INK
                write(draw, (x + side / 2 - 1, middle - 1), f"{100 * shares[c, k]:.0f}", size, ink, anchor="mm")
    _confusion_key(draw, (left, head + side * classes + 34))
    return picture


def curves_picture(
    records: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[str]], title: str = ""
) -> Image.Image:
    """Training curves: one small panel for each entry of `panels` (panel title -> keys), the records' "step" on x.

    Only finite numbers that are in the records are drawn; a key without any is left out, and so is a panel without keys. Each curve is
    named at its end. Without anything to draw the picture says so.
    """
    from matplotlib.figure import Figure

    curves = {name: {key: points for key in keys if (points := _points(records, key))} for name, keys in panels.items()}
    curves = {name: found for name, found in curves.items() if found}
    columns = min(3, math.ceil(math.sqrt(len(curves)))) or 1
    rows = math.ceil(len(curves) / columns) or 1
    figure = Figure(figsize=(5.6 * columns, 3.2 * rows), dpi=100, facecolor=PAPER, layout="constrained")
    steps = [x for found in curves.values() for points in found.values() for x, _ in points]
    for i, (name, found) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        _panel(axes, name, found)
        edge = max(0.02 * (max(steps) - min(steps)), 0.5)
        axes.set_xlim(
            min(steps) - edge, max(steps) + edge
        )  # the same in all, so that equal steps stand below each other
        axes.xaxis.get_major_locator().set_params(integer=True)
    return under_title(figure, title, "" if curves else "nothing recorded yet")


def _shade(share: float) -> tuple[int, int, int]:
    """The colour of a share 0..1 on the confusion picture's scale."""
    stops = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in BLUES])
    at = np.linspace(0, 1, len(stops))
    return tuple(round(np.interp(share, at, channel)) for channel in stops.T)


def _confusion_key(draw: ImageDraw.ImageDraw, at: tuple[int, int]) -> None:
    x, y = at
    for i in range(120):
        draw.line((x + i, y - 6, x + i, y + 6), fill=_shade(i / 119))
    note = "0 to 100 % of the class's pixels"
    write(draw, (x + 132, y), note, 13, GREY)
    x += 132 + length(note, 13) + 28
    draw.rectangle((x, y - 7, x + 14, y + 7), outline=MARK, width=2)
    write(draw, (x + 24, y), "counted as right", 13, GREY)


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = [(record.get("step"), record.get(key)) for record in records]
    return [(x, y) for x, y in pairs if all(isinstance(v, (int, float)) and math.isfinite(v) for v in (x, y))]


def _panel(axes: Any, name: str, curves: Mapping[str, list[tuple[float, float]]]) -> None:
    """One panel on a matplotlib `axes`, the curves' names at their ends, pushed apart where they would overlap.

    Of more than 12 curves the 11 that end highest are named; the others are grey.
    """
    highest = sorted(curves, key=lambda key: curves[key][-1][1], reverse=True)
    named, others = (highest, []) if len(highest) <= 12 else (highest[:11], highest[11:])
    legible = palette(20)[to_oklab(palette(20))[:, 0] < 0.75] / 255  # lighter colours are hard to read on white
    colours = dict(zip([key for key in curves if key in named], legible))
    for key, points in curves.items():
        steps, values = zip(*points)
        style = {"color": colours.get(key, RULE), "zorder": 2 if key in named else 1.5}
        axes.plot(steps, values, linewidth=1.6, marker="o" if len(points) < 15 else None, markersize=3.5, **style)
    ends = [(curves[key][-1][1], key, colours[key]) for key in named]
    if others:
        ends.append((curves[others[len(others) // 2]][-1][1], f"{len(others)} more", GREY))
    axes.set_xlabel("step", fontsize=9, color=GREY)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    plain_axes(axes, name)
    low, high = axes.get_ylim()
    ends.sort(key=lambda end: end[0])
    heights = _spread([(value - low) / (high - low) for value, _, _ in ends], 0.075)
    for height, (_, key, colour) in zip(heights, ends):
        axes.text(1.02, height, key, transform=axes.transAxes, color=colour, fontsize=9, va="center", parse_math=False)


def plain_axes(axes: Any, name: str) -> None:
    """A matplotlib `axes` without ink that says nothing."""
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold", color=INK, parse_math=False)
    axes.tick_params(colors=GREY, labelsize=9, length=0)
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def under_title(figure: Any, title: str, message: str = "") -> Image.Image:
    """A matplotlib `figure` as a picture below its title, or a message in its middle."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    head = 70 if title else 16
    canvas = FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    canvas.draw()
    plot = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    picture = Image.new("RGB", (plot.width, plot.height + head), PAPER)
    picture.paste(plot, (0, head))
    draw = ImageDraw.Draw(picture)
    write(draw, (16, 24), title, 22, INK, bold=True, room=plot.width - 32, anchor="la")
    if message:
        write(draw, (picture.width / 2, picture.height / 2), message, 15, GREY, anchor="mm")
    return picture


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending `heights` moved as little as need be so that neighbours are `gap` apart, within 0..1 where they fit."""
    gap = min(gap, 1 / max(len(heights) - 1, 1))
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed
