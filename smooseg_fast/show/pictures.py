"""Pictures for people: label colours, palette masks, overlays and contact sheets.

Images are uint8 [H, W, 3], label maps uint8 [H, W], colours uint8 [K, 3], one for each label. Nothing needs a display.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from ..errors import UserError
from ..system.files import write_atomic
from .lettering import length, write

INK, GREY, PAPER, WELL = "#1d2126", "#69717b", "#ffffff", "#eef0f2"

# hand-picked, then moved apart: the closest two differ by 0.11 in OKLab, and by 0.06 to colour-blind eyes
_HAND_PICKED = (
    "0c73b4 e6a00c 27a663 c77abe 53aef2 e5480c f8e62d 7f838b 6c3c9d 8d470d "
    "a4db86 0c4f3d a7ddec f89493 820c1a 3fc2b1 313c7c cdb2db 778121 f8cfb8"
)
# OKLab (Ottosson 2020): linear RGB to cone responses; their cube roots to lightness and two opponent axes
_RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LMS_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_LIGHTNESS, _CHROMA = (0.66, 0.46, 0.83, 0.56, 0.36, 0.75), (0.17, 0.12, 0.10, 0.15)


def palette(k: int) -> np.ndarray:
    """Return distinct colours uint8 [k, 3], always the same: palette(j) is the start of palette(k) for j < k.

    The first twenty are hand-picked with colour-blind eyes in mind. The others take hues a golden angle apart in OKLab,
    alternate in lightness and chroma, and keep their distance from all earlier ones: no two of the first 64 are closer
    than 0.05, about twice a visible step. ValueError for k below 1.
    """
    if k < 1:
        raise ValueError(f"a palette needs at least one colour, got {k}")
    return np.array(_colours(k), np.uint8)


def write_mask(path: str | Path, labels: np.ndarray, colours: np.ndarray) -> Path:
    """Write labels uint8 [H, W] as an 8-bit palette PNG (mode P) whose indices are the labels.

    Labels beyond `colours` are black. UserError when the file cannot be written; ValueError for other shapes or dtypes.
    """
    colours = _checked_colours(colours)
    mask = Image.fromarray(_checked_labels(labels))
    # all 256 colours: Pillow packs a smaller palette into 1, 2 or 4 bits a pixel, and 255 needs an entry of its own
    mask.putpalette(colours.tobytes().ljust(3 * 256, b"\0"))  # turns mode L into P and keeps the numbers
    return write_atomic(path, lambda target: mask.save(target, "PNG"))


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Lay the colours of labels uint8 [H, W] over `image` uint8 [H, W, 3] -> uint8 [H, W, 3].

    Inside a region: alpha * colour + (1 - alpha) * image. Along its border: a lighter line, 1 pixel wide up to a short
    side of some 500 pixels and in proportion beyond, so that it survives a thumbnail. alpha 1 gives the flat map,
    without lines. Labels beyond `colours` (255: no label) leave the image bare. ValueError for shapes that do not fit
    or alpha outside 0..1.
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
    for top in range(0, len(image), 512):  # bands: a scan of 10,000 pixels would take gigabytes at once
        rows = slice(top, top + 512)
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
    """Lay out a sheet `width` pixels wide: title, legend, column titles, and rows of thumbnails in equal cells.

    All cells have the median shape of the images (between 2:3 and 16:9). An image is centred in its cell, never cropped
    or stretched. Text that does not fit loses its middle.

    Args:
        rows: images of any size, None for an empty cell; empty cells fill up short rows.
        row_titles: stand below their rows.
        legend: (colour, text) pairs.

    Raises:
        ValueError: without images, or with a width below 200.
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
    write(draw, (margin, margin), title, round(28 * unit), INK, bold=True, room=width - 2 * margin, anchor="la")
    if swatches:
        sheet.paste(swatches, (margin, top))
    for c, text in enumerate(column_titles[:columns]):
        at = (margin + c * (cell_width + gap), grid_top - line // 2 - gap // 4)
        write(draw, at, text, small, INK, bold=True, room=cell_width)
    for r, row in enumerate(rows):
        y = grid_top + r * row_height
        for c in range(columns):
            x = margin + c * (cell_width + gap)
            draw.rectangle((x, y, x + cell[0] - 1, y + cell[1] - 1), fill=WELL)
            picture = row[c] if c < len(row) else None
            if picture is not None:
                thumbnail = _fit(picture, cell)
                sheet.paste(thumbnail, (x + (cell[0] - thumbnail.width) // 2, y + (cell[1] - thumbnail.height) // 2))
        if r < len(row_titles):
            write(draw, (margin, y + cell[1] + line // 2), row_titles[r], small, GREY, room=width - 2 * margin)
    return sheet


def save(path: str | Path, image: Image.Image | np.ndarray) -> Path:
    """Write `image` (an array uint8 [H, W, 3] or [H, W], or a Pillow image) as PNG or JPEG, by the suffix of `path`.

    UserError for another suffix, or when the file cannot be written.
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
        if np.linalg.norm(to_oklab(chosen) - to_oklab(colour), axis=-1).min() > distance:
            chosen = np.vstack([chosen, colour])
        else:
            distance *= 0.999  # the space fills up: ask for a little less
        candidate += 1
    return tuple(map(tuple, chosen.tolist()))


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB [..., 3] in 0..255 to OKLab [..., 3]."""
    encoded = rgb / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T


def _from_oklab(lightness: float, a: float, b: float) -> np.ndarray:
    """Convert to sRGB uint8 [3]; a colour that a screen cannot show becomes greyer until it can."""
    while True:
        linear = np.linalg.solve(_RGB_TO_LMS, np.linalg.solve(_LMS_TO_LAB, np.array([lightness, a, b])) ** 3)
        if linear.min() > -0.001 and linear.max() < 1.001:
            break
        a, b = 0.9 * a, 0.9 * b
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def _checked_labels(labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 2 or labels.dtype != np.uint8 or not labels.size:
        raise ValueError(f"labels must be uint8 [H, W], got {labels.dtype} {labels.shape}")
    return labels


def _checked_colours(colours: np.ndarray) -> np.ndarray:
    if colours.ndim != 2 or colours.shape[1] != 3 or not 1 <= len(colours) <= 256 or colours.dtype != np.uint8:
        raise ValueError(f"colours must be uint8 [K, 3] with K in 1..256, got {colours.dtype} {colours.shape}")
    return colours


def _legend(legend: Sequence[tuple[Sequence[int], str]], width: int, size: int) -> Image.Image | None:
    """Draw swatches and their texts in columns of one width; None for an empty legend."""
    if not legend:
        return None
    swatch, pad, line = round(1.1 * size), round(0.5 * size), round(1.8 * size)
    longest = max(length(text, size) for _, text in legend)
    # one endless name must not leave a single column
    columns = max(width // (swatch + min(longest, width // 5) + 4 * pad), 1)
    column = min(swatch + longest + 4 * pad, width // columns)
    lines = math.ceil(len(legend) / columns)
    columns = math.ceil(len(legend) / lines)  # lines of about one length
    picture = Image.new("RGB", (width, line * lines), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (colour, text) in enumerate(legend):
        x, y = i % columns * column, i // columns * line + line // 2
        box = (x, y - swatch // 2, x + swatch - 1, y - swatch // 2 + swatch - 1)
        draw.rounded_rectangle(box, radius=swatch // 5, fill=tuple(int(v) for v in colour))
        write(draw, (x + swatch + pad, y), text, size, INK, room=column - swatch - 3 * pad)
    return picture


def _fit(image: np.ndarray, cell: tuple[int, int]) -> Image.Image:
    """Fit `image` into `cell` (width, height): shrunk without ringing; far enlarged, its pixels stay squares."""
    height, width = image.shape[:2]
    scale = min(cell[0] / width, cell[1] / height)
    size = [max(round(scale * side), 1) for side in (width, height)]
    size = [room if room - side == 1 else side for side, room in zip(size, cell)]  # rounding must not leave a sliver
    filters = Image.Resampling.HAMMING, Image.Resampling.BILINEAR, Image.Resampling.NEAREST
    return Image.fromarray(image).convert("RGB").resize(size, filters[(scale > 1) + (scale > 3)])
