"""Pictures for people: label colours, palette masks and contact sheets.

Images are uint8 [H, W, 3], label maps uint8 [H, W], colours uint8 [K, 3], one for each label. Nothing needs a display.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ..datasets import IGNORE
from ..system.files import write_atomic
from .lettering import font_for, write

INK, GREY, PAPER, WELL = "#1d2126", "#69717b", "#ffffff", "#eef0f2"
WIDTH, MARGIN, GAP, LINE, TEXT = 1600, 40, 14, 30, 17  # pixels of a contact sheet
ROOM = WIDTH - 2 * MARGIN


def by_label(colours: np.ndarray) -> np.ndarray:
    """The colour of every label, uint8 [256, 3]: those of groups, white for pixels without data, black for others."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    table[IGNORE] = 255
    return table


def write_mask(path: str | Path, labels: np.ndarray, colours: np.ndarray) -> Path:
    """Write labels uint8 [H, W] as an 8-bit palette PNG (mode P) whose indices are the labels.

    Pixels without data, of label 255, are white, and other labels beyond `colours` black. WriteError when the file
    cannot be written.
    """
    mask = Image.fromarray(labels)
    # all 256 colours: Pillow packs a smaller palette into 1, 2 or 4 bits a pixel, and 255 needs an entry of its own
    mask.putpalette(by_label(colours).tobytes())  # turns mode L into P and keeps the numbers
    return write_atomic(path, lambda target: mask.save(target, "PNG"))


def cell_size(shapes: Iterable[Sequence[int]], columns: int) -> tuple[int, int]:
    """The width and height in pixels of the cells of a sheet with so many columns, for images of these shapes [H, W]:
    their median shape, between 2:3 and 16:9."""
    width = (ROOM + GAP) // columns - GAP
    aspect = np.median([shape[1] / shape[0] for shape in shapes])
    return width, round(width / np.clip(aspect, 2 / 3, 16 / 9))


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray | Image.Image]],
    column_titles: Sequence[str],
    captions: Sequence[Sequence[str]],
    legend: Sequence[tuple[Sequence[int], str]],
    title: str,
) -> Image.Image:
    """Lay out a sheet WIDTH pixels wide: title, legend, column titles, and rows of thumbnails in equal cells.

    All cells have the shape that `cell_size` gives. An image is centred in its cell, never cropped or stretched. Text
    that does not fit loses its middle.

    Args:
        rows: images of any size, arrays or Pillow's; a row may be shorter than others.
        captions: of each row, side by side below it, each as wide as an equal share of the columns.
        legend: (colour, text) pairs.
    """
    columns, across = max(map(len, rows)), max(1, *map(len, captions))
    grid = [[image if isinstance(image, Image.Image) else Image.fromarray(image) for image in row] for row in rows]
    cell = cell_size([(image.height, image.width) for row in grid for image in row], columns)
    span = columns // across * (cell[0] + GAP)
    swatches = _legend(legend)
    legend_top = MARGIN + 48
    grid_top = legend_top + swatches.height + GAP + LINE
    row_height = cell[1] + LINE + GAP
    sheet = Image.new("RGB", (WIDTH, grid_top + row_height * len(rows) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, MARGIN + 17), title, 28, INK, bold=True, room=ROOM)
    sheet.paste(swatches, (MARGIN, legend_top))
    for c, text in enumerate(column_titles):
        place = MARGIN + c * (cell[0] + GAP), grid_top - LINE // 2 - 4
        write(draw, place, text, TEXT, INK, bold=True, room=cell[0])
    for r, (row, texts) in enumerate(zip(grid, captions)):
        top = grid_top + r * row_height
        for c, image in enumerate(row):
            left = MARGIN + c * (cell[0] + GAP)
            if image.size != cell:
                image = ImageOps.pad(image.convert("RGB"), cell, Image.Resampling.HAMMING, WELL)
            sheet.paste(image, (left, top))
        for number, text in enumerate(texts):
            write(draw, (MARGIN + number * span, top + cell[1] + LINE // 2), text, TEXT, GREY, room=span - GAP)
    return sheet


def _legend(entries: Sequence[tuple[Sequence[int], str]]) -> Image.Image:
    """Draw swatches and their texts in columns of one width, up to a fifth of the sheet."""
    longest = max((font_for(text, TEXT).getlength(text) for _, text in entries), default=0)
    column = min(round(longest) + 60, ROOM // 5)
    columns = ROOM // column
    picture = Image.new("RGB", (ROOM, LINE * math.ceil(len(entries) / columns)), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (colour, text) in enumerate(entries):
        x, y = i % columns * column, i // columns * LINE + LINE // 2
        draw.rounded_rectangle((x, y - 9, x + 18, y + 9), radius=4, fill=tuple(colour))
        write(draw, (x + 28, y), text, TEXT, INK, room=column - 34)
    return picture


def save(path: str | Path, image: Image.Image | np.ndarray, *, sync: bool = True) -> Path:
    """Write `image` (uint8 [H, W, 3], or a Pillow image in RGB) as PNG or JPEG, by the suffix of `path`.

    WriteError when the file cannot be written. sync: as for `write_atomic`.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    # JPEG takes quality, and PNG the level: a third of the time for a few more bytes
    return write_atomic(path, lambda target: picture.save(target, quality=92, subsampling=0, compress_level=1), sync)
