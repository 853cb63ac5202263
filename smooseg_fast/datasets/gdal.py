"""GDAL by way of rasterio, an optional package: windows of maps of many formats, and where they lie."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..system.files import regular
from ..system.stores import is_url
from . import formats, tiff
from .header import Header
from .imageerror import ImageError, decoding, open_image, require_bands
from .reading import Samples

INSTALL = "pip install 'smooseg_fast[maps]' to read it"
SUFFIXES = (*formats.GDAL, ".jp2")  # of maps other than TIFFs
DRIVERS = {
    ".tif": "GTiff", ".tiff": "GTiff", ".vrt": "VRT", ".img": "HFA", ".jp2": "JP2OpenJPEG", ".jpg": "JPEG",
    ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP",
}  # fmt: skip
CACHE_BYTES = 2**26  # of GDAL's blocks, in place of a twentieth of the memory: windows are of whole blocks
# nothing in a map is run
OPTIONS = {"GDAL_VRT_ENABLE_PYTHON": "NO", "GDAL_CACHEMAX": CACHE_BYTES}
ONE_MASK = {"alpha", "per_dataset"}  # flags of a mask for all bands, other than that of a value without data


def available() -> bool:
    return find_spec("rasterio") is not None


def alone(path: Path | str) -> bool:
    """Whether a file is a map of a kind that nothing else reads."""
    return Path(path).suffix.lower() in formats.GDAL


@contextmanager
def opened(path: Path | str) -> Iterator[Any]:
    """A map as a dataset of rasterio; in a store, a file of its own, which is read by ranges. ImageError where it
    cannot be read."""
    if not available():
        raise ImageError(path, "a map that GDAL alone reads", INSTALL)
    import rasterio

    driver = DRIVERS.get(Path(path).suffix.lower())
    if driver is None:
        raise ImageError(path, "no map of a kind that is read")
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # what goes wrong is raised too
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a picture has no place is no news
        with decoding(path):
            stack.enter_context(rasterio.Env(**OPTIONS))
            if driver == "VRT" and is_url(path):
                raise ImageError(path, "a list of other files, which cannot be read in a store", "give these files")
            file = stack.enter_context(open_image(path)) if is_url(path) else regular(path)
            dataset = stack.enter_context(rasterio.open(file, driver=driver))
        yield dataset


def reference_of(path: Path | str) -> bytes | None:
    """A GeoTIFF of one pixel that lies where the map at `path` begins; None where GDAL does not know the place."""
    import rasterio

    try:
        with opened(path) as dataset:
            gcps, gcps_crs = dataset.gcps
            if not dataset.crs and dataset.transform.is_identity and not gcps:
                return None
            place = {"gcps": gcps, "crs": gcps_crs} if gcps else {"transform": dataset.transform, "crs": dataset.crs}
            with rasterio.MemoryFile() as memory:
                with memory.open(driver="GTiff", width=1, height=1, count=1, dtype="uint8", **place):
                    pass
                return memory.read()
    except ImageError:  # those who read its pixels will say so
        return None


class Bands:
    """Windows of the bands of a map that are shown, from 1; by default of the first three, or of the first.

    sides: rows and columns of a block as the file has them.
    """

    def __init__(self, path: Path | str, dataset: Any, bands: tuple[int, ...] | None):
        self._dataset, colours = dataset, [colour.name for colour in dataset.colorinterp]
        alpha = colours.index("alpha") if "alpha" in colours else None
        require_bands(max(bands or (1,)), dataset.count, path)
        self._chosen = list(bands or (range(1, 4) if dataset.count - (alpha is not None) >= 3 else [1]))
        self.size, (self.kind, *_) = dataset.shape, dataset.dtypes
        nodata = tuple(dataset.nodatavals[band - 1] for band in self._chosen)
        self.nodata = nodata[0] if len(set(nodata)) == 1 else nodata
        if self.kind.startswith("complex"):
            raise ImageError(path, "a map of complex numbers", "write their lengths, which gdal_translate can")
        flags = {flag.name for flag in dataset.mask_flag_enums[self._chosen[0] - 1]}
        self._masked = bool(flags & ONE_MASK) and not (alpha is not None and alpha + 1 in self._chosen)
        self.masked = self._masked or self.nodata is not None or self.kind.startswith("float")
        self._colours = None
        if colours[self._chosen[0] - 1] == "palette":
            table = dataset.colormap(self._chosen[0])
            self._colours = np.array([table.get(value, (0, 0, 0, 255))[:3] for value in range(256)], np.uint8)
        self.colour = self._colours is not None or [colours[band - 1] for band in self._chosen] == [
            "red", "green", "blue",
        ]  # fmt: skip
        self._bits = int(dataset.tags(self._chosen[0], ns="IMAGE_STRUCTURE").get("NBITS", 8))
        self._inverted = self._colours is None and dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        self.sides = dataset.block_shapes[0]

    def window(self, top: int, left: int, bottom: int, right: int) -> Samples:
        from rasterio.windows import Window

        window = Window(left, top, right - left, bottom - top)
        values = np.moveaxis(self._dataset.read(self._chosen, window=window), 0, -1)
        alpha = self._dataset.dataset_mask(window=window) if self._masked else None
        nodata = self.nodata
        if self._colours is not None:
            missing = None if nodata is None else values[..., 0] == nodata
            values, nodata = self._colours[values[..., 0].astype(np.uint8)], None
            if missing is not None:
                alpha = np.where(missing, 0, 255 if alpha is None else alpha).astype(np.uint8)
        elif self._bits < 8 and not isinstance(nodata, tuple):
            values, nodata = tiff.widened(values, self._bits, nodata)
        return Samples(np.ascontiguousarray(values), self.kind, self.colour, alpha, nodata, self._inverted)


def samples_of(path: Path | str, bands: tuple[int, ...] | None, most: int) -> Samples:
    """The values of a whole map. ImageError for one of more than `most` pixels."""
    with opened(path) as dataset:
        shown, (height, width) = Bands(path, dataset, bands), dataset.shape
        if height * width > most:
            raise ImageError(path, f"{width} x {height} pixels, more than {most:,} in all", "cut it into tiles")
        with decoding(path):
            return shown.window(0, 0, height, width)


def header_of(path: Path | str) -> Header:
    """The declarations of a map."""
    with opened(path) as dataset:
        first, (height, width) = Bands(path, dataset, None), dataset.shape
        opacity = "alpha" in [colour.name for colour in dataset.colorinterp]
        return Header(
            kind=first.kind,
            bands=dataset.count - opacity,
            colour=first.colour,
            opacity=opacity,
            space="",
            pages=1,
            bytes=height * width * dataset.count * np.dtype(first.kind).itemsize,
            nodata=first.nodata[0] if isinstance(first.nodata, tuple) else first.nodata,
        )
