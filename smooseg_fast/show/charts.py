"""Charts for people: the confusion picture and training curves, by matplotlib without pyplot or a display."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from ..measure.scores import Scores, percent
from .lettering import font_file, length, shorten
from .pictures import GREY, INK, PAPER, palette, to_oklab

RULE, MARK, BLUE = "#d9dde1", "#e5480c", "#92bfdd"
SHADES = "Blues"  # matplotlib's name for the colours of 0 to 100 % in the confusion picture
DPI = 100
NAME_PX = 240  # room for a class name

Point = tuple[float, float]


def confusion_picture(confusion: np.ndarray, scores: Scores, class_names: Sequence[str] | None = None) -> Image.Image:
    """Draw the counts int64 [K, C] of pixels in group k and class c: a row is a class (100 %), a column a group.

    Groups of one class stand together, and groups without a class apart on the right. Cells that `scores` counts as
    right are outlined. Next to each row stand the class's share of the labelled pixels and its IoU. Numbers below 0.5 %
    are left out, and so are all numbers where the cells are too small. ValueError when the counts, the scores and the
    names do not fit.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    groups, classes = confusion.shape
    names = [str(c) for c in range(classes)] if class_names is None else list(class_names)
    if (groups, classes) != (len(scores.mapping), len(scores.iou)) or len(names) != classes:
        raise ValueError(
            f"confusion {confusion.shape}, {len(scores.mapping)} mapped groups and {len(names)} class names do not fit"
        )
    columns = _columns(confusion, scores)
    pixels = confusion.sum(0)
    with np.errstate(invalid="ignore"):
        shares = confusion.T / pixels[:, None]  # [C, K], nan for absent classes
    cells = np.stack([np.full(classes, np.nan) if k is None else shares[:, k] for k in columns], axis=1)

    side = int(np.clip(1500 / max(groups, classes), 12, 44))  # pixels of a cell
    small, size, px = int(np.clip(0.42 * side, 9, 15)), min(14, side - 1), 1 / side
    # the axes are the cells alone; everything else stands around them, and widens the picture when it is rendered
    figure = Figure((side * len(columns) / DPI, side * classes / DPI), dpi=DPI, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, len(columns)), ylim=(classes, 0))
    axes.set_axis_off()
    mesh = axes.pcolormesh(cells, cmap=SHADES, vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
    share_x, iou_x, name_x, head_y = len(columns) + 70 * px, len(columns) + 140 * px, -12 * px, -14 * px
    for x, heading in ((name_x, "class"), (share_x, "share"), (iou_x, "IoU")):
        put(axes, (x, head_y), heading, size, GREY, ha="right")
    for c, name in enumerate(names):
        put(axes, (name_x, c + 0.5), name, size, INK if pixels[c] else GREY, ha="right", room=NAME_PX)
        put(axes, (share_x, c + 0.5), percent(pixels[c] / pixels.sum()) if pixels[c] else "-", size, GREY, ha="right")
        put(axes, (iou_x, c + 0.5), percent(scores.iou[c]), size, ha="right", bold=True)
        for column in np.flatnonzero(cells[c] >= 0.005).tolist() if side >= 22 else ():
            ink = PAPER if cells[c, column] > 0.65 else INK
            put(axes, (column + 0.5, c + 0.5), f"{100 * cells[c, column]:.0f}", small, ink, ha="center")
    put(axes, (0, -36 * px), "groups", size, GREY)
    stride = math.ceil((length(str(groups - 1), small) + 4) * px)  # number every column where there is room
    for column, k in enumerate(columns):
        if k is None:
            put(axes, (column + 1, -36 * px), "no class", size, GREY)
            continue
        if column % stride == 0:
            put(axes, (column + 0.5, head_y), str(k), small, ha="center")
        if (c := scores.mapping[k]) >= 0 and pixels[c]:
            place, width = (column + 2 * px, c + 2 * px), 1 - 4 * px
            axes.add_patch(Rectangle(place, width, width, fill=False, edgecolor=MARK, linewidth=144 / DPI))
    left = name_x - min(max(length(name, size) for name in names), NAME_PX) * px
    put(axes, (left, -100 * px), f"{scores.matching.capitalize()} matching", 22, bold=True)
    means = f"accuracy {percent(scores.accuracy)} %,  mean IoU {percent(scores.miou)} %"
    put(axes, (left, -70 * px), f"{means},  {scores.pixels:,} labelled pixels", 15, GREY)
    key = axes.inset_axes((0, classes + 26 * px, 180 * px, 10 * px), transform=axes.transData)
    figure.colorbar(mesh, cax=key, orientation="horizontal", ticks=(0, 0.5, 1), format="{x:.0%}")
    key.spines["outline"].set_visible(False)
    key.tick_params(colors=GREY, labelsize=9, length=0)
    put(axes, (196 * px, classes + 31 * px), "of the class's pixels;  outlined: counted as right", 13, GREY)
    return rendered(figure)


def _columns(confusion: np.ndarray, scores: Scores) -> list[int | None]:
    """Return the groups in the order of their classes, the largest first; those without one follow an empty column."""
    groups, classes = confusion.shape
    order = sorted(range(groups), key=lambda k: (scores.mapping[k] % (classes + 1), -confusion[k].sum(), k))  # -1 last
    matched = sum(c >= 0 for c in scores.mapping)
    return [*order[:matched], None, *order[matched:]] if 0 < matched < groups else [*order]


def curves_picture(
    records: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[str]], title: str = ""
) -> Image.Image:
    """Draw training curves over the records' "step": a small panel for each entry of `panels` (title -> keys).

    Skips values that are not finite numbers, keys without any value, and panels without any key. Each curve's name
    stands at its end. Says so when there is nothing to draw.
    """
    from matplotlib.figure import Figure

    curves = {name: {key: points for key in keys if (points := _points(records, key))} for name, keys in panels.items()}
    curves = {name: by_key for name, by_key in curves.items() if by_key}
    columns = min(3, math.ceil(math.sqrt(len(curves)))) or 1
    rows = math.ceil(len(curves) / columns) or 1
    figure = Figure((5.6 * columns, 3.2 * rows + 0.5 * bool(title)), dpi=DPI, facecolor=PAPER, layout="constrained")
    steps = [step for by_key in curves.values() for points in by_key.values() for step, _ in points]
    for i, (name, by_key) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        _panel(axes, name, by_key)
        edge = max(0.02 * (max(steps) - min(steps)), 0.5)
        axes.set_xlim(min(steps) - edge, max(steps) + edge)  # the same in all, so that equal steps line up
        axes.locator_params(axis="x", integer=True)
    if not curves:
        figure.text(0.5, 0.5, "nothing recorded yet", color=GREY, ha="center")
    return rendered(figure, title)


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    pairs = [(record.get("step"), record.get(key)) for record in records]
    return [(x, y) for x, y in pairs if _finite(x) and _finite(y)]


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _panel(axes: Any, name: str, curves: Mapping[str, list[Point]]) -> None:
    """Draw one panel, the curves' names at their ends, pushed apart where they would overlap.

    Of more than 12 curves, names the 11 that end highest and draws the others grey.
    """
    highest = sorted(curves, key=lambda key: curves[key][-1][1], reverse=True)
    captioned, others = (highest, []) if len(highest) <= 12 else (highest[:11], highest[11:])
    legible = palette(20)[to_oklab(palette(20))[:, 0] < 0.75] / 255  # lighter colours are hard to read on white
    colours = dict(zip([key for key in curves if key in captioned], legible))
    for key, points in curves.items():
        style = {"color": colours.get(key, RULE), "zorder": 2 if key in captioned else 1.5}
        axes.plot(*zip(*points), linewidth=1.6, marker="o" if len(points) < 15 else None, markersize=3.5, **style)
    ends = [(curves[key][-1][1], key, colours[key]) for key in captioned]
    if others:
        ends.append((curves[others[len(others) // 2]][-1][1], f"{len(others)} more", GREY))
    axes.set_xlabel("step", fontsize=9, color=GREY)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    plain_axes(axes, name)
    low, high = axes.get_ylim()
    ends.sort(key=lambda end: end[0])
    heights = _pushed_apart([(value - low) / (high - low) for value, _, _ in ends], 0.075)
    for height, (_, key, colour) in zip(heights, ends):
        put(axes, (1.02, height), key, 12, colour, transform=axes.transAxes)


def _pushed_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending `heights` as little as possible so that neighbours are `gap` apart, within 0..1 where they fit."""
    gap = min(gap, 1 / max(len(heights) - 1, 1))
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def plain_axes(axes: Any, name: str) -> None:
    """Give a matplotlib `axes` its title, and take away ink that says nothing."""
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold", color=INK, parse_math=False)
    axes.tick_params(colors=GREY, labelsize=9, length=0)
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def put(
    axes: Any,
    at: Point,
    text: str,
    size: int,
    ink: str = INK,
    *,
    bold: bool = False,
    room: float = math.inf,
    **more: Any,
) -> None:
    """Write one line in any language on a matplotlib `axes`, shortened to `room`; size and room in pixels."""
    from matplotlib.font_manager import FontProperties

    text = shorten(text, size, bold, room)
    font = FontProperties(fname=font_file(text, bold), size=size * 72 / DPI)
    axes.text(*at, text, color=ink, font=font, parse_math=False, **{"va": "center_baseline"} | more)


def rendered(figure: Any, title: str = "") -> Image.Image:
    """Draw a matplotlib `figure` below its title. Without a layout, text outside the figure widens the picture."""
    if title:
        text = shorten(title, 22, True, figure.get_figwidth() * DPI - 32)
        figure.suptitle(text, x=0.014, ha="left", color=INK, font=font_file(text, True), size=16, parse_math=False)
    margins = {"bbox_inches": "tight", "pad_inches": 0.32}
    if figure.get_layout_engine() is not None:
        margins = {}
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sign that no font has is drawn as a box
        figure.savefig(buffer, format="png", **margins)
    return Image.open(buffer).convert("RGB")
