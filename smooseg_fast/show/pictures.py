"""Pictures for people: label colours, palette masks, overlays and contact sheets.

Images are uint8 [H, W, 3], label maps uint8 [H, W], colours uint8 [K, 3], one for each label. Nothing needs a display.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

from ..datasets import IGNORE
from ..system.files import write_atomic
from .lettering import font_for, write

INK, GREY, PAPER, WELL = "#1d2126", "#69717b", "#ffffff", "#eef0f2"
WIDTH, MARGIN, GAP, LINE, TEXT = 1600, 40, 14, 30, 17  # pixels of a contact sheet
ROOM = WIDTH - 2 * MARGIN

# The first twenty are hand-picked, then moved apart: the closest two differ by 0.11 in OKLab (Ottosson 2020), and by
# 0.06 to colour-blind eyes. The others have hues a golden angle apart in OKLab, alternate in lightness and chroma, and
# keep their distance from all earlier ones.
_COLOURS = """
0c73b4 e6a00c 27a663 c77abe 53aef2 e5480c f8e62d 7f838b 6c3c9d 8d470d a4db86 0c4f3d a7ddec f89493 820c1a 3fc2b1
313c7c cdb2db 778121 f8cfb8 ba4764 c87a6d 621166 553506 4d610b 803e61 915f96 198770 4ecb6f 8d86d8 7d5acc a89044
a6b76d e25d8a 35a2b6 a16600 1251b5 066374 31e6bf a8a2f7 edc066 f084c2 80a11f a2182a 56dafe fda7e1 6b183b a75c53
f98d53 e1c812 374300 054457 2799e9 afc7fc cd95df fbafba ab72e4 016c09 5b71af ca7e1e 71dcd7 156843 832a8c 4949a9
2ac2dd dba069 70530a 5c4b8a 1b8391 9455b1 0f5b97 492970 23aa8a df6767 4b871a fdb57f b4b52d ca7299 8b2d72 c0d458
003883 83c178 8e3648 a55583 82aefa dfb4f6 8a7223 6f1a07 628eed 0fbdfb 349dd0 7068b7 2a2d89 e593a3 ac5b30 418557
3473ca 154a04 909b3b d3a64c 92cffc 004a28 6f4187 0580a6 b78b01 10a7a2 0c6758 074068 923700 483c03 0f6a2d fbb3a5
612c04 c16ec2 625a00 89dea0 750919 0dcd86 8b54c3 004843 26c9a8 52a580 e65d76 c3c0fa a8d797 bc484f 628109 013094
7cb3eb 67a724 364ab5 c5af12 bd79a3 6a0857 3794f6 a21c0d 376617 105e8a 006566 3ce3d0 f37ece 55c2bd b69bf9 7f490e
f782b0 1e857d c39cdd f49243 d1cf2a 1679c0 9d81d1 c57e5e 41ab5d 05c0ec 41306b b86ed9 7ed4fc c87f3f f08f84 632240
96bc79 419fc0 843d53 c38408 fea9d2 e0c666 9a5c89 df6a59 348930 8b2680 5744a5 feb76e a6ba3b d792d5 9b9648 902a67
b0d865 c23d61 e9c17a 9d51a6 4cb9f9 05464c 29579a 51256a 2ca896 6e172d 8d89cd 66006b a65e47 06617f 352988 25cb93
2a4702 9b2a10 cd718d d4a463 466fcc 6a2300 003e73 07829c 728aed 8c3e03 696dae bc96ff 73c384 6fdbe3 926e12 459ad5
8f363c 7a64b3 0e77c9 aa5478 90aafa e7b2ee 9351bd a95f23 68570a 064b1b 727c15 654884 e75e6a 046a3c 859e45 ffb299
cbaa4b c76cb9 bc4944 0b4932 1a2c94 753e80 007eb1 57a937 4247b4 7edfaa ae8f01 05a6ab 750c09 817626 004262 e69498
6d0450 4c90f8 338661 00c9b3 864311 cabcfd f87dc3 5b3105 5a5d07 fcaccb 85b0ed fa82a7 c0789b f09638 8e2379 c5d338
"""


def palette(k: int) -> np.ndarray:
    """Return the first k of 256 distinct colours, uint8 [k, 3].

    The first twenty suit colour-blind eyes. No two of the first 64 are closer than 0.05 in OKLab, twice a visible step.
    """
    return np.frombuffer(bytes.fromhex(_COLOURS), np.uint8).reshape(-1, 3)[:k]


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


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Blend `image` uint8 [H, W, 3] with the colours [K, 3] of its labels uint8 [H, W] -> uint8 [H, W, 3].

    Inside a region: half and half. Along its border: a lighter line, 1 pixel wide up to a short side of some 500 pixels
    and in proportion beyond, so that it survives a thumbnail. Pixels without data, of label 255, stay as they are.
    """
    half = by_label(colours) // 2
    blend = image // 2 + half[labels]
    line = max(1, round(min(labels.shape) / 350))
    border = ndimage.maximum_filter(labels, line + 1) != ndimage.minimum_filter(labels, line + 1)
    blend[border] = (half + 128)[labels[border]]
    no_data = labels == IGNORE
    blend[no_data] = image[no_data]
    return blend


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    column_titles: Sequence[str],
    row_titles: Sequence[str],
    legend: Sequence[tuple[Sequence[int], str]],
    title: str,
) -> Image.Image:
    """Lay out a sheet WIDTH pixels wide: title, legend, column titles, and rows of thumbnails in equal cells.

    All cells have the median shape of the images (between 2:3 and 16:9). An image is centred in its cell, never cropped
    or stretched. Text that does not fit loses its middle.

    Args:
        rows: images of any size; a row may be shorter than others.
        row_titles: stand below their rows.
        legend: (colour, text) pairs.
    """
    cell_width = (ROOM + GAP) // max(map(len, rows)) - GAP
    aspect = np.median([image.shape[1] / image.shape[0] for row in rows for image in row])
    cell = cell_width, round(cell_width / np.clip(aspect, 2 / 3, 16 / 9))
    swatches = _legend(legend)
    legend_top = MARGIN + 48
    grid_top = legend_top + swatches.height + GAP + LINE
    row_height = cell[1] + LINE + GAP
    sheet = Image.new("RGB", (WIDTH, grid_top + row_height * len(rows) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, MARGIN + 17), title, 28, INK, bold=True, room=ROOM)
    sheet.paste(swatches, (MARGIN, legend_top))
    for c, text in enumerate(column_titles):
        place = MARGIN + c * (cell_width + GAP), grid_top - LINE // 2 - 4
        write(draw, place, text, TEXT, INK, bold=True, room=cell_width)
    for r, (row, text) in enumerate(zip(rows, row_titles)):
        top = grid_top + r * row_height
        for c, image in enumerate(row):
            thumbnail = ImageOps.pad(Image.fromarray(image).convert("RGB"), cell, Image.Resampling.HAMMING, WELL)
            sheet.paste(thumbnail, (MARGIN + c * (cell_width + GAP), top))
        write(draw, (MARGIN, top + cell[1] + LINE // 2), text, TEXT, GREY, room=ROOM)
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


def save(path: str | Path, image: Image.Image | np.ndarray) -> Path:
    """Write `image` (uint8 [H, W, 3], or a Pillow image in RGB) as PNG or JPEG, by the suffix of `path`.

    WriteError when the file cannot be written.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return write_atomic(path, lambda target: picture.save(target, quality=92, subsampling=0))  # which PNG ignores
