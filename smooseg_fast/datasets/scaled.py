"""A picture at a scale, of which only the windows that are asked for are ever resized."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .images import Resample

READ_PIXELS = 2**24  # of the picture that are resized at a time


@dataclass(frozen=True)
class Scaled:
    """The picture `pixels` uint8 [H,W,3] seen at another size.

    Attributes:
        size: (height, width) of the whole at this scale, in pixels.
        resample: as in `images.resize_short_side`.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    resample: Resample

    @classmethod
    def by(cls, pixels: np.ndarray, factor: float, resample: Resample) -> Scaled:
        """The picture at `factor` times its size, at least a pixel high and wide."""
        height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
        return cls(pixels, (height, width), resample)

    @classmethod
    def of(cls, pixels: np.ndarray, first: Scaled, ratio: float) -> Scaled:
        """The picture `pixels` at `ratio` times the size that it has in `first`."""
        height, width = (max(1, round(side * ratio)) for side in first.size)
        return cls(pixels, (height, width), first.resample)

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The pixels uint8 [height,width,3] of a window; beyond the picture's border its content is mirrored."""
        rows, columns = mirrored(top, height, self.size[0]), mirrored(left, width, self.size[1])
        first = (int(rows.min()), int(columns.min()))
        inside = self._resized(first, (int(rows.max()) + 1, int(columns.max()) + 1))
        if top >= 0 and left >= 0 and top + height <= self.size[0] and left + width <= self.size[1]:
            return inside
        return inside[(rows - first[0])[:, None], columns - first[1]]

    def _resized(self, start: tuple[int, int], stop: tuple[int, int]) -> np.ndarray:
        """The part from `start` to `stop`, (row, column) at this scale: what a resized whole has there."""
        if self.size == self.pixels.shape[:2]:
            return self.pixels[start[0] : stop[0], start[1] : stop[1]]
        (H, W), (height, width) = self.pixels.shape[:2], self.size
        area = (stop[0] - start[0]) * (stop[1] - start[1]) * (H / height) * (W / width)
        if area > READ_PIXELS and stop[0] - start[0] > 1:
            middle = (start[0] + stop[0]) // 2
            halves = (start, (middle, stop[1])), ((middle, start[1]), stop)
            return np.concatenate([self._resized(*half) for half in halves])
        if self.resample == "nearest":
            rows, columns = (
                # the pixel below the centre, in whole numbers so that it is the same in every window
                (2 * np.arange(first, end) + 1) * there // (2 * here)
                for first, end, there, here in zip(start, stop, self.pixels.shape, self.size)
            )
            cut = self.pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            return cut[(rows - rows[0])[:, None], columns - columns[0]]
        (top, bottom), (left, right) = (
            (first * there / here, end * there / here)
            for first, end, there, here in zip(start, stop, self.pixels.shape, self.size)
        )
        # Pillow's filter reaches one target pixel, and at least one pixel of the picture, beyond its box
        reach = [int(max(1, there / here)) + 2 for there, here in zip(self.pixels.shape, self.size)]
        up, across = max(0, int(top) - reach[0]), max(0, int(left) - reach[1])
        cut = self.pixels[up : int(bottom) + reach[0] + 1, across : int(right) + reach[1] + 1]
        box = (left - across, top - up, min(right - across, cut.shape[1]), min(bottom - up, cut.shape[0]))
        small = (stop[1] - start[1], stop[0] - start[0])
        return np.array(Image.fromarray(cut).resize(small, Image.Resampling.BILINEAR, box=box))


def mirrored(start: int, count: int, length: int) -> np.ndarray:
    """The places int [count] in 0..length-1 of start, start + 1, ..., folded back at both ends, the ends twice."""
    place = np.arange(start, start + count) % (2 * length)
    return np.minimum(place, 2 * length - 1 - place)
