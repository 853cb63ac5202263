"""Charts for people: the confusion picture and training curves, by matplotlib without pyplot or a display."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from ..measure.scores import Scores, percent
from .lettering import families, shorten
from .pictures import GREY, INK, PAPER

RULE, MARK, BLUE = "#d9dde1", "#e5480c", "#92bfdd"
CURVES = "#0c73b4", "#27a663", "#c77abe"
SHADES = "Blues"  # matplotlib's name for the colours of 0 to 100 % in the confusion picture
DPI = 100
NAME_PX = 240  # room for a class name


@contextmanager
def styled() -> Iterator[None]:
    """Give the charts drawn inside one look, without ink that says nothing; a sign that no font has becomes a box."""
    from cycler import cycler
    from matplotlib import rc_context

    look: dict[Any, Any] = {
        "figure.dpi": DPI,
        "font.family": families(),
        "text.parse_math": False,
        "text.color": INK,
        "axes.edgecolor": RULE,
        "axes.labelcolor": GREY,
        "axes.labelsize": 9,
        "axes.prop_cycle": cycler(color=CURVES),
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.labelcolor": "linecolor",
        **{f"axes.spines.{side}": False for side in ("top", "left", "right")},
        **{f"{axis}tick.color": GREY for axis in "xy"},
        **{f"{axis}tick.labelsize": 9 for axis in "xy"},
        **{f"{axis}tick.major.size": 0 for axis in "xy"},
    }
    with rc_context(look), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@styled()
def confusion_picture(
    confusion: np.ndarray, scores: Scores, class_names: Sequence[str], group_names: Sequence[str] | None = None
) -> Image.Image:
    """Draw the counts int64 [K, C] of pixels in group k and class c: a row is a class (100 %), a column a group.

    `group_names` [K] stand above the columns, by default the numbers; names lie aslant.
    Groups of one class stand together, and groups without a class apart on the right. Cells that `scores` counts as
    right are outlined. Next to each row stand the class's share of the labelled pixels and its IoU. Numbers below 0.5 %
    are left out, and so are all numbers where the cells are too small.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    groups, classes = confusion.shape
    pixels = confusion.sum(0)
    with np.errstate(invalid="ignore"):
        shares = confusion.T / pixels[:, None]  # [C, K], nan for absent classes
    columns = _columns(confusion, scores)
    cells = np.pad(shares, ((0, 0), (0, 1)), constant_values=np.nan)[:, columns]

    side = int(np.clip(1500 / max(groups, classes), 12, 44))  # pixels of a cell
    small, px = float(np.clip(0.3 * side, 6.5, 11)), 1 / side
    # the axes are the cells alone; everything else stands around them, and widens the picture when it is rendered
    figure = Figure((side * len(columns) / DPI, side * classes / DPI))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, len(columns)), ylim=(classes, 0), frame_on=False)
    axes.pcolormesh(cells, cmap=SHADES, vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
    means = f"accuracy {percent(scores.accuracy)} %,  mean IoU {percent(scores.miou)} %"
    axes.set_title(f"{scores.matching.capitalize()} matching:  {means},  {scores.pixels:,} labelled pixels", pad=12)
    axes.set_yticks(np.arange(classes) + 0.5, [shorten(name, 14, False, NAME_PX) for name in class_names], color=INK)
    words = list(map(str, range(groups))) if group_names is None else group_names
    aslant = not all(word.isdigit() for word in words)
    width = small if aslant else max(map(len, words)) * small
    stride = math.ceil((width + 4) / side)  # number every column where there is room
    numbered = [column for column, k in enumerate(columns) if k >= 0 and column % stride == 0]
    texts = [shorten(words[columns[column]], round(small * 1.4), False, NAME_PX / 2) for column in numbered]
    turn: Any = {"rotation": 45, "ha": "left", "rotation_mode": "anchor"} if aslant else {}
    axes.set_xticks([column + 0.5 for column in numbered], texts, size=small, **turn)
    axes.set_xlabel("groups" + ", those without a class on the right" * (-1 in columns), loc="left", labelpad=6)
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    end: Any = {"ha": "right", "va": "center_baseline"}
    share_x, iou_x = len(columns) + 70 * px, len(columns) + 140 * px
    axes.text(share_x, -14 * px, "share", color=GREY, size=9, **end)
    axes.text(iou_x, -14 * px, "IoU", color=GREY, size=9, **end)
    for c in range(classes):
        axes.text(share_x, c + 0.5, percent(pixels[c] / pixels.sum()) if pixels[c] else "-", color=GREY, size=9, **end)
        axes.text(iou_x, c + 0.5, percent(scores.iou[c]), weight="bold", size=9, **end)
        for column in np.flatnonzero(cells[c] >= 0.005) if side >= 22 else ():
            text, ink = f"{100 * cells[c, column]:.0f}", PAPER if cells[c, column] > 0.65 else INK
            axes.text(column + 0.5, c + 0.5, text, color=ink, size=small, ha="center", va="center_baseline")
    for x, k in enumerate(columns):
        if k >= 0 and (y := scores.mapping[k]) >= 0 and pixels[y]:
            corner, width = (x + 2 * px, y + 2 * px), 1 - 4 * px
            axes.add_patch(Rectangle(corner, width, width, fill=False, edgecolor=MARK, linewidth=144 / DPI))
    caption = "shades: 0 % (white) to 100 % of the class's pixels;  outlined: counted as right"
    axes.text(0, classes + 26 * px, caption, color=GREY, size=9)
    return rendered(figure, bbox_inches="tight", pad_inches=0.32)


def _columns(confusion: np.ndarray, scores: Scores) -> list[int]:
    """Return the groups in the order of their classes, the largest first; after a -1 those without a class."""
    groups, classes = confusion.shape
    order = sorted(range(groups), key=lambda k: (scores.mapping[k] % (classes + 1), -confusion[k].sum(), k))  # -1 last
    matched = sum(c >= 0 for c in scores.mapping)
    return [*order[:matched], -1, *order[matched:]] if 0 < matched < groups else order


@styled()
def curves_picture(
    records: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[str]], title: str = ""
) -> Image.Image:
    """Draw training curves over the records' "step": a small panel for each entry of `panels` (title -> keys).

    Skips values that are None, keys without any value, and panels without any key. Says so when there is nothing to
    draw.
    """
    from matplotlib.figure import Figure

    curves = {name: {key: points for key in keys if (points := _points(records, key))} for name, keys in panels.items()}
    curves = {name: by_key for name, by_key in curves.items() if by_key}
    columns = min(3, math.ceil(math.sqrt(len(curves)))) or 1
    rows = math.ceil(len(curves) / columns) or 1
    width, height = 5.6 * columns, 3.2 * rows + 0.5 * bool(title)
    figure, axes = Figure((width, height)), None
    for i, (name, by_key) in enumerate(curves.items()):
        # in inches; matplotlib's own layout takes as long as all the drawing
        left, bottom = 5.6 * (i % columns) + 0.6, 3.2 * (rows - 1 - i // columns) + 0.5
        place = left / width, bottom / height, 4.9 / width, 2.45 / height
        # equal steps line up in all panels
        axes = figure.add_axes(place, title=name, xlabel="step" if i + columns >= len(curves) else "", sharex=axes)
        for key, points in by_key.items():
            axes.plot(*zip(*points), marker="o" if len(points) < 15 else "", markersize=3.5, label=key)
        axes.grid(axis="y", color=RULE)
        if len(by_key) > 1:
            axes.legend()
        axes.locator_params(axis="x", integer=True, nbins=5)
        axes.locator_params(axis="y", nbins=5)
    if not curves:
        figure.text(0.5, 0.5, "nothing recorded yet", color=GREY, ha="center")
    return rendered(figure, title)


@styled()
def sweep_picture(means: Sequence[Mapping[str, Any]], axes: Sequence[str], figure: str) -> Image.Image:
    """Draw a map of `figure` over the first two of the settings `axes`; each cell has its mean in %, and its deviation.

    A third setting and more are averaged over; the deviation is then left out.
    """
    from matplotlib.figure import Figure

    names = [*axes[:2], *[""] * (2 - len(axes))]
    across, down = (list(dict.fromkeys(row.get(name, "") for row in means)) for name in names)
    cells: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in means:
        cells.setdefault((row.get(names[1], ""), row.get(names[0], "")), []).append(row)
    shades = [[np.mean([row[figure] for row in cells.get((y, x), ())] or np.nan) for x in across] for y in down]
    drawing = Figure((2.5 + 1.3 * len(across), 1.8 + 0.6 * len(down)), layout="constrained")
    plot = drawing.add_subplot(xlabel=names[0], ylabel=names[1], frame_on=False)
    plot.pcolormesh(np.array(shades), cmap=SHADES, edgecolors=PAPER, linewidth=1.5)
    plot.set_xticks(np.arange(len(across)) + 0.5, list(map(str, across)))
    plot.set_yticks(np.arange(len(down)) + 0.5, list(map(str, down)))
    middle = (np.nanmin(shades) + np.nanmax(shades)) / 2
    for (y, x), rows in cells.items():
        mean, deviation = np.mean([row[figure] for row in rows]), rows[0][f"{figure}_std"]
        text = percent(float(mean)) + ("" if len(rows) > 1 or deviation is None else f" ± {percent(deviation)}")
        ink = PAPER if mean > middle else INK
        plot.text(across.index(x) + 0.5, down.index(y) + 0.5, text, color=ink, size=9, ha="center", va="center")
    return rendered(drawing, f"{figure.replace('_', ' ')}, %")


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def rendered(figure: Any, title: str = "", **margins: Any) -> Image.Image:
    """Draw a matplotlib `figure` below its title; `margins` go to its savefig."""
    text = shorten(title, 22, True, figure.get_figwidth() * DPI - 32)
    figure.suptitle(text, x=0.014, ha="left", size=16, weight="bold")
    if (layout := figure.get_layout_engine()) is not None:
        layout.set(w_pad=0.15, h_pad=0.12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1}, **margins)
    return Image.open(buffer).convert("RGB")
