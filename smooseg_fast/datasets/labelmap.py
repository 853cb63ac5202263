"""Label files that are larger than memory: GeoTIFFs of numbers or of a palette, read window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..system.stores import File, Remote
from . import gdal, raster, tiff
from .imageerror import ImageError, decoding
from .masks import Mask, MaskKind, Tally, packed, read_mask, tally, whole_numbers

ROWS = 512  # that are counted at a time


def read_in_windows(path: object) -> tiff.Page | None:
    """The tags of a label file that is read in windows: a large TIFF of one band, upright, of numbers or of a palette.
    None for others, which are read whole."""
    page = tiff.page_of(path, 1) if isinstance(path, (Path, Remote)) else None
    if page is None or page.width * page.height <= raster.LAZY_PIXELS:
        return None
    plain = (
        page.bands == 1 and page.photometric in (1, tiff.PALETTE) and page.orientation == 1 and page.bits in (8, 16, 32)
    )
    return page if plain else None


class LabelMap:
    """A label file that is open. `size` is (height, width)."""

    def __init__(self, path: File, page: tiff.Page, read: Callable[[int, int, int, int], np.ndarray]):
        self.path, self.size, self._read, self._palette = path, page.size, read, None
        self._kind: MaskKind = "numbers" if page.kind == "uint8" else "deep"
        if page.photometric == tiff.PALETTE:
            self._kind, self._palette = "palette", packed(tiff.palette_of(path, page))

    def window(self, top: int, left: int, bottom: int, right: int) -> Mask:
        """The rows `top` to `bottom` - 1 and columns `left` to `right` - 1. ImageError where the file is damaged."""
        with decoding(self.path):
            values = self._read(top, left, bottom, right)
        return Mask(self._kind, whole_numbers(values, self.path) if self._kind == "deep" else values, self._palette)


@contextmanager
def opened_labels(path: File, page: tiff.Page) -> Iterator[LabelMap]:
    """Open a label file for which `read_in_windows` gave this page."""
    if gdal.available():
        from rasterio.windows import Window

        with gdal.opened(path) as dataset:
            yield LabelMap(path, page, lambda y, x, b, r: dataset.read(1, window=Window(x, y, r - x, b - y)))
        return
    with decoding(path):
        opened = tiff.opened_segments(path, page)
    with opened as segments:
        yield LabelMap(path, page, lambda *window: segments.window((0,), *window)[..., 0])


def mask_of(path: object, window: tuple[int, int, int, int]) -> Mask:
    """The part of a label file in a window. ImageError where it cannot be read."""
    page = read_in_windows(path)
    if page is None:
        mask, (top, left, bottom, right) = read_mask(path), window  # type: ignore[arg-type]
        return Mask(mask.kind, mask.numbers[top:bottom, left:right], mask.palette)
    assert isinstance(path, (Path, Remote))
    with opened_labels(path, page) as labels:
        return labels.window(*window)


def reduced_mask(path: File, page: tiff.Page, step: int) -> Mask:
    """A label file for which `read_in_windows` gave this page, of which every `step`-th pixel is taken as
    `raster.Raster.reduced` does. ImageError where it is damaged."""
    height, width = page.size
    with opened_labels(path, page) as labels:
        parts = []
        for top in range(0, height, ROWS):
            mask = labels.window(top, 0, min(top + ROWS, height), width)
            parts.append(mask.numbers[(step // 2 - top) % step :: step, step // 2 :: step].copy())
    return Mask(mask.kind, np.concatenate(parts), mask.palette)


def counted(path: object) -> Tally:
    """As `masks.tally`, for files of any size."""
    page = read_in_windows(path)
    if page is None:
        return tally(path)  # type: ignore[arg-type]
    assert isinstance(path, (Path, Remote))
    counts: dict[int, int] = {}
    with opened_labels(path, page) as labels:
        height, width = labels.size
        for top in range(0, height, ROWS):
            mask = labels.window(top, 0, min(top + ROWS, height), width)
            for number, count in zip(*(part.tolist() for part in np.unique(mask.numbers, return_counts=True))):
                counts[number] = counts.get(number, 0) + count
            if len(counts) > 1 << 16:
                raise ImageError(path, "a label with more than 65,536 different numbers, which are no classes")
    numbers = np.array(sorted(counts), np.int64)
    return Tally(mask.kind, numbers, np.array([counts[number] for number in numbers.tolist()], np.int64), mask.palette)


class Rows:
    """The classes of a label file that is open, as bands of rows of an array uint8 [H,W]. `shape` is (H, W)."""

    def __init__(self, labels: LabelMap, classes: Callable[[Mask], np.ndarray]):
        self.shape, self._labels, self._classes = labels.size, labels, classes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        top, bottom, _ = rows.indices(self.shape[0])
        return self._classes(self._labels.window(top, 0, bottom, self.shape[1]))
