"""Reads what the header of an image file declares, without its pixels."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from .pillow import half_of_16_bits
from .reading import group_of
from .tiff import GREY, Page

MULTIPAGE = ("GIF", "WEBP")  # formats other than TIFF whose files may hold several pages
INKS = {5: "CMYK", 8: "LAB"}  # PhotometricInterpretation of TIFF


class Header(NamedTuple):
    """Declarations of a file about its first page.

    Attributes:
        kind: type of its values, such as "uint16"; "uint8" for all that Pillow gives as bytes.
        bands: how many it has, without opacity.
        colour: whether the first three are red, green and blue.
        opacity: whether it may be transparent somewhere.
        space: the space of colours that has to be converted, such as "CMYK"; "" for others.
        pages: how many the file has.
        bytes: that all its values take.
        nodata: the value that stands for no measurement, from GDAL's tag; None without it.
    """

    kind: str
    bands: int
    colour: bool
    opacity: bool
    space: str
    pages: int
    bytes: int
    nodata: float | None = None

    @classmethod
    def of_tiff(cls, page: Page, pages: int) -> Header:
        """From the tags of the first page."""
        bands = 3 if page.photometric not in GREY and page.data_bands < 3 else page.data_bands  # as of a palette
        space = INKS.get(page.photometric, "")
        bands = 3 if space else bands
        return cls(
            kind=page.kind,
            bands=bands,
            colour=page.colour,
            opacity=page.opacity is not None or page.mask is not None,
            space=space,
            pages=pages,
            bytes=int(page.nbytes),
            nodata=page.nodata,
        )

    @classmethod
    def of_pillow(cls, image: Image.Image) -> Header:
        """From an opened image of another format."""
        deep = half_of_16_bits(image) is not None
        kind = "uint16" if deep or image.mode.startswith("I;16") else "uint8"
        if image.mode in ("I", "F"):
            kind = "float32" if image.mode == "F" else "uint16" if image.format == "PNG" else "int32"
        bands = 1 if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;") else 3
        pages = getattr(image, "n_frames", 1) if image.format in MULTIPAGE else 1
        space = image.mode if image.mode in INKS.values() else ""
        size = image.width * image.height * bands * {"uint8": 1, "uint16": 2}.get(kind, 4)
        return cls(
            kind=kind,
            bands=bands,
            colour=True,
            opacity=image.has_transparency_data,
            space=space,
            pages=pages,
            bytes=size,
        )

    def group(self, bands: tuple[int, ...] | None) -> str:
        """The images that share one range with it, where these bands are shown, from 1."""
        shown = (3 if self.bands >= 3 else 1) if bands is None else len(bands)
        return group_of(self.kind, self.colour and max(bands or (1,)) <= 3, shown)
