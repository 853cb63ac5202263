"""Where an image lies on a map, as its GeoTIFF tells. Reads by rasterio, an optional package."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from ..datasets.imageerror import decoding
from ..datasets.images import read_label
from ..system.progress import say
from ..system.stores import Remote

DEGREES = "EPSG:4326"  # longitude and latitude on WGS 84
INSTALL = "pip install 'smooseg_fast[polygons]'"


@dataclass(frozen=True)
class Place:
    """A coordinate system, and the `transform` (a, b, c, d, e, f) to it: x = a column + b row + c, y = d column +
    e row + f, where (0, 0) is the outer corner of the first pixel."""

    transform: tuple[float, float, float, float, float, float]
    crs: Any  # rasterio's

    def to_map(self, points: np.ndarray) -> np.ndarray:
        """Coordinates float64 [N,2] (x, y) on the map, of points (column, row)."""
        a, b, c, d, e, f = self.transform
        return points @ np.array([[a, d], [b, e]]) + (c, f)

    def to_degrees(self, points: np.ndarray) -> np.ndarray:
        """Longitude and latitude float64 [N,2], of points (column, row)."""
        from rasterio.warp import transform

        return np.array(transform(self.crs, DEGREES, *self.to_map(points).T)).T

    @property
    def pixel_area(self) -> float | None:
        """The area of a pixel in square units of the map; None where these are degrees."""
        a, b, _, d, e, _ = self.transform
        return abs(a * e - b * d) if self.crs.is_projected else None

    @property
    def unit(self) -> str:
        """The unit of the map, such as metre."""
        return self.crs.linear_units if self.crs.is_projected else "degree"

    @property
    def name(self) -> str:
        """A short name of the coordinate system, such as EPSG:32633."""
        return self.crs.to_string() if self.crs.to_epsg() else f"map:{crc32(self.crs.to_wkt().encode()):08x}"


def place_of(path: Path, size: tuple[int, int]) -> Place | None:
    """The place of an image of this (height, width); None where the file tells none, or is of another size."""
    tiff = not isinstance(path, Remote) and path.suffix.lower() in (".tif", ".tiff") and path.is_file()
    if not tiff or not have_rasterio():
        return None
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            with rasterio.open(path, driver="GTiff") as file:
                transform, crs, shape = file.transform, file.crs, file.shape
        except rasterio.errors.RasterioIOError:
            return None
    if crs is None or transform.is_identity or shape != size:
        return None
    return Place(tuple(transform)[:6], crs)


def read_plane(path: Path) -> np.ndarray:
    """Read a mask or a confidence, uint8 [H,W]. ImageError where it cannot be read.

    A GeoTIFF of any size is read by rasterio where it is installed; others are images of at most 2^30 pixels.
    """
    if path.suffix != ".tif" or find_spec("rasterio") is None:
        return read_label(path)
    import rasterio

    with decoding(path), rasterio.open(path, driver="GTiff") as file:
        return file.read(1)


@cache
def have_rasterio() -> bool:
    """Whether rasterio is installed; says once that maps are lost without it."""
    if find_spec("rasterio") is not None:
        return True
    say(f"note: places on a map are not read, because rasterio is missing; {INSTALL}")
    return False
