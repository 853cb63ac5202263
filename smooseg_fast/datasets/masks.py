"""Label files: what they store, as integers, and what they show, as colours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from .imageerror import ImageError
from .images import opened, turn_of
from .pillow import upright

MaskKind = Literal["bits", "numbers", "deep", "palette", "colours"]
Values = Literal["stored", "grey", "shown"]  # the integers, the grey values (of 3 equal channels too), or the colours

GREY = 0x010101  # the step between two greys as 0xRRGGBB
ODD = 1 << 24  # added to what has no value under a reading: above every grey value and colour
FEW, FEW_SHARE = 64, 16  # a mask holds at most so many values, and in small ones one in so many pixels
OPAQUE = 128  # a pixel of less alpha is transparent


@dataclass(frozen=True)
class Mask:
    """A label file.

    Attributes:
        kind: "bits" and "numbers" of 8 bits, "deep" numbers of more, indices of a "palette", or "colours" 0xRRGGBB.
        numbers: integers [H,W] as stored; -1 to 255, or any of "deep" and "colours".
        palette: int64 [256], the colour of each index.
    """

    kind: MaskKind
    numbers: np.ndarray
    palette: np.ndarray | None = None

    def values(self, reading: Values) -> np.ndarray:
        """Return integers [H,W] under a reading; from ODD on where there are none."""
        return convert(self.kind, self.numbers, self.palette, reading)


@dataclass(frozen=True)
class Tally:
    """The distinct `numbers` int64 [n] of a mask, ascending, and how many pixels hold each."""

    kind: MaskKind
    numbers: np.ndarray
    counts: np.ndarray
    palette: np.ndarray | None

    @property
    def few(self) -> bool:
        """Whether so few numbers are rather classes than a photo."""
        return len(self.numbers) <= min(FEW, max(2, int(self.counts.sum()) // FEW_SHARE))

    def values(self, reading: Values) -> np.ndarray:
        """Return the values int64 [n] of `numbers` under a reading."""
        return convert(self.kind, self.numbers, self.palette, reading)


def convert(kind: MaskKind, numbers: np.ndarray, palette: np.ndarray | None, reading: Values) -> np.ndarray:
    """Return the values of stored `numbers` under a reading, of the same shape."""
    if kind == "deep" or (reading == "stored" and kind != "colours"):
        return numbers
    colours = numbers.astype(np.int64)
    if kind == "palette" and palette is not None:
        colours = palette[colours]
    elif kind in ("bits", "numbers"):
        colours = colours * (255 * GREY if kind == "bits" else GREY)
    if reading == "shown":
        return colours
    grey = colours & 255
    return np.where(grey * GREY == colours, grey, colours + ODD)


def read_mask(path: Path | str) -> Mask:
    """Read a label file of any kind. ImageError when it cannot be decoded whole, or holds fractions."""
    with opened(path, label=True) as image, turn_of(image):
        image.load()
        image = upright(image)
        if image.mode in ("LA", "La") and image.getchannel("A").getextrema() == (255, 255):
            image = image.getchannel(0)
        if image.mode in ("1", "L"):
            return Mask("bits" if image.mode == "1" else "numbers", np.array(image, dtype=np.uint8))
        if image.mode == "P":
            palette = np.zeros((256, 3), np.int64)
            colours = np.array(image.getpalette("RGB"), np.int64).reshape(-1, 3)[:256]
            palette[: len(colours)] = colours
            return Mask("palette", np.array(image, dtype=np.uint8), packed(palette))
        if image.mode.startswith("I") or image.mode == "F":
            return Mask("deep", whole_numbers(np.asarray(image), path))
        return Mask("colours", colours_of(image))


def whole_numbers(values: np.ndarray, path: Path | str) -> np.ndarray:
    """Return `values` as int64. ImageError for fractions."""
    if values.dtype.kind == "f" and not (np.isfinite(values) & (values == np.rint(values))).all():
        raise ImageError(path, "a label with fractions, not class numbers", "write whole numbers, as 8-bit grey PNG")
    return values.astype(np.int64)


def colours_of(image: Image.Image) -> np.ndarray:
    """Return the colours int64 [H,W] as 0xRRGGBB; transparent pixels count as black."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        pixels = np.asarray(image)
        return np.where(pixels[..., 3] < OPAQUE, 0, packed(pixels))
    return packed(np.asarray(image.convert("RGB")))


def packed(pixels: np.ndarray) -> np.ndarray:
    """Pack integers [...,3 or more], red, green and blue first, into int64 0xRRGGBB."""
    red, green, blue = (pixels[..., channel].astype(np.int64) for channel in range(3))
    return red << 16 | green << 8 | blue


def tally(path: Path | str) -> Tally:
    """Count the pixels of every number in a label file. Errors as of `read_mask`."""
    mask = read_mask(path)
    if mask.numbers.dtype == np.uint8:
        counts = np.bincount(mask.numbers.ravel(), minlength=256)
        numbers = np.flatnonzero(counts)
        return Tally(mask.kind, numbers, counts[numbers], mask.palette)
    flat = mask.numbers.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))  # regions make long runs: sort the runs
    lengths = np.diff(starts, append=len(flat))
    numbers, places = np.unique(flat[starts], return_inverse=True)
    counts = np.bincount(places.ravel(), weights=lengths, minlength=len(numbers)).astype(np.int64)
    return Tally(mask.kind, numbers, counts, mask.palette)
