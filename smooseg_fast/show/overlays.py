"""Groups over an image: a fill in which the image is the shading, outlines, and names on large regions.

The fill has the hue of a group and the texture of the image. Mixing both colours would turn blue over orange into
grey; here a group looks alike wherever it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from ..datasets import IGNORE
from ..segment.colours import from_oklab, to_oklab
from .lettering import font_for, shorten

MIDDLE, PULL = 0.68, 0.8  # lightness of fills, and how much of a colour's own distance from it is left
SHADING = 0.4  # lightness that the image's adds, from black to white
GREY, BRIGHTEST = 0.6, 0.92  # lightness that adds nothing, and that of white in a light group
CELLS, BROAD = 12, 0.3  # parts of the long side in which light and dark are broad, and how much of that is left
EDGE = 0.34  # lightness of outlines
LINE = 400  # pixels of the short side for each pixel of an outline's width
SEARCHED = 96  # pixels of the long side at which large regions are searched
LARGE = 0.03  # the least share of the image that a region with a name has
TEXTS = 10  # names on an image, at most
SIZES = 0.022, 0.042  # heights of names, in long sides of the image
RIM = "#1d2126"  # about white letters


class Region(NamedTuple):
    """A connected part of a group: the place (x, y) deep inside it, and the distance from there to its border."""

    number: int
    x: float
    y: float
    radius: float


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """Fill an image uint8 [H, W, 3] with the colours uint8 [K, 3] of its labels uint8 [H, W] -> RGB.

    The lightness of the fill is even but for the texture of the image. Regions have dark outlines, 1 pixel wide up to a
    short side of some 600 pixels and in proportion beyond. Pixels without data, of label 255, stay as they are.
    """
    largest, no_data = int(labels.max(initial=0)), None
    if largest == IGNORE:
        no_data = labels == IGNORE
        largest = int(np.where(no_data, 0, labels).max(initial=0))
    grey = texture(image)
    grey[outlines(labels)] = 0
    pixels = shades_of(colours[: largest // 8 * 8 + 8].tobytes()).take(labels.astype(np.uint16) << 8 | grey)
    if no_data is not None:
        pixels.view(np.uint8).reshape(*labels.shape, 4)[no_data, :3] = image[no_data]
    return Image.frombytes("RGB", labels.shape[::-1], pixels, "raw", "RGBX")


def texture(image: np.ndarray) -> np.ndarray:
    """The light and dark of an image uint8 [H, W, 3] with little of what is broad, uint8 [H, W], 1 to 255.

    A bright sky and a dark street get fills of about one lightness, or a light blue and a dark one could not be told
    apart.
    """
    grey = Image.fromarray(image).convert("L")
    cells = [max(1, round(CELLS * side / max(grey.size))) for side in grey.size]
    broad = np.asarray(grey.resize(cells, Image.Resampling.BOX, reducing_gap=2.0), np.float32)
    change = np.rint(128 + (1 - BROAD) * (128 - broad)).astype(np.uint8)  # 128 for none; the middle grey stays
    smooth = Image.fromarray(change).resize(grey.size, Image.Resampling.BILINEAR)
    return np.maximum(np.asarray(ImageChops.add(grey, smooth, 1, -128)), 1)


def outlines(labels: np.ndarray) -> np.ndarray:
    """Where labels uint8 [H, W] change, bool [H, W]; the line lies on both sides of the border."""
    width = max(1, round(min(labels.shape) / LINE))
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    for axis in (0, 1) if width > 1 else ():
        thin = border.swapaxes(0, axis)
        wide = thin.copy()
        for far in range(1, width // 2 + 1):
            wide[:-far] |= thin[far:]
        for far in range(1, (width + 1) // 2):
            wide[far:] |= thin[:-far]
        border = wide.swapaxes(0, axis)
    return border


@lru_cache(maxsize=64)
def shades_of(colours: bytes) -> np.ndarray:
    """The pixel for every label and grey value, uint32 [65536], by 256 * label + grey; grey 0 is the outline. The bytes
    of a pixel are red, green, blue and 255."""
    lab = to_oklab(np.frombuffer(colours, np.uint8).reshape(-1, 1, 3))
    grey = to_oklab(np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1))
    table = np.repeat(lab, 256, 1)
    fill, shading = MIDDLE + PULL * (lab[..., 0] - MIDDLE), SHADING * (grey[:, 0] - GREY)
    room = (BRIGHTEST - fill) / (SHADING * (1 - GREY))  # of the light half
    table[..., 0] = fill + shading * np.where(shading > 0, room.clip(0, 1), 1)
    table[:, 0, 0] = EDGE
    shades = np.full((256, 256, 4), (0, 0, 0, 255), np.uint8)
    shades[: len(table), :, :3] = from_oklab(table)
    return shades.view(np.uint32).ravel()


def regions(labels: np.ndarray) -> list[Region]:
    """The large connected regions of labels uint8 [H, W], largest first, searched in a reduced copy."""
    scale = max(1.0, max(labels.shape) / SEARCHED)
    size = [max(1, round(side / scale)) for side in labels.shape[::-1]]
    small = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    core, inside = small[1:-1, 1:-1], np.zeros(small.shape, bool)  # pixels of four equal neighbours
    inside[1:-1, 1:-1] = core != IGNORE
    for neighbours in (small[:-2, 1:-1], small[2:, 1:-1], small[1:-1, :-2], small[1:-1, 2:]):
        inside[1:-1, 1:-1] &= core == neighbours
    parts = connected(inside)
    areas = np.bincount(parts[inside]) / small.size
    chosen = [part for part in np.argsort(-areas, kind="stable")[:TEXTS].tolist() if areas[part] >= LARGE]
    depth, outside, found = depths(inside), np.nonzero(~inside), []
    for part in chosen:
        y, x = divmod(int(np.where(parts == part, depth, 0).argmax()), small.shape[1])
        radius = np.hypot(outside[0] - y, outside[1] - x).min()
        found.append(Region(int(small[y, x]), (x + 0.5) * scale, (y + 0.5) * scale, float(radius) * scale))
    return found


def connected(inside: np.ndarray) -> np.ndarray:
    """A number, 1 or more, for every connected part of a map bool [h, w] whose last column is False, int [h, w].

    Pixels of a part share sides, not corners alone. Runs of a row get numbers, and those that touch take the least of
    theirs until none differ. Numbers may be left out. SciPy has this, but takes a fifth of a second to import.
    """
    starts = inside.copy()
    starts[:, 1:] &= ~inside[:, :-1]
    numbers = np.cumsum(starts).reshape(inside.shape) * inside
    touching = (starts[1:] | starts[:-1]) & inside[1:] & inside[:-1]  # where one of two runs begins, they first touch
    above, below = numbers[:-1][touching], numbers[1:][touching]
    least = np.arange(numbers.max(initial=0) + 1)
    while (differ := least[above] != least[below]).any():
        above, below = least[above[differ]], least[below[differ]]
        np.minimum.at(least, np.maximum(above, below), np.minimum(above, below))
        while ((further := least[least]) != least).any():
            least = further
    return least[numbers]


def depths(inside: np.ndarray) -> np.ndarray:
    """The distance, along rows and columns, from each pixel of a map bool [h, w] to the nearest that is False, int16
    [h, w]."""
    distance = inside * np.int16(sum(inside.shape))
    for axis in (0, 1):
        lines = np.moveaxis(distance, axis, 0)
        place = np.arange(len(lines), dtype=np.int16)[:, None]
        for way in (lines, lines[::-1]):
            way[:] = np.minimum.accumulate(way - place) + place
    return distance


class Stamp(NamedTuple):
    """A text to put onto pictures: masks of the letters with a rim and without it, and the place of their corner when
    the middle of the text lies at 0."""

    rim: Image.Image
    letters: Image.Image
    corner: tuple[int, int]


@lru_cache(maxsize=128)
def stamp_of(line: str, size: int) -> Stamp:
    """A line in bold letters `size` pixels high, white with a dark rim."""
    font, rim = font_for(line, size, True), max(1, size // 8)
    left, top, right, bottom = map(round, font.getbbox(line, anchor="mm", stroke_width=rim))
    masks = Image.new("L", (right - left, bottom - top)), Image.new("L", (right - left, bottom - top))
    for mask, width in zip(masks, (rim, 0)):
        ImageDraw.Draw(mask).text((-left, -top), line, fill=255, font=font, anchor="mm", stroke_width=width)
    return Stamp(*masks, (left, top))


@lru_cache(maxsize=512)
def fitted(text: str, size: int, room: int) -> tuple[str, float]:
    """A text shortened to `room` pixels at a letter's height of `size`, and its width in heights."""
    line = shorten(text, size, True, room)
    return line, font_for(line, 100, True).getlength(line) / 100


def with_names(picture: Image.Image, labels: np.ndarray, names: Mapping[int, str]) -> Image.Image:
    """Write what groups are called on their large regions, as far as it fits -> the same picture, in RGB.

    names: by number; a group without one gets its number. A name that does not fit gives way to the number.
    """
    side = max(labels.shape)
    low, high = (max(least, round(share * side)) for least, share in zip((11, 15), SIZES))
    for region in regions(labels):
        for text in dict.fromkeys((names.get(region.number, str(region.number)), str(region.number))):
            line, widest = fitted(text, low, side)
            size = min(high, int(2 * region.radius / np.hypot(widest, 1)))
            if size >= low:
                stamp = stamp_of(line, size)
                place = round(region.x) + stamp.corner[0], round(region.y) + stamp.corner[1]
                picture.paste(RIM, place, stamp.rim)
                picture.paste("white", place, stamp.letters)
                break
    return picture
