"""Squares to learn from and measure on, at one scale or several, with a margin of context around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..config import FIT, Crops, scale_factor
from .images import Resample, cut_squares, resize_short_side
from .raster import View
from .reading import Picture
from .scaled import Scaled

TILES, TILES_OF_AN_IMAGE = 512, 16  # squares of a whole set, and yet at least so many of each image
LEAST_VALID = 0.5  # share of a patch's pixels that are measurements, below which the patch does not count
AVERAGED = 2**20  # pixels of a picture, at most, whose mean stands where it has no data


class Cut(NamedTuple):
    """A square of a picture.

    Attributes:
        place: (top, left) at the first scale.
        pixels: uint8 [n,side,side,3], the square with its margins at each of n scales.
        valid: bool [size,size], which pixels of the square are measurements at the first scale; None if all are.
    """

    place: tuple[int, int]
    pixels: np.ndarray
    valid: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How squares are cut out of an image.

    Args:
        size: side of a square in pixels.
        crops: "center", "slide" and "five" as in `images.cut_squares`; "tiles" is a grid over the whole image.
        resample: how images are resized.
        scale: "fit" resizes the short side to `size`; "native" keeps the image's own pixels; a number is the factor of
            its height and width. Of several, largest first, the first one's squares are cut, and the others add their
            surroundings: as many pixels about the same centre, at their own scale.
        margin: pixels of context on every side of a square, real where the image goes on and mirrored where it ends.
        most: tiles of an image; a larger grid is sampled evenly. None takes all.
        shift: pixels (down, right) at the first scale by which the pixels of every square are taken from elsewhere; its
            place, and which of its pixels count, stay. For all crops but "five".
    """

    size: int
    crops: Crops = "center"
    resample: Resample = "nearest"
    scale: tuple[str, ...] = (FIT,)
    margin: int = 0
    most: int | None = None
    shift: tuple[int, int] = (0, 0)

    @property
    def plain(self) -> bool:
        """Whether squares are those of `images.cut_squares`."""
        return self.crops != "tiles" and self.scale == (FIT,) and not self.margin and self.shift == (0, 0)

    @property
    def side(self) -> int:
        """Side of a square and its margins."""
        return self.size + 2 * self.margin

    def ratios(self) -> tuple[float, ...]:
        """Every scale as a share of the first."""
        factors = [scale_factor(scale) for scale in self.scale]
        first = factors[0]
        return tuple(1.0 if first is None or factor is None else factor / first for factor in factors)

    def scaled(self, image: np.ndarray) -> Scaled:
        """An image [H,W,3] or label [H,W] at the first scale; enlarged where its short side would be below `size`."""
        return first_scale(image, self.scale, self.size, self.resample)

    def mask(self, valid: np.ndarray | None) -> Scaled | None:
        """Where a picture has data, bool [H,W], at the first scale; None where it has it everywhere."""
        return None if valid is None else first_scale(valid, self.scale, self.size, "nearest")

    def squares(self, picture: Picture) -> list[Cut]:
        """Cut a picture.

        Resizes no more of it than it takes, so that the squares of a large scan need little memory; a picture with
        places without data is copied once (`neutral`).
        """
        image, valid = neutral(picture), picture.valid
        if self.plain:
            cut = cut_squares(image, self.size, self.crops, self.resample)  # type: ignore[arg-type]  # no tiles
            if valid is None:
                return [Cut(place, square[None], None) for place, square in cut]
            masks = cut_squares(valid.view(np.uint8), self.size, self.crops)  # type: ignore[arg-type]  # no tiles
            return [Cut(place, square[None], mask.view(bool)) for (place, square), (_, mask) in zip(cut, masks)]
        first = self.scaled(image)
        mask = self.mask(valid)
        scaled = [first, *(Scaled.of(image, first, ratio) for ratio in self.ratios()[1:])]
        return [
            Cut(place, self._stack(scaled, place), None if mask is None else self._window(mask, place))
            for place in self.places(*first.size, mask)
        ]

    def places(self, height: int, width: int, mask: Scaled | None = None) -> list[tuple[int, int]]:
        """(top, left) of the squares of an image that has this size at the first scale.

        mask: where it has data; squares without any are then left out.
        """
        grid = self.grid(height, width, mask)
        if self.most is None or len(grid) <= self.most:
            return grid
        # one of each of `most` equal parts of the grid: a fixed step could fall into one column
        picked = np.random.default_rng(len(grid)).random(self.most)
        return [grid[int((number + share) * len(grid) / self.most)] for number, share in enumerate(picked)]

    def grid(self, height: int, width: int, mask: Scaled | None = None) -> list[tuple[int, int]]:
        """As `places`, all of them however many `most` allows."""
        size = self.size
        if mask is not None:
            return [place for place in self.grid(height, width) if self._window(mask, place).any()]
        if self.crops == "center":
            return [((height - size) // 2, (width - size) // 2)]
        if self.crops == "slide":  # of an image that fits
            return [(top, left) for top in starts(height, size, size // 4) for left in starts(width, size, size // 4)]
        return [(top, left) for top in starts(height, size, size) for left in starts(width, size, size)]

    def truth(self, label: np.ndarray, place: tuple[int, int]) -> np.ndarray:
        """The square [size,size] of a label [H,W] at a place of its image."""
        if self.scale == (FIT,) and self.crops != "tiles":
            resized = resize_short_side(label, self.size)
            return resized[place[0] : place[0] + self.size, place[1] : place[1] + self.size]
        return self._window(first_scale(label, self.scale, self.size, "nearest"), place)

    def _window(self, scaled: Scaled, place: tuple[int, int]) -> np.ndarray:
        """The square at a place of the first scale, without margins."""
        return scaled.window(*place, self.size, self.size)

    def _stack(self, scaled: list[Scaled], place: tuple[int, int]) -> np.ndarray:
        windows = []
        for image, ratio in zip(scaled, self.ratios()):
            top, left = (
                round((start + moved + self.size / 2) * ratio - self.side / 2)
                for start, moved in zip(place, self.shift)
            )
            windows.append(image.window(top, left, self.side, self.side))
        return np.stack(windows)


def neutral(picture: Picture) -> np.ndarray:
    """The pixels uint8 [H,W,3] of a picture for a backbone: its mean colour stands where it has no data.

    A picture with data everywhere gives its own pixels, others a copy; a map gives a view.
    """
    pixels, valid = picture
    if valid is None:
        return pixels
    if isinstance(pixels, View):
        mean = pixels.raster.mean(AVERAGED)
        view: Any = pixels.raster.filled(np.full(3, 128 if mean is None else np.rint(mean), np.uint8))
        return view
    step = max(1, int((valid.size / AVERAGED) ** 0.5))
    data = pixels[::step, ::step][valid[::step, ::step]]
    copy = pixels.copy()
    copy[~valid] = np.rint(data.mean(0)) if len(data) else 128
    return copy


def valid_patches(valid: np.ndarray, patch: int) -> np.ndarray:
    """Which patches count, bool [h,w], where valid bool [h*patch,w*patch] says which pixels are measurements.

    A patch counts wholly or not at all: below LEAST_VALID its features mostly describe what stands for missing data.
    """
    h, w = (side // patch for side in valid.shape)
    return valid.reshape(h, patch, w, patch).mean((1, 3)) >= LEAST_VALID


def first_scale(image: np.ndarray, scale: tuple[str, ...], size: int, resample: Resample) -> Scaled:
    """An image at the first of its scales; enlarged where its short side would be below `size` pixels there."""
    height, width = image.shape[:2]
    factor, short = scale_factor(scale[0]), min(height, width)
    if factor is None or round(short * factor) < size:  # in whole numbers, as `images.resize_short_side`
        return Scaled(image, (height * size // short, width * size // short), resample)
    return Scaled.by(image, factor, resample)


def starts(length: int, side: int, most: int) -> list[int]:
    """Evenly spaced starts of pieces of `side` from the start to the end of `length`, at most `most` apart."""
    gaps = -(-(length - side) // max(1, most))
    return [place * (length - side) // max(1, gaps) for place in range(gaps + 1)]


def tiles_of_an_image(images: int) -> int:
    """Tiles to take of each of so many images, so that no large one dominates a set."""
    return max(TILES_OF_AN_IMAGE, TILES // max(1, images))
