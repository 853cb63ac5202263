"""Squares to learn from and measure on, at one scale or several, with a margin of context around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import FIT, Crops, scale_factor
from .images import Resample, cut_squares, resize_short_side
from .scaled import Scaled

TILES, TILES_OF_AN_IMAGE = 512, 16  # squares of a whole set, and yet at least so many of each image


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
    """

    size: int
    crops: Crops = "center"
    resample: Resample = "nearest"
    scale: tuple[str, ...] = (FIT,)
    margin: int = 0
    most: int | None = None

    @property
    def plain(self) -> bool:
        """Whether squares are those of `images.cut_squares`."""
        return self.crops != "tiles" and self.scale == (FIT,) and not self.margin

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

    def squares(self, image: np.ndarray) -> list[tuple[tuple[int, int], np.ndarray]]:
        """Cut an image uint8 [H,W,3] -> [(place, pixels uint8 [n,side,side,3])], n the number of scales.

        A place is (top, left) at the first scale. Resizes no more of the image than it takes, so that the squares of a
        large scan need little memory.
        """
        if self.plain:
            cut = cut_squares(image, self.size, self.crops, self.resample)  # type: ignore[arg-type]  # no tiles
            return [(place, square[None]) for place, square in cut]
        first = self.scaled(image)
        scaled = [first, *(Scaled.of(image, first, ratio) for ratio in self.ratios()[1:])]
        return [(place, self._stack(scaled, place)) for place in self.places(*first.size)]

    def places(self, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) of the squares of an image that has this size at the first scale."""
        grid = self.grid(height, width)
        if self.most is None or len(grid) <= self.most:
            return grid
        # one of each of `most` equal parts of the grid: a fixed step could fall into one column
        picked = np.random.default_rng(len(grid)).random(self.most)
        return [grid[int((number + share) * len(grid) / self.most)] for number, share in enumerate(picked)]

    def grid(self, height: int, width: int) -> list[tuple[int, int]]:
        """As `places`, all of them however many `most` allows."""
        size = self.size
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
        return first_scale(label, self.scale, self.size, "nearest").window(*place, self.size, self.size)

    def _stack(self, scaled: list[Scaled], place: tuple[int, int]) -> np.ndarray:
        windows = []
        for image, ratio in zip(scaled, self.ratios()):
            top, left = (round((start + self.size / 2) * ratio - self.side / 2) for start in place)
            windows.append(image.window(top, left, self.side, self.side))
        return np.stack(windows)


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
