"""A map that is larger than memory: a picture whose pixels are read and stretched as they are asked for.

`Raster.picture` looks like a `Picture` of arrays to code that takes windows of it alone. Windows come from blocks, of
which those of a few rows are kept: memory grows with the map's width alone.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..system.files import state_of
from ..system.stores import File
from . import gdal, tiff
from .imageerror import ImageError, decoding, require_bands
from .reading import SAMPLED, Picture, Range, Reading, Samples, group_of, limits_of, shown

LAZY_PIXELS = 2**26  # of a map from which on it is read in windows
BLOCK = 512  # pixels of a block's side, about
BLOCK_BYTES = 2**30  # that a strip or tile of the file may take
KEPT_ROWS = 4  # of blocks
SAMPLED_BLOCKS = 1000  # of which mean and range of a map are taken


class Source(Protocol):
    """Values in a file: those that are shown, before anything is stretched."""

    size: tuple[int, int]
    kind: str
    colour: bool
    masked: bool  # whether there may be places without data
    sides: tuple[int, int]  # of a strip or tile

    def window(self, top: int, left: int, bottom: int, right: int) -> Samples: ...


class TiffSource:
    """A TIFF as tifffile decodes it. mask: see `tiff.opened_mask`."""

    def __init__(
        self,
        page: tiff.Page,
        segments: tiff.Segments,
        mask: tiff.Segments | None,
        bands: tuple[int, ...] | None,
        path: Path | str,
    ):
        kinds = (*tiff.GREY, tiff.COLOUR, tiff.YCBCR, tiff.PALETTE)
        if page.photometric not in kinds or page.kind.startswith("complex"):
            raise ImageError(path, "a map of neither grey values nor colours", gdal.INSTALL)
        if segments.nbytes > BLOCK_BYTES:
            raise ImageError(path, "a strip or tile of it takes more than 1 GiB", "write it again in tiles")
        require_bands(max(bands or (1,)), page.bands, path)
        self._page, self._segments, opacity = page, segments, page.opacity
        chosen = tuple(band - 1 for band in bands) if bands else tuple(range(3 if page.data_bands >= 3 else 1))
        self._opacity = None if opacity in chosen else opacity  # unless asked for as data
        self._bands = chosen if self._opacity is None else (*chosen, self._opacity)
        self.size, self.kind, self.sides = page.size, page.kind, segments.sides
        self._palette = tiff.palette_of(path, page) if page.photometric == tiff.PALETTE else None
        self._mask = mask if opacity is None else None
        self.colour = self._palette is not None or (page.colour and max(chosen) < 3)
        some_missing = self._opacity is not None or self._mask is not None or page.nodata is not None
        self.masked = some_missing or page.kind.startswith("float")

    def window(self, top: int, left: int, bottom: int, right: int) -> Samples:
        values, alpha = self._segments.window(self._bands, top, left, bottom, right), None
        if self._opacity is not None:
            alpha, values = tiff.opaque(values[..., -1]), values[..., :-1]
        if self._mask is not None:
            alpha = tiff.shown_by(self._mask, top, left, bottom, right)
        page, nodata = self._page, self._page.nodata
        if page.bits < 8 and page.photometric in tiff.GREY:
            values, nodata = tiff.widened(values, page.bits, nodata)
        if self._palette is not None:
            if nodata is not None:
                missing, nodata = values[..., 0] == nodata, None
                alpha = np.where(missing, 0, 255 if alpha is None else alpha).astype(np.uint8)
            values = self._palette[values[..., 0].astype(np.uint8)]
        return Samples(values, self.kind, self.colour, alpha, nodata, page.photometric == 0)


def in_windows(path: File, reading: Reading, page: int | None = None, *, sparse: bool = False) -> bool:
    """Whether a map is read in windows here: a large TIFF, or a kind that GDAL alone reads. sparse: as for
    `tiff.pages_of`."""
    if gdal.alone(path):
        return True
    tags = tiff.page_of(path, page or reading.first_page, sparse=sparse)
    if tags is not None:
        return tags.width * tags.height > LAZY_PIXELS and (gdal.available() or find_spec("tifffile") is not None)
    return path.suffix.lower() in gdal.SUFFIXES and gdal.available()


def size_of(path: File, reading: Reading, page: int | None = None, *, sparse: bool = False) -> tuple[int, int]:
    """(height, width) of a map that is read in windows, as stored. ImageError where it cannot be opened."""
    tags = tiff.page_of(path, page or reading.first_page, sparse=sparse)
    if tags is not None:
        return tags.size
    with gdal.opened(path) as dataset:
        return dataset.shape


def step_of(size: tuple[int, int]) -> int:
    """Every how many pixels of a map (height, width) one is taken so that LAZY_PIXELS are left at most."""
    return math.ceil(math.sqrt(size[0] * size[1] / LAZY_PIXELS))


@contextmanager
def opened(path: Path | str, reading: Reading, page: int | None = None) -> Iterator[Raster]:
    """A map, read in windows by GDAL where rasterio is installed, else by tifffile. ImageError where neither can."""
    number = page or reading.first_page
    tags = tiff.page_of(path, number)
    with ExitStack() as stack:
        if gdal.available() and number == 1:
            source: Source = gdal.Bands(path, stack.enter_context(gdal.opened(path)), reading.bands)
        elif tags is None:
            raise ImageError(path, "a map that GDAL alone reads", gdal.INSTALL)
        elif find_spec("tifffile") is None or find_spec("imagecodecs") is None:
            raise ImageError(path, f"a map of {tags.width} x {tags.height} pixels", gdal.INSTALL)
        else:
            with decoding(path):
                segments = stack.enter_context(tiff.opened_segments(path, tags))
                mask = stack.enter_context(tiff.opened_mask(path, tags))
            source = TiffSource(tags, segments, mask, reading.bands, path)
        yield Raster(path, source, reading)


_reducing, _reduced = threading.Lock(), OrderedDict[tuple[Any, ...], Picture]()


def reduced(path: File, reading: Reading, page: int | None = None) -> Picture:
    """A map with a pixel of every few, see `Raster.reduced`. The last one stays in memory, because reading it takes all
    of the file; one is read at a time. ImageError where it cannot be read."""
    key = str(path), state_of(path), reading, page
    with _reducing:
        if key not in _reduced:
            _reduced.clear()
            with opened(path, reading, page) as map_:
                _reduced[key] = map_.reduced()
        return _reduced[key]


class Raster:
    """The pixels of a map, uint8 [H,W,3], and where they are measurements, block by block."""

    def __init__(self, path: Path | str, source: Source, reading: Reading):
        self.path, self.source, (self.height, self.width) = path, source, source.size
        sides = (-(-BLOCK // side) * side for side in source.sides)
        self._sides = tuple(min(side, length) for side, length in zip(sides, source.size))
        self._across = -(-self.width // self._sides[1])
        self._blocks: OrderedDict[tuple[int, int], Picture] = OrderedDict()
        self.group = group_of(source.kind, source.colour, len(self.read(0, 0, 1, 1).values[0, 0]))
        self._reading = reading

    @cached_property
    def reading(self) -> Reading:
        """How values are stretched, with a range for those of this map."""
        reading = self._reading
        known = reading.range_of(self.group) if reading.intensity == "data" else None
        if self.source.kind == "uint8" or not isinstance(reading.intensity, str) or known is not None:
            return reading
        limits = tuple(map(limits_of, self.sample(SAMPLED)))
        return replace(reading, intensity="data", ranges=(Range(self.group, limits),))

    def read(self, top: int, left: int, bottom: int, right: int) -> Samples:
        """The values in a window. ImageError where the file is damaged there."""
        with decoding(self.path):
            return self.source.window(top, left, bottom, right)

    def part(self, top: int, left: int, bottom: int, right: int) -> Picture:
        """A window as an image of its own. ImageError where the file is damaged there."""
        return shown(self.read(top, left, bottom, right), self._reading)

    def sample(self, most: int) -> list[np.ndarray]:
        """As `Samples.sample` of the whole: the measurements in about `most` pixels, of all bands or of each."""
        step, parts = max(1, round((self.height * self.width / most) ** 0.5)), []
        for top, bottom, left, right in self._some():
            values = self.read(top, left, bottom, right)
            rows, columns = slice(-top % step, None, step), slice(-left % step, None, step)
            alpha = None if values.alpha is None else values.alpha[rows, columns]
            parts.append(values._replace(values=values.values[rows, columns], alpha=alpha).sample(values.values.size))
        return [np.concatenate(of_band) for of_band in zip(*parts)]

    def mean(self, most: int) -> np.ndarray | None:
        """The mean colour of the measurements in about `most` pixels; None where there is none."""
        step, total, count = max(1, int((self.height * self.width / most) ** 0.5)), np.zeros(3), 0
        for top, bottom, left, right in self._some():
            rows, columns = slice(top + -top % step, bottom, step), slice(left + -left % step, right, step)
            part = self.block(top // self._sides[0], left // self._sides[1])
            inside = slice(rows.start - top, None, step), slice(columns.start - left, None, step)
            valid = self.valid_of(part)[inside]
            total, count = total + part.pixels[inside][valid].sum(0, dtype=np.float64), count + int(valid.sum())
        return total / count if count else None

    def reduced(self) -> Picture:
        """One pixel of every `step_of` rows and columns, the middle one, as `Scaled` takes the nearest."""
        step = step_of(self.source.size)
        height, width = (len(range(step // 2, side, step)) for side in self.source.size)
        pixels, valid = np.empty((height, width, 3), np.uint8), np.ones((height, width), bool)
        for top, bottom, left, right in self._rows():
            part = shown(self.read(top, left, bottom, right), self.reading)
            down, across = ((step // 2 - start) % step for start in (top, left))
            inside = slice(down, None, step), slice(across, None, step)
            small, y, x = part.pixels[inside], (top + down) // step, (left + across) // step
            target = slice(y, y + small.shape[0]), slice(x, x + small.shape[1])
            pixels[target], valid[target] = small, self.valid_of(part)[inside]
        return Picture(pixels, None if valid.all() else valid)

    def _rows(self) -> Iterator[tuple[int, int, int, int]]:
        """(top, bottom, left, right) of all blocks, row by row."""
        down, across = self._sides
        for top in range(0, self.height, down):
            for left in range(0, self.width, across):
                yield top, min(top + down, self.height), left, min(left + across, self.width)

    def _some(self) -> list[tuple[int, int, int, int]]:
        """As `_rows`, but of more than SAMPLED_BLOCKS one of each of as many equal parts."""
        blocks = list(self._rows())
        if len(blocks) <= SAMPLED_BLOCKS:
            return blocks
        picked = np.random.default_rng(len(blocks)).random(SAMPLED_BLOCKS)  # a fixed step could fall into one column
        return [blocks[int((number + share) * len(blocks) / SAMPLED_BLOCKS)] for number, share in enumerate(picked)]

    def block(self, row: int, column: int) -> Picture:
        """A block as RGB, from the last ones or from the file."""
        if (row, column) in self._blocks:
            self._blocks.move_to_end((row, column))
            return self._blocks[row, column]
        down, across = self._sides
        top, left = row * down, column * across
        samples = self.read(top, left, min(top + down, self.height), min(left + across, self.width))
        part = self._blocks[row, column] = shown(samples, self.reading)
        if len(self._blocks) > KEPT_ROWS * self._across:
            self._blocks.popitem(last=False)
        return part

    @staticmethod
    def valid_of(part: Picture) -> np.ndarray:
        return np.ones(part.pixels.shape[:2], bool) if part.valid is None else part.valid

    @property
    def picture(self) -> Picture:
        """The map for those who take windows alone."""
        valid: Any = View(self, self.valid_of, ()) if self.source.masked else None
        pixels: Any = View(self, lambda part: part.pixels, (3,))
        return Picture(pixels, valid)

    def filled(self, colour: np.ndarray) -> View:
        """Its pixels with a colour, uint8 [3], where there is no data."""

        def pixels(part: Picture) -> np.ndarray:
            if part.valid is None:
                return part.pixels
            return np.where(part.valid[..., None], part.pixels, colour)

        return View(self, pixels, (3,))


class View:
    """An array [H,W] or [H,W,3] that is read when slices of it are taken: rows, or rows and columns. Ascending rows int
    [n,1] and columns int [m] take the pixels where they meet."""

    def __init__(self, raster: Raster, pick: Callable[[Picture], np.ndarray], channels: tuple[int, ...]):
        self.raster, self._pick, self.shape = raster, pick, (raster.height, raster.width, *channels)

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        if isinstance(rows, slice):
            return self._window(rows, columns)
        start, end = columns[0], columns[-1] + 1
        return np.stack([self[row : row + 1, start:end][0, columns - start] for row in rows[:, 0]])

    def _window(self, rows: slice, columns: slice) -> np.ndarray:
        (top, bottom, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        raster, lines = self.raster, []
        down, across = raster._sides
        for row in range(top // down, -(-bottom // down)):
            y, line = row * down, []
            for column in range(left // across, -(-right // across)):
                x, part = column * across, self._pick(raster.block(row, column))
                line.append(part[max(top - y, 0) : bottom - y, max(left - x, 0) : right - x])
            lines.append(np.concatenate(line, 1))
        return np.concatenate(lines)
