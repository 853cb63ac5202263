"""Where a picture lies on the earth: the tags of GeoTIFF, a world file, or what GDAL knows of other formats."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from ..system.files import regular
from ..system.stores import File, Remote
from . import gdal, tiff

SCALE, TIEPOINT, MATRIX = 33550, 33922, 34264  # ModelPixelScale, ModelTiepoint and ModelTransformation
KEYS, NUMBERS, WORDS, RPC = 34735, 34736, 34737, 50844  # GeoKeyDirectory, its numbers and texts; RPCCoefficient
TAGS = (SCALE, TIEPOINT, MATRIX, KEYS, NUMBERS, WORDS, RPC)
ASCII, SHORT, DOUBLE = 2, 3, 12  # types of TIFF
PIXEL_IS_AREA = (1, 1, 0, 1, 1025, 0, 1, 1)  # a key directory that names no coordinate system
WORLD_FILES = {".wld", ".tfw", ".tifw", ".jgw", ".jpgw", ".jpegw", ".pgw", ".pngw", ".bpw", ".j2w"}  # suffixes
FAR = 2**16  # bytes of a world file, at most


@dataclass(frozen=True)
class Georeference:
    """The tags of a GeoTIFF, by their numbers: values as the file has them, texts as bytes."""

    tags: Mapping[int, tuple[float, ...] | tuple[int, ...] | bytes]


def georeference_of(path: File, page: int = 1, *, sparse: bool = False) -> Georeference | None:
    """The place of a picture on the earth; None where nothing tells it.

    From the tags of a TIFF, else from GDAL where rasterio is installed (other formats, .aux.xml), else from a world
    file next to it; files next to one in a store are not looked for. A TIFF that has to be turned upright has none.
    sparse: as for `tiff.pages_of`.
    """
    tags = tiff.tags_of(path, page, sparse=sparse)
    if tags is not None:
        place = _of_tags(tags)
        if tags.get(274, 1) != 1:
            return None
        if place.tags or isinstance(path, Remote):
            return place if place.tags else None
    if gdal.available():
        return None if (pixel := gdal.reference_of(path)) is None else _of_tags(next(tiff.directories(BytesIO(pixel))))
    return None if isinstance(path, Remote) or (matrix := world_file(path)) is None else of_transform(matrix)


def _of_tags(tags: tiff.Tags) -> Georeference:
    return Georeference({tag: values for tag in TAGS if (values := _raw(tags, tag))})


def of_transform(matrix: tuple[float, ...]) -> Georeference:
    """The tags of a transform (a, b, c, d, e, f) from the corner of the first pixel, without a coordinate system."""
    a, b, c, d, e, f = matrix
    if b or d or a <= 0 or e >= 0:
        full = (a, b, 0.0, c, d, e, 0.0, f, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
        return Georeference({MATRIX: full, KEYS: PIXEL_IS_AREA})
    return Georeference({SCALE: (a, -e, 0.0), TIEPOINT: (0.0, 0.0, 0.0, c, f, 0.0), KEYS: PIXEL_IS_AREA})


def world_file(path: Path) -> tuple[float, ...] | None:
    """The transform in the world file of a picture (x.tfw, x.tifw or x.wld of x.tif); None without one."""
    suffix = path.suffix[1:]
    if not suffix:
        return None
    names = {f"{suffix[0]}{suffix[-1]}w", f"{suffix}w", "wld"}
    for name in sorted({*names, *map(str.upper, names)}):
        with suppress(OSError, ValueError):
            with open(regular(path.with_suffix(f".{name}")), encoding="ascii") as file:
                a, d, b, e, x, y = map(float, file.read(FAR).split())
            return (a, b, x - (a + b) / 2, d, e, y - (d + e) / 2)  # they give the centre of the first pixel
    return None


def _raw(tags: tiff.Tags, tag: int) -> tuple[float, ...] | tuple[int, ...] | bytes:
    """The values of a tag as they are on disk, nothing where it is of another type."""
    data, kind = tags._tagdata.get(tag, b""), tags.tagtype.get(tag)
    if tag == WORDS:
        return data if kind == ASCII else b""
    wanted, letter = (SHORT, "H") if tag == KEYS else (DOUBLE, "d")
    if kind != wanted:
        return ()
    return struct.unpack(f"{tags._endian}{len(data) // struct.calcsize(letter)}{letter}", data)
