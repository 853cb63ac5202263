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
from scipy import ndimage

from ..datasets import IGNORE
from ..segment.colours import from_oklab, to_oklab
from .lettering import font_for, shorten

MIDDLE, PULL = 0.68, 0.8  # lightness of fills, and how much of a colour's own distance from it is left
SHADING = 0.4  # lightness that the image's adds, from black to white
GREY, BRIGHTEST = 0.6, 0.92  # lightness that adds nothing, and that of white in a light group
CELLS, BROAD = 12, 0.3  # parts of the long side in which light and dark are broad, and how much of that is left
EDGE = 0.34  # lightness of outlines
LINE = 400  # pixels of the short side for each pixel of an outline's width
SEARCHED = 128  # pixels of the long side at which large regions are searched
LARGE = 0.03  # the least share of the image that a region with a name has
TEXTS = 10  # names on an image, at most
SIZES = 0.022, 0.042  # heights of names, in long sides of the image


class Region(NamedTuple):
    """A connected part of a group: the place (x, y) deep inside it, and the distance from there to its border."""

    number: int
    x: float
    y: float
    radius: float


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Fill an image uint8 [H, W, 3] with the colours uint8 [K, 3] of its labels uint8 [H, W] -> uint8 [H, W, 3].

    The lightness of the fill is even but for the texture of the image. Regions have dark outlines, 1 pixel wide up to a
    short side of some 600 pixels and in proportion beyond. Pixels without data, of label 255, stay as they are.
    """
    no_data = labels == IGNORE
    some = bool(no_data.any())
    largest = int((np.where(no_data, 0, labels) if some else labels).max(initial=0))
    shades = shades_of(colours[: largest // 8 * 8 + 8].tobytes())
    places = labels.astype(np.uint16) << 8
    places |= texture(image)
    places[outlines(labels)] &= 0xFF00
    picture = shades[places]
    if some:
        picture[no_data] = image[no_data]
    return picture


def texture(image: np.ndarray) -> np.ndarray:
    """The light and dark of an image uint8 [H, W, 3] with little of what is broad, uint8 [H, W], 1 to 255.

    A bright sky and a dark street get fills of about one lightness, or a light blue and a dark one could not be told
    apart.
    """
    grey = Image.fromarray(image).convert("L")
    cells = [max(1, round(CELLS * side / max(grey.size))) for side in grey.size]
    broad = grey.resize(cells, Image.Resampling.BOX).resize(grey.size, Image.Resampling.BILINEAR)
    # 8-bit arithmetic: the middle grey stays
    kept = Image.blend(broad, Image.new("L", grey.size, 128), 1 - BROAD)
    return np.maximum(np.asarray(ImageChops.add(ImageChops.subtract(grey, broad, 1, 128), kept, 1, -128)), 1)


def outlines(labels: np.ndarray) -> np.ndarray:
    """Where labels uint8 [H, W] change, bool [H, W]; the line lies on both sides of the border."""
    width = max(1, round(min(labels.shape) / LINE))
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    return ndimage.maximum_filter(border, width) if width > 1 else border


@lru_cache(maxsize=64)
def shades_of(colours: bytes) -> np.ndarray:
    """The pixel for every label and grey value, uint8 [65536, 3], by 256 * label + grey; grey 0 is the outline."""
    lab = to_oklab(np.frombuffer(colours, np.uint8).reshape(-1, 1, 3))
    grey = to_oklab(np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1))
    table = np.repeat(lab, 256, 1)
    fill, shading = MIDDLE + PULL * (lab[..., 0] - MIDDLE), SHADING * (grey[:, 0] - GREY)
    room = (BRIGHTEST - fill) / (SHADING * (1 - GREY))  # of the light half
    table[..., 0] = fill + shading * np.where(shading > 0, room.clip(0, 1), 1)
    table[:, 0, 0] = EDGE
    shades = np.zeros((256, 256, 3), np.uint8)
    shades[: len(table)] = from_oklab(table)
    return shades.reshape(-1, 3)


def regions(labels: np.ndarray) -> list[Region]:
    """The large connected regions of labels uint8 [H, W], largest first, searched in a reduced copy."""
    scale = max(1.0, max(labels.shape) / SEARCHED)
    size = [max(1, round(side / scale)) for side in labels.shape[::-1]]
    small = np.pad(np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST)), 1, constant_values=IGNORE)
    inside = np.ones(small.shape, bool)  # pixels of four equal neighbours
    for axis in (0, 1):
        for step in (1, -1):
            inside &= small == np.roll(small, step, axis)
    inside &= small != IGNORE
    parts, count = ndimage.label(inside)
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:] / (size[0] * size[1])
    depth = ndimage.distance_transform_edt(inside)
    chosen = [part for part in np.argsort(-areas, kind="stable")[:TEXTS].tolist() if areas[part] >= LARGE]
    found = []
    for part in chosen:
        place = int(np.where(parts == part + 1, depth, 0).argmax())
        y, x = divmod(place, small.shape[1])
        found.append(Region(int(small[y, x]), (x - 0.5) * scale, (y - 0.5) * scale, float(depth[y, x]) * scale))
    return found


def with_names(picture: np.ndarray, labels: np.ndarray, names: Mapping[int, str]) -> np.ndarray:
    """Write what groups are called on their large regions, as far as it fits -> uint8 [H, W, 3].

    names: by number; a group without one gets its number. A name that does not fit gives way to the number.
    """
    canvas = Image.fromarray(picture)
    draw, side = ImageDraw.Draw(canvas), max(labels.shape)
    low, high = (max(least, round(share * side)) for least, share in zip((11, 15), SIZES))
    for region in regions(labels):
        for text in dict.fromkeys((names.get(region.number, str(region.number)), str(region.number))):
            line = shorten(text, low, True, side)
            widest = font_for(line, 100, True).getlength(line) / 100  # of a letter's height
            size = min(high, int(2 * region.radius / np.hypot(widest, 1)))
            if size >= low:
                draw.text(
                    (region.x, region.y),
                    line,
                    fill="white",
                    font=font_for(line, size, True),
                    anchor="mm",
                    stroke_width=max(1, size // 8),
                    stroke_fill="#1d2126",
                )
                break
    return np.asarray(canvas)
