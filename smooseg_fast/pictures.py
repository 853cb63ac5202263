"""Pictures for people: label colours, palette masks, overlays, contact sheets, the confusion table and training curves.

Images are uint8 [H, W, 3], label maps uint8 [H, W], colours uint8 [K, 3] with a row a label. Nothing here needs a display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from .errors import UserError
from .files import write_atomic
from .metrics import Scores, percent

INK, GREY, RULE, PAPER, WELL, MARK = "#1d2126", "#69717b", "#d9dde1", "#ffffff", "#eef0f2", "#e5480c"

# Hand-picked, then moved apart: the closest two differ by 0.11 in OKLab, and by 0.06 as protanopia and deuteranopia see them.
_HAND_PICKED = (
    "0c73b4 e6a00c 27a663 c77abe 53aef2 e5480c f8e62d 7f838b 6c3c9d 8d470d "
    "a4db86 0c4f3d a7ddec f89493 820c1a 3fc2b1 313c7c cdb2db 778121 f8cfb8"
)
# OKLab (Ottosson 2020): linear RGB to cone responses; their cube roots to lightness and two opponent axes
_RGB_TO_LMS = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566], [0.0883024619, 0.2817188376, 0.6299787005]]
)
_LMS_TO_LAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099], [0.0259040371, 0.7827717662, -0.8086757660]]
)
_LIGHTNESS, _CHROMA = (0.66, 0.46, 0.83, 0.56, 0.36, 0.75), (0.17, 0.12, 0.10, 0.15)
BLUES = ("#f6f8fa", "#d3e3f0", "#92bfdd", "#3f86bd", "#0f4c86", "#082c56")  # 0 to 100 % in the confusion picture
# for what DejaVu Sans lacks (Chinese, Japanese, Korean): the usual fonts of Linux, macOS and Windows
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "Arial Unicode.ttf", "msyh.ttc", "malgun.ttf")


def palette(k: int) -> np.ndarray:
    """Distinct colours uint8 [k, 3], always the same ones: palette(j) is the start of palette(k) for j < k.

    Twenty are hand-picked with colour-blind eyes in mind. The others take hues a golden angle apart in OKLab, lightness and chroma
    alternating, and only those far enough from all before: no two of the first 64 are closer than 0.05, about twice a visible step.
    ValueError for k below 1.
    """
    if k < 1:
        raise ValueError(f"a palette needs at least one colour, got {k}")
    return np.array(_colours(k), np.uint8)


def write_mask(path: str | Path, labels: np.ndarray, colours: np.ndarray) -> Path:
    """An 8-bit palette PNG (mode P) of labels uint8 [H, W]: the indices are the labels, shown in `colours`; labels beyond them are black.

    UserError when it cannot be written; ValueError for other shapes or dtypes.
    """
    colours = _checked_colours(colours)
    mask = Image.fromarray(_checked_labels(labels))
    # filled up to 256 colours: Pillow packs a smaller palette into 1, 2 or 4 bits a pixel, and 255 needs an entry of its own
    mask.putpalette(colours.tobytes().ljust(3 * 256, b"\0"))  # turns mode L into P and keeps the numbers
    return write_atomic(path, lambda target: mask.save(target, "PNG"))


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """`image` uint8 [H, W, 3] under the colours of labels uint8 [H, W], uint8 [H, W, 3].

    Inside a region alpha * colour + (1 - alpha) * image; along its border a lighter line, 1 pixel wide up to a short side of some 500
    pixels and in proportion beyond, so that it survives a thumbnail. alpha 1 is the flat map, without lines. Labels beyond `colours`
    (255: no label) leave the image bare.
    ValueError for shapes that do not fit or alpha outside 0..1.
    """
    labels, colours = _checked_labels(labels), _checked_colours(colours)
    if image.shape != (*labels.shape, 3) or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 {(*labels.shape, 3)} like the labels, got {image.dtype} {image.shape}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0..1, got {alpha}")
    lookup, weights = np.zeros((2, 256, 3), np.uint16), np.zeros((2, 256), np.uint16)  # [inside or border, label]
    lookup[0, : len(colours)], weights[0, : len(colours)] = colours, round(256 * alpha)
    lookup[1, : len(colours)], weights[1, : len(colours)] = (colours.astype(np.uint16) + 255) // 2, 256
    line = max(1, round(min(labels.shape) / 350)) if alpha < 1 else 0
    border = (ndimage.maximum_filter(labels, line + 1) != ndimage.minimum_filter(labels, line + 1)).view(np.uint8)
    blend = np.empty_like(image)
    for rows in (slice(top, top + 512) for top in range(0, len(image), 512)):  # bands: a 10,000 pixel scan would take gigabytes at once
        weight = weights[border[rows], labels[rows]][..., None]
        blend[rows] = (image[rows] * (256 - weight) + lookup[border[rows], labels[rows]] * weight + 128) >> 8
    return blend


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray | None]],
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    legend: Sequence[tuple[Sequence[int], str]] = (),
    title: str = "",
    width: int = 1600,
) -> Image.Image:
    """Thumbnails in equal cells, `width` pixels wide and as tall as it takes: title, legend, column titles, then the rows.

    rows: images of any size, None for an empty cell; short rows are filled up with empty cells. A row's title stands below it. All
    cells have the median shape of the images (between 2:3 and 16:9), an image is centred in its cell and never cropped or stretched.
    legend: (colour, text) pairs. Text that does not fit loses its middle. ValueError without images or with a width below 200.
    """
    images = [image for row in rows for image in row if image is not None]
    if not images or width < 200:
        raise ValueError(f"a contact sheet needs an image and a width of 200 at least, got {len(images)} and {width}")
    unit = max(width / 1600, 0.6)  # sizes below are for a sheet of 1600
    margin, gap, columns = round(40 * unit), round(14 * unit), max(map(len, rows))
    cell_width = (width - 2 * margin - gap * (columns - 1)) // columns
    aspect = float(np.clip(np.median([image.shape[1] / image.shape[0] for image in images]), 2 / 3, 16 / 9))
    cell = (max(cell_width, 1), max(round(cell_width / aspect), 1))
    small, line = round(17 * unit), round(30 * unit)
    swatches = _legend(legend, width - 2 * margin, small)
    top = margin + (round(48 * unit) if title else 0)
    grid_top = top + (swatches.height + gap if swatches else 0) + (line if column_titles else 0)
    row_height = cell[1] + (line if row_titles else 0) + gap
    sheet = Image.new("RGB", (width, grid_top + row_height * len(rows) - gap + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (margin, margin), title, round(28 * unit), INK, bold=True, room=width - 2 * margin, anchor="la")
    if swatches:
        sheet.paste(swatches, (margin, top))
    for c, text in enumerate(column_titles[:columns]):
        at = (margin + c * (cell_width + gap), grid_top - line // 2 - gap // 4)
        _write(draw, at, text, small, INK, bold=True, room=cell_width)
    for r, row in enumerate(rows):
        y = grid_top + r * row_height
        for c in range(columns):
            x = margin + c * (cell_width + gap)
            draw.rectangle((x, y, x + cell[0] - 1, y + cell[1] - 1), fill=WELL)
            if c < len(row) and row[c] is not None:
                thumbnail = _fit(row[c], cell)
                sheet.paste(thumbnail, (x + (cell[0] - thumbnail.width) // 2, y + (cell[1] - thumbnail.height) // 2))
        if r < len(row_titles):
            _write(draw, (margin, y + cell[1] + line // 2), row_titles[r], small, GREY, room=width - 2 * margin)
    return sheet


def confusion_picture(confusion: np.ndarray, scores: Scores, class_names: Sequence[str] | None = None) -> Image.Image:
    """The table [K, C] of counts as a picture: a row a true class (its pixels are 100 %), a column a cluster, those of one class together.

    Outlined cells are what `scores` counts as right; clusters without a class stand apart on the right. Beside each row the class's
    share of the labelled pixels and its IoU. Numbers below 0.5 % are left out. ValueError when the table and the scores do not fit.
    """
    clusters, classes = confusion.shape
    names = [str(c) for c in range(classes)] if class_names is None else list(class_names)
    if (clusters, classes) != (len(scores.mapping), len(scores.iou)) or len(names) != classes:
        raise ValueError(f"confusion {confusion.shape}, {len(scores.mapping)} mapped clusters and {len(names)} class names do not fit")
    pixels = confusion.sum(0)
    shares = confusion.T / np.maximum(pixels, 1)[:, None]  # [C, K]
    order = sorted(range(clusters), key=lambda k: (scores.mapping[k] % (classes + 1), -confusion[k].sum(), k))  # -1 goes last
    side = int(np.clip(1500 / max(clusters, classes), 12, 44))
    size = int(np.clip(0.42 * side, 9, 15))
    text = min(max(size, 13), side - 1)
    matched = sum(c >= 0 for c in scores.mapping)
    apart = side // 2 if 0 < matched < clusters else 0
    margin, head = 32, 132
    left = margin + min(max(_length(name, text) for name in names), 240) + 14
    right = left + side * clusters + apart
    width = max(right + 140, left + 500) + margin
    picture = Image.new("RGB", (width, head + side * classes + 76), PAPER)
    draw = ImageDraw.Draw(picture)
    _write(draw, (margin, margin), f"{scores.matching.capitalize()} matching", 22, INK, bold=True)
    summary = f"accuracy {percent(scores.accuracy)} %,  mean IoU {percent(scores.miou)} %,  {scores.pixels:,} labelled pixels"
    _write(draw, (margin, margin + 30), summary, 15, GREY)
    for x, label, anchor in ((left - 14, "class", "rm"), (right + 70, "share", "rm"), (right + 140, "IoU", "rm")):
        _write(draw, (x, head - 14), label, text, GREY, anchor=anchor)
    stride = math.ceil((_length(str(clusters - 1), size) + 4) / side)  # number every column where there is room
    xs = [left + side * i + (apart if i >= matched else 0) for i in range(clusters)]
    _write(draw, (left, head - 36), "clusters", text, GREY)
    if apart:
        _write(draw, (xs[matched], head - 36), "no class", text, GREY)
    for i, (x, k) in enumerate(zip(xs, order)):
        if i % stride == 0:
            _write(draw, (x + side / 2, head - 14), str(k), size, INK, anchor="mm")
    for c, name in enumerate(names):
        y = head + side * c
        middle = y + side / 2
        _write(draw, (left - 14, middle), name, text, INK if pixels[c] else GREY, room=240, anchor="rm")
        share = percent(pixels[c] / pixels.sum()) if pixels[c] else "-"
        _write(draw, (right + 70, middle), share, text, GREY, anchor="rm")
        _write(draw, (right + 140, middle), percent(scores.iou[c]), text, INK, bold=True, anchor="rm")
        for x, k in zip(xs, order):
            box = (x, y, x + side - 2, y + side - 2)
            draw.rectangle(box, fill=_shade(shares[c, k]) if pixels[c] else PAPER)
            if scores.mapping[k] == c and pixels[c]:
                draw.rectangle(box, outline=MARK, width=2)
            if side >= 22 and shares[c, k] >= 0.005:
                ink = PAPER if shares[c, k] > 0.5 else INK
                _write(draw, (x + side / 2 - 1, middle - 1), f"{100 * shares[c, k]:.0f}", size, ink, anchor="mm")
    _confusion_key(draw, (left, head + side * classes + 34))
    return picture


def curves_picture(records: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[str]], title: str = "") -> Image.Image:
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
        axes.set_xlim(min(steps) - edge, max(steps) + edge)  # the same in all, so that equal steps stand below each other
        axes.xaxis.get_major_locator().set_params(integer=True)
    return under_title(figure, title, "" if curves else "nothing recorded yet")


def save(path: str | Path, image: Image.Image | np.ndarray) -> Path:
    """`image` (an array uint8 [H, W, 3] or [H, W], or a Pillow image) as PNG or JPEG, by the suffix of `path`.

    UserError for another suffix or when it cannot be written.
    """
    path = Path(path)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if path.suffix.lower() == ".png":
        return write_atomic(path, lambda target: picture.save(target, "PNG"))
    if path.suffix.lower() in (".jpg", ".jpeg"):
        if picture.mode not in ("RGB", "L"):
            picture = picture.convert("RGB")
        return write_atomic(path, lambda target: picture.save(target, "JPEG", quality=92, subsampling=0))
    raise UserError(f"{path}: pictures are written as .png, .jpg or .jpeg; choose one of these suffixes")


@lru_cache(maxsize=32)
def _colours(k: int) -> tuple[tuple[int, ...], ...]:
    chosen = np.frombuffer(bytes.fromhex(_HAND_PICKED), np.uint8).reshape(-1, 3)[:k]
    distance, candidate = 0.12, 0
    while len(chosen) < k:
        hue = candidate * math.pi * (3 - math.sqrt(5))
        lightness = _LIGHTNESS[candidate % len(_LIGHTNESS)]
        chroma = _CHROMA[candidate // len(_LIGHTNESS) % len(_CHROMA)]
        colour = _from_oklab(lightness, chroma * math.cos(hue), chroma * math.sin(hue))
        if np.linalg.norm(_to_oklab(chosen) - _to_oklab(colour), axis=-1).min() > distance:
            chosen = np.vstack([chosen, colour])
        else:
            distance *= 0.999  # the space fills up: ask for a little less
        candidate += 1
    return tuple(map(tuple, chosen.tolist()))


def _to_oklab(rgb: np.ndarray) -> np.ndarray:
    encoded = rgb / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T


def _from_oklab(lightness: float, a: float, b: float) -> np.ndarray:
    """uint8 [3]; a colour that a screen cannot show becomes greyer until it can."""
    while True:
        linear = np.linalg.solve(_RGB_TO_LMS, np.linalg.solve(_LMS_TO_LAB, np.array([lightness, a, b])) ** 3)
        if linear.min() > -0.001 and linear.max() < 1.001:
            break
        a, b = 0.9 * a, 0.9 * b
    linear = linear.clip(0, 1)
    return np.rint(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)).astype(np.uint8)


def _checked_labels(labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 2 or labels.dtype != np.uint8 or not labels.size:
        raise ValueError(f"labels must be uint8 [H, W], got {labels.dtype} {labels.shape}")
    return labels


def _checked_colours(colours: np.ndarray) -> np.ndarray:
    if colours.ndim != 2 or colours.shape[1] != 3 or not 1 <= len(colours) <= 256 or colours.dtype != np.uint8:
        raise ValueError(f"colours must be uint8 [K, 3] with K in 1..256, got {colours.dtype} {colours.shape}")
    return colours


@lru_cache(maxsize=2)
def _dejavu(bold: bool) -> tuple[str, frozenset[int]]:
    """The font that comes with matplotlib, and the characters it has: Latin, Greek, Cyrillic, Arabic, Hebrew and most signs."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    path = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"))
    return path, frozenset(FT2Font(path).get_charmap())


@lru_cache(maxsize=1)
def _wide_font() -> str | None:
    for name in _WIDE_FONTS:
        try:
            return str(ImageFont.truetype(name, 12).path)
        except OSError:
            continue
    return None


_truetype = lru_cache(maxsize=32)(ImageFont.truetype)


def _font(text: str, size: int, bold: bool) -> ImageFont.FreeTypeFont:
    path, known = _dejavu(bold)
    return _truetype(path if known.issuperset(map(ord, text)) else _wide_font() or path, size)


def _clean(text: str) -> str:
    """One printable line: file names can hold line breaks and bytes that are no text."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def _length(text: str, size: int, bold: bool = False) -> int:
    """Pixels that `text` takes."""
    text = _clean(text)
    return math.ceil(_font(text, size, bold).getlength(text))


def _shorten(text: str, size: int, bold: bool, room: float) -> str:
    """`text`, or its two ends around an ellipsis: the ends of a path say most."""
    if _length(text, size, bold) <= room:
        return text
    fits, longer = 0, len(text)
    while longer - fits > 1:
        keep = (fits + longer) // 2
        shorter = text[: keep - keep // 2] + "…" + text[len(text) - keep // 2 :]
        fits, longer = (keep, longer) if _length(shorter, size, bold) <= room else (fits, keep)
    return text[: fits - fits // 2] + "…" + text[len(text) - fits // 2 :]


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    ink: str,
    *,
    bold: bool = False,
    room: float = math.inf,
    anchor: str = "lm",
) -> None:
    text = _clean(_shorten(text, size, bold, room))
    draw.text(at, text, fill=ink, font=_font(text, size, bold), anchor=anchor)


def _legend(legend: Sequence[tuple[Sequence[int], str]], width: int, size: int) -> Image.Image | None:
    """Swatches with their texts in columns of one width, as many lines as it takes; None when there are none."""
    if not legend:
        return None
    swatch, pad, line = round(1.1 * size), round(0.5 * size), round(1.8 * size)
    longest = max(_length(text, size) for _, text in legend)
    columns = max(width // (swatch + min(longest, width // 5) + 4 * pad), 1)  # one endless name must not make a column of them all
    column = min(swatch + longest + 4 * pad, width // columns)
    lines = math.ceil(len(legend) / columns)
    columns = math.ceil(len(legend) / lines)  # lines of about one length
    picture = Image.new("RGB", (width, line * lines), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (colour, text) in enumerate(legend):
        x, y = i % columns * column, i // columns * line + line // 2
        box = (x, y - swatch // 2, x + swatch - 1, y - swatch // 2 + swatch - 1)
        draw.rounded_rectangle(box, radius=swatch // 5, fill=tuple(int(v) for v in colour))
        _write(draw, (x + swatch + pad, y), text, size, INK, room=column - swatch - 3 * pad)
    return picture


def _fit(image: np.ndarray, cell: tuple[int, int]) -> Image.Image:
    """`image` as large as `cell` (width, height) allows. Averaged down without ringing; far up, its pixels stay squares."""
    height, width = image.shape[:2]
    scale = min(cell[0] / width, cell[1] / height)
    size = [max(round(scale * side), 1) for side in (width, height)]
    size = [whole if whole - side == 1 else side for side, whole in zip(size, cell)]  # no sliver of background from rounding
    filters = Image.Resampling.HAMMING, Image.Resampling.BILINEAR, Image.Resampling.NEAREST
    return Image.fromarray(image).convert("RGB").resize(size, filters[(scale > 1) + (scale > 3)])


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
    _write(draw, (x + 132, y), note, 13, GREY)
    x += 132 + _length(note, 13) + 28
    draw.rectangle((x, y - 7, x + 14, y + 7), outline=MARK, width=2)
    _write(draw, (x + 24, y), "counted as right", 13, GREY)


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = [(record.get("step"), record.get(key)) for record in records]
    return [(x, y) for x, y in pairs if all(isinstance(v, (int, float)) and math.isfinite(v) for v in (x, y))]


def _panel(axes: Any, name: str, curves: Mapping[str, list[tuple[float, float]]]) -> None:
    """One panel on a matplotlib `axes`, the curves' names at their ends, pushed apart where they would overlap.

    Of more than 12 curves the 11 that end highest are named; the others are grey.
    """
    highest = sorted(curves, key=lambda key: curves[key][-1][1], reverse=True)
    named, others = (highest, []) if len(highest) <= 12 else (highest[:11], highest[11:])
    legible = palette(20)[_to_oklab(palette(20))[:, 0] < 0.75] / 255  # lighter colours are hard to read on white
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
    _write(draw, (16, 24), title, 22, INK, bold=True, room=plot.width - 32, anchor="la")
    if message:
        _write(draw, (picture.width / 2, picture.height / 2), message, 15, GREY, anchor="mm")
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
