"""Suffixes of the image files that this machine reads, and the optional decoders behind some of them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

from PIL import features

PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")  # read everywhere
LABELS = (".png", ".tif", ".tiff", ".bmp", ".gif")  # lossless, so that numbers stay what they are
JPEG_2000 = (".jp2", ".j2k", ".jpx")  # where Pillow was built with OpenJPEG
GDAL = (".vrt", ".img")  # maps, with rasterio
HEIF = (".heic", ".heif", ".hif")  # with pillow-heif
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # of Pillow; for others, such as EPS, it starts programs
HEIF_PACKAGE, HEIF_ADVICE = "pillow_heif", "pip install 'smooseg_fast[heic]'"


@cache
def photo_suffixes() -> tuple[str, ...]:
    """List the lower-case suffixes of images that can be decoded here; registers Pillow's optional decoders."""
    optional: tuple[str, ...] = JPEG_2000 if features.check("jpg_2000") else ()
    if find_spec("rasterio") is not None:
        optional += GDAL
    if find_spec(HEIF_PACKAGE) is not None:
        import_module(HEIF_PACKAGE).register_heif_opener()
        optional += HEIF
    return PHOTOS + optional


@cache
def photo_formats() -> tuple[str, ...]:
    """List the formats of Pillow that may be opened here."""
    suffixes = photo_suffixes()
    optional = {"JPEG2000": JPEG_2000, "HEIF": HEIF}
    return FORMATS + tuple(name for name, its in optional.items() if its[0] in suffixes)
