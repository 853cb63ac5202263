"""TIFF files: what their tags declare, their pages, and the values that Pillow cannot read.

Those are read by tifffile, an optional package: bands that are no colours, colours of 16 bits, separate planes, floats
of other sizes. One strip or tile is decoded at a time, and no more bands are kept than are shown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL.TiffImagePlugin import COMPRESSION_INFO
from PIL.TiffImagePlugin import ImageFileDirectory_v2 as Tags

from ..system.terminal import about
from .imageerror import ImageError, decoding, open_image, require_bands
from .reading import Samples, turned

INSTALL = "pip install 'smooseg_fast[tiff]' to read it"
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SEGMENT_BYTES = 2**32  # that a strip or tile may take
GREY, COLOUR, PALETTE, YCBCR = (0, 1), 2, 3, 6  # PhotometricInterpretation; of GREY, 0 is white at 0
REDUCED, MASK = 1, 4  # bits of NewSubfileType
ALPHA = (1, 2)  # ExtraSamples: multiplied in, or not
WEBP = 50001  # a compression that Pillow knows and its wheels lack
NAMES = {1: "uint", 2: "int", 3: "float"}  # SampleFormat
PILLOW_GREY = {"uint8", "uint16", "int16", "uint32", "int32", "float32"}


@dataclass(frozen=True)
class Page:
    """One image of a file, by its tags.

    Attributes:
        number: its place among all images of the file, reduced copies included, from 0.
        size: (height, width) as stored, before its orientation.
        kind: type of its values, such as "uint16"; "uint8" for fewer bits.
        bits: of a value.
        extra: ExtraSamples, the meaning of each band beyond the grey or the colours.
        nodata: the value that stands for no measurement, from GDAL's tag; None without it.
        mask: a page of the same size that is 0 where there is no measurement; None without one.
    """

    number: int
    size: tuple[int, int]
    bands: int
    kind: str
    bits: int
    photometric: int
    planar: bool
    compression: int
    extra: tuple[int, ...]
    orientation: int
    nodata: float | None
    mask: Page | None = None

    @classmethod
    def of(cls, number: int, tags: Tags) -> Page:
        """From its tags. Exception where they are not those of an image."""
        bits = tags.get(258, (1,))
        if len(set(bits)) > 1:
            raise ValueError(f"bands of different depths {bits}")
        photometric, bands = tags.get(262, 1), tags.get(277, 1)
        extra = tuple(tags.get(338, ()))
        if not extra and photometric == COLOUR:  # undeclared bands are data
            extra = (0,) * (bands - 3)
        name = NAMES.get(tags.get(339, (1,))[0], "complex")
        depth = next((depth for depth in (8, 16, 32, 64) if bits[0] <= depth), 128)
        return cls(
            number=number,
            size=(int(tags[257]), int(tags[256])),
            bands=bands,
            kind=f"{name}{depth}",
            bits=bits[0],
            photometric=photometric,
            planar=tags.get(284, 1) == 2,
            compression=tags.get(259, 1),
            extra=extra,
            orientation=tags.get(274, 1),
            nodata=_number(tags.get(42113)),
        )

    @property
    def height(self) -> int:
        return self.size[0]

    @property
    def width(self) -> int:
        return self.size[1]

    @property
    def nbytes(self) -> float:
        """Bytes that all its values take before they are packed."""
        return self.width * self.height * self.bands * self.bits / 8

    @property
    def colour(self) -> bool:
        """Whether its first three bands are red, green and blue, or become so by decoding."""
        return self.photometric == COLOUR or self.photometric > PALETTE

    @property
    def opacity(self) -> int | None:
        """The band that is opacity, from 0."""
        first = self.bands - len(self.extra)
        return next((first + place for place, meaning in enumerate(self.extra) if meaning in ALPHA), None)

    @property
    def data_bands(self) -> int:
        """How many bands are not opacity."""
        return self.bands - (self.opacity is not None)

    def needs_tifffile(self, bands: tuple[int, ...] | None) -> bool:
        """Whether Pillow cannot read it, or not these bands (from 1), with all their values."""
        if self.compression not in COMPRESSION_INFO or self.compression == WEBP:
            return True
        if self.bands == 1:
            whites = self.photometric == 0 and self.kind not in ("uint8", "uint16", "float32")
            return self.photometric in GREY and (whites or self.kind not in PILLOW_GREY)
        if self.kind != "uint8" or self.bits != 8:
            return True
        if self.photometric in GREY:
            return self.bands > 2 or self.opacity is None
        if self.photometric == COLOUR and self.bands > 4:
            return True
        return bands is not None and (self.extra[:1] == (1,) or max(bands) > 3) and self.photometric == COLOUR


def pages_of(path: Path | str, *, sparse: bool = False) -> Iterator[Page]:
    """The pages of a TIFF file with their masks, without the reduced copies of a pyramid; none of another or a damaged
    file. sparse: its pixels are not read afterwards, so that a store is asked for the tags alone."""
    return (page for page, _ in _pages_of(path, sparse))


def _pages_of(path: Path | str, sparse: bool) -> Iterator[tuple[Page, Tags]]:
    waiting: tuple[Page, Tags] | None = None  # the last page, whose mask may follow
    try:
        with about(path), open_image(path, sparse=sparse) as file:
            before, copies = None, []
            for number, tags in enumerate(directories(file)):
                page = Page.of(number, tags)
                if tags.get(254, 0) & (REDUCED | MASK) or tags.get(255, 1) == 2:
                    copies.append((page, tags))
                    if tags.get(254, 0) & MASK and waiting is not None and waiting[0].size == page.size:
                        waiting = replace(waiting[0], mask=page), waiting[1]
                elif before is None or not _halved(before, page.size):
                    if waiting is not None:
                        yield waiting
                    waiting = page, tags
                before = page.size
            if copies and len(copies) == number + 1:  # a copy without its picture
                yield copies[0]
    except ImageError:  # the file cannot be fetched
        raise
    except Exception:  # damaged tags make the reader raise nearly anything: Pillow tells what is wrong with the file
        pass
    if waiting is not None:
        yield waiting


def count_pages(path: Path | str) -> int:
    """How many pages a TIFF file has; 0 for another file."""
    return sum(1 for _ in pages_of(path))


def page_of(path: Path | str, number: int, *, sparse: bool = False) -> Page | None:
    """Page `number`, from 1; None when the file is no TIFF, or has fewer. sparse: as for `pages_of`."""
    return next(islice(pages_of(path, sparse=sparse), number - 1, None), None)


def read(path: Path | str, page: Page, bands: tuple[int, ...] | None) -> Samples:
    """Read the values of `bands`, from 1, by tifffile; without them, of the first three, or of the first.

    Raises:
        ImageError: when the file is damaged, is of a kind that is not read, or tifffile is not installed.
    """
    what = f"{page.bands} band{'s' * (page.bands > 1)} of {page.kind}"
    if find_spec("tifffile") is None or find_spec("imagecodecs") is None:
        raise ImageError(path, f"a TIFF of {what}, which Pillow does not read", INSTALL)
    if page.photometric not in (*GREY, COLOUR) or page.kind.startswith("complex"):
        raise ImageError(path, f"a TIFF of {what} that are neither grey nor red, green and blue")
    opacity = page.opacity
    require_bands(max(bands or (1,)), page.bands, path)
    if bands is None:
        chosen = tuple(range(3 if page.data_bands >= 3 else 1))
    else:
        chosen = tuple(band - 1 for band in bands)
        opacity = None if opacity in chosen else opacity  # asked for as data
    wanted = chosen if opacity is None else (*chosen, opacity)
    with decoding(path), opened_segments(path, page) as segments:
        values = segments.window(wanted, 0, 0, *page.size)
    alpha = None
    if opacity is not None:
        alpha, values = opaque(values[..., -1]), values[..., :-1]
    return Samples(
        values=values,
        kind=page.kind,
        colour=page.colour and max(chosen) < 3,
        alpha=alpha,
        nodata=page.nodata,
        inverted=page.photometric == 0,
    ).turned(page.orientation)


@contextmanager
def opened_mask(path: Path | str, page: Page) -> Iterator[Segments | None]:
    """The mask of a page, whose values are 0 where there is no measurement; None without one or without tifffile."""
    if page.mask is None or find_spec("tifffile") is None or find_spec("imagecodecs") is None:
        yield None
        return
    with decoding(path):
        segments = opened_segments(path, page.mask)
    with segments as mask:
        yield mask


def masked(path: Path | str, page: Page, samples: Samples) -> Samples:
    """The values of a whole page, transparent where its mask is 0."""
    with opened_mask(path, page) as mask:
        if mask is None or samples.alpha is not None:
            return samples
        alpha = shown_by(mask, 0, 0, *page.size)
    return samples._replace(alpha=turned(alpha, page.orientation))


def shown_by(mask: Segments, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """The opacity uint8 of a window of a mask."""
    return np.where(mask.window((0,), top, left, bottom, right)[..., 0], np.uint8(255), np.uint8(0))


def widened(values: np.ndarray, bits: int, nodata: float | None) -> tuple[np.ndarray, float | None]:
    """Grey values of less than 8 bits, and the one without data, as uint8 from black to white."""
    step = 255 // (2**bits - 1)
    return values.astype(np.uint8) * np.uint8(step), None if nodata is None else nodata * step


def opaque(alpha: np.ndarray) -> np.ndarray:
    """Opacity of any type as uint8; 0 stays where nothing shows alone."""
    if alpha.dtype == np.uint8:
        return alpha
    full = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1
    return np.ceil(np.clip(alpha / full, 0, 1) * 255).astype(np.uint8)


@contextmanager
def opened_segments(path: Path | str, page: Page) -> Iterator[Segments]:
    """The values of a page in its file."""
    from tifffile import TiffFile

    logging.getLogger("tifffile").setLevel(logging.ERROR)  # it warns of tags that concern nobody here
    with open_image(path) as file, TiffFile(file) as whole:
        yield Segments(path, page, file, whole.pages[page.number])


class Segments:
    """The strips or tiles of a page, decoded one at a time as they are asked for.

    sides: rows and columns of one. nbytes: of its values. ImageError where they are no picture's, or too large.
    """

    def __init__(self, path: Path | str, page: Page, file: BinaryIO, source: Any):
        self.path, self.page, self._file, self._source = path, page, file, source
        height, width = page.size
        if source.imagedepth != 1 or (source.imagelength, source.imagewidth) != page.size:
            raise ImageError(path, "a TIFF of volumes, not of pictures")
        rows, columns = (
            (source.tilelength, source.tilewidth) if source.is_tiled else (min(source.rowsperstrip, height), width)
        )
        self.sides = rows, columns
        self.nbytes = rows * columns * (1 if page.planar else page.bands) * source.dtype.itemsize
        if self.nbytes > SEGMENT_BYTES:
            raise ImageError(path, "a strip or tile of it takes more than 4 GiB", "write it again in tiles")

    def window(self, bands: tuple[int, ...], top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """The values [h,w,bands] of some bands, from 0, of the rows `top` to `bottom` - 1 and so on."""
        source, page, (rows, columns) = self._source, self.page, self.sides
        out = np.zeros((bottom - top, right - left, len(bands)), source.dtype.newbyteorder("="))
        with suppress(OverflowError, ValueError):  # a number that its type does not hold
            out[:] = 0 if page.nodata is None else out.dtype.type(page.nodata)  # for tiles that are left out
        across, down = -(-page.width // columns), -(-page.height // rows)
        for plane in sorted(set(bands)) if page.planar else [0]:
            for row in range(top // rows, -(-bottom // rows)):
                for column in range(left // columns, -(-right // columns)):
                    block = self._decoded((plane * down + row) * across + column)
                    if block is None:
                        continue
                    y, x = row * rows, column * columns
                    first, last = (max(top, y), max(left, x)), (min(bottom, y + rows), min(right, x + columns))
                    part = block[first[0] - y : last[0] - y, first[1] - x : last[1] - x]
                    target = out[first[0] - top : last[0] - top, first[1] - left : last[1] - left]
                    for channel, band in enumerate(bands):
                        if not page.planar:
                            target[..., channel] = part[..., band]
                        elif plane == band:
                            target[..., channel] = part[..., 0]
        return out

    def _decoded(self, number: int) -> np.ndarray | None:
        """The values [rows,columns,samples] of a strip or tile; None for one that is left out."""
        source = self._source
        if number >= len(source.databytecounts):
            raise ImageError(self.path, "cannot be decoded (the file is cut short)")
        offset, count = source.dataoffsets[number], source.databytecounts[number]
        if count == 0:
            return None
        self._file.seek(offset)
        data = self._file.read(count)
        if len(data) < count:
            raise ImageError(self.path, "cannot be decoded (the file is cut short)")
        segment, _, _ = source.decode(data, number, jpegtables=source.jpegtables)
        return segment[0]


def tags_of(path: Path | str, page: int, *, sparse: bool = False) -> Tags | None:
    """All tags of page `number`, from 1; None where `page_of` is."""
    return next((tags for _, tags in islice(_pages_of(path, sparse), page - 1, None)), None)


def palette_of(path: Path | str, page: Page) -> np.ndarray:
    """The colours uint8 [256,3] of a page of a palette."""
    with about(path), open_image(path) as file:
        tags = next(islice(directories(file), page.number, None))
    colours = np.array(tags[320], np.int64).reshape(3, -1).T[:256] >> 8
    return np.pad(colours, ((0, 256 - len(colours)), (0, 0))).astype(np.uint8)


def directories(file: BinaryIO) -> Iterator[Tags]:
    """The tags of every image of a file; nothing for files that are no TIFF."""
    header = file.read(8)
    if header[:4] not in MAGIC:
        return
    big, order = 43 in header[2:4], "little" if header[:2] == b"II" else "big"
    offset = int.from_bytes(file.read(8) if big else header[4:], order)  # type: ignore[arg-type]
    if header[2] == 43:  # Pillow sees it in this order of bytes alone, and then reads the offset too
        header += offset.to_bytes(8, "little")
    seen = set()
    while offset and offset not in seen:  # a chain may be bent into a circle
        seen.add(offset)
        tags = Tags(header)
        tags._bigtiff = big
        file.seek(offset)
        tags.load(file)
        yield tags
        offset = tags.next


def _halved(before: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether `size` is half of the one before, up to rounding: a level of a pyramid that is not declared as one."""
    return all(abs(here - there / 2) < 1 and here < there for here, there in zip(size, before))


def _number(text: Any) -> float | None:
    try:
        return float(str(text).strip(" \0"))
    except ValueError:
        return None
