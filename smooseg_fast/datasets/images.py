"""Images on disk: list, decode, resize, cut into squares. Arrays are uint8, [H,W,3] or [H,W]."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from ..errors import UserError
from ..system.budget import Budget
from ..system.files import size_of
from ..system.outfolder import MARKER, written_by_us
from ..system.sizes import readable
from ..system.terminal import about
from . import gdal, tiff
from .formats import photo_formats
from .header import MULTIPAGE, Header
from .imageerror import ImageError, open_image, undecodable
from .pillow import half_of_16_bits, orientation, samples_of, samples_of_16_bits, upright, with_bands
from .reading import PLAIN, Picture, Reading, Samples, shown

MAX_PIXELS = 2**30  # 32,768 pixels square: beyond this a header is more likely damaged than true

LARGE_PIXELS = 2**25  # 100 MB
BLANK = 500  # bytes of pixels that a byte of a file may stand for, where an image is large; deflate reaches 1,032
DECODED_BYTES = 8  # of a pixel, while its image is decoded and copied
_decoding = Budget(2**30)

Crops = Literal["center", "slide", "five"]
FIVE_RATIO = 0.5  # height and width of each of five crops, as a share of the image's (the paper's value)
Resample = Literal["nearest", "bilinear"]

_EXTRA_SAMPLES = 338  # the TIFF tag for the meaning of channels beyond the colours


def visible_files(folder: Path, argument: str) -> list[Path]:
    """List all files below `folder`, sorted by relative path, except hidden ones and those that smooseg wrote.

    A marker in the folder names the latter (`written_by_us`). UserError naming a folder that cannot be read.
    """

    def unreadable(error: OSError) -> None:
        reason = f"cannot be read ({error.strerror})"
        raise UserError(f"{argument} {error.filename}: {reason}; change its permissions") from error

    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(parent)
        if real in seen:  # a link back to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        ours = written_by_us(Path(parent)) if MARKER in names else set()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ours)
        files += [Path(parent, name) for name in names if not name.startswith(".") and name not in ours]
    return sorted(files, key=Path.as_posix)  # all begin alike


def read_picture(path: Path | str, reading: Reading = PLAIN, page: int | None = None) -> Picture:
    """Read an image as RGB, upright by its EXIF orientation. ImageError if it cannot be decoded whole.

    Lays transparent images on white, and ignores an embedded colour profile. `reading` says how deeper values are
    stretched to 8 bits, and which bands are shown. Places without data (NaN and infinite values, the value of GDAL's
    no-data tag, full transparency) are not valid, and white.

    Args:
        page: of a stack, from 1; by default that of `reading`, or the first where that is all.
    """
    return shown(read_samples(path, reading, page), reading)


def read_samples(path: Path | str, reading: Reading = PLAIN, page: int | None = None) -> Samples:
    """Read the values of the bands that are shown, before they are stretched. Arguments and errors as above."""
    if gdal.alone(path):
        return gdal.samples_of(path, reading.bands, MAX_PIXELS)
    number = page or reading.first_page
    tags = tiff.page_of(path, number)
    if tags is not None and tags.needs_tifffile(reading.bands):
        require_pixels(path, tags, tags.nbytes)
        with turn_of(tags):
            return tiff.masked(path, tags, tiff.read(path, tags, reading.bands))
    with opened(path) as image, turn_of(image):
        seek(image, path, number, tags)
        half = half_of_16_bits(image)
        if half is not None:
            with opened(path) as again:
                samples = samples_of_16_bits(image, again, half)
            samples = samples.turned(orientation(image))
        else:
            source = image.format
            image.load()
            samples = samples_of(upright(image), tags, source)
        samples = with_bands(samples, reading.bands, path)
        return samples if tags is None else tiff.masked(path, tags, samples)


def header_of(path: Path | str) -> Header:
    """Read the header of a file. ImageError when there is none."""
    if gdal.alone(path):
        return gdal.header_of(path)
    first = tiff.page_of(path, 1)
    if first is not None:
        return Header.of_tiff(first, tiff.count_pages(path))
    with opened(path) as image:
        return Header.of_pillow(image)


def picture_of(image: Image.Image, reading: Reading = PLAIN) -> Picture:
    """A Pillow image of any mode as `read_picture` shows it, but unturned."""
    return shown(with_bands(samples_of(image, None, image.format), reading.bands, "image"), reading)


def seek(image: Image.Image, path: Path | str, page: int, tags: tiff.Page | None) -> None:
    """Go to a page of an opened file, from 1. ImageError where there is none such."""
    if tags is not None:
        if tags.number:
            image.seek(tags.number)
    elif page > 1:
        if image.format not in MULTIPAGE or page > getattr(image, "n_frames", 1):
            raise ImageError(path, f"has no page {page}", "give --pages that every image has, or take it out")
        image.seek(page - 1)


def read_image(path: Path | str) -> np.ndarray:
    """Read the pixels uint8 [H,W,3] of `read_picture`; deep values are stretched by those of the image itself."""
    return read_picture(path).pixels


def read_label(path: Path | str) -> np.ndarray:
    """Read the class numbers uint8 [H,W] of a label mask: grey values, palette indices, or 0 and 1 of a 1-bit image.

    ImageError for other kinds (colours, 16 bits, transparency), and if the file cannot be decoded whole.
    """
    with opened(path, label=True) as image:
        if image.mode not in ("L", "P", "1"):
            expected = "write class numbers as 8-bit grey or palette PNG (255 = ignore), one channel"
            raise ImageError(path, f"a label of mode {image.mode}, which holds no class numbers", expected)
        image.load()
        return np.array(upright(image), dtype=np.uint8)


def read_colours(path: Path | str) -> Image.Image:
    """Read the first three channels of an 8-bit colour image as they are. ImageError for other images.

    In satellite images the fourth channel is infrared and not transparency.
    """
    with opened(path) as image:
        if image.mode not in ("RGB", "RGBA", "RGBX", "P"):
            raise ImageError(path, f"an image of mode {image.mode}, not of 8-bit colours")
        premultiplied = (
            isinstance(image, TiffImageFile) and image.mode == "RGBA" and image.tag_v2.get(_EXTRA_SAMPLES) == (1,)
        )
        if premultiplied:  # decoding would divide by the fourth channel
            raise ImageError(path, "declares its fourth channel as transparency that is multiplied in")
        return image.convert("RGB")


def image_size(path: Path | str) -> tuple[int, int]:
    """Return the (height, width) of what `read_image` gives, from the file's header; ImageError when there is none.

    One exception: a PNG that notes its orientation after its pixels counts as upright.
    """
    if gdal.alone(path):
        with gdal.opened(path) as dataset:
            return dataset.shape
    tags = tiff.page_of(path, 1)
    if tags is not None:
        return tags.size[::-1] if tags.orientation >= 5 else tags.size
    with opened(path) as image:
        width, height = image.size
        if {"exif", "xmp"}.isdisjoint(image.info):  # to ask further would decode all of a PNG
            return height, width
        return (width, height) if orientation(image) >= 5 else (height, width)


def require_patch(image: np.ndarray, patch: int, path: Path | str) -> None:
    """Raise ImageError naming `path` when `image` [H,W,3] is smaller than one patch of the backbone (`patch` pixels).

    Enlarging could fill a patch, but so few pixels hold hardly anything that tells groups apart.
    """
    height, width = image.shape[:2]
    if min(height, width) < patch:
        reason = f"{width} x {height} pixels, less than one patch of the backbone ({patch} pixels)"
        raise ImageError(path, reason, "take it out")


def require_pixels(path: Path | str, image: Image.Image | tiff.Page, nbytes: float, *, label: bool = False) -> None:
    """Raise ImageError naming `path` when an image is larger than MAX_PIXELS, or than its file can fill.

    nbytes: of its pixels before they are packed. label: a label may well be all one class.
    """
    pixels = image.width * image.height
    size, file_bytes = f"{image.width} x {image.height} pixels", size_of(path)
    if pixels > MAX_PIXELS:
        raise ImageError(path, f"{size}, more than {MAX_PIXELS:,} in all", "cut it into tiles")
    if pixels > LARGE_PIXELS * (8 if label else 1) and nbytes > BLANK * file_bytes:
        size = f"{size} in {readable(file_bytes)}"
        raise ImageError(path, f"{size}: blank, or made to use up memory", "take it out, or save it smaller")


def whole_patches(size: int, patch: int) -> int:
    """Return the multiple of `patch` that is nearest to `size` pixels, at least one patch."""
    return max(1, round(size / patch)) * patch


def resize_short_side(image: np.ndarray, size: int, resample: Resample = "nearest") -> np.ndarray:
    """Resize an image [H,W,3] or label [H,W], uint8, to a short side of `size` pixels, the long side rounded down.

    Labels are always resized by nearest neighbour. An image of that size comes back as it is.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    if short == size:
        return image
    size_new = (height * size // short, width * size // short)
    if resample == "nearest" or image.ndim == 2:
        rows, columns = map(_nearest, size_new, (height, width))
        return image[rows[:, None], columns]
    return np.array(Image.fromarray(image).resize(size_new[::-1], Image.Resampling.BILINEAR))


def _nearest(count: int, length: int) -> np.ndarray:
    """Places int [count] in 0..length-1, as Pillow picks them for a side that is resized, without its copy of the
    whole image: it adds up steps, and does not multiply."""
    steps = np.full(count, length / count)
    steps[0] /= 2
    return np.cumsum(steps).astype(np.intp)


def square_offsets(height: int, width: int, crops: Literal["center", "slide"]) -> list[tuple[int, int]]:
    """Return (top, left) of the squares of side min(height, width) to cut.

    "center": the one in the middle. "slide": evenly spaced along the long side from its start to its end, neighbours at
    most a quarter of the side apart, so that they cover the image; a square image has one.
    """
    side, spare = min(height, width), abs(height - width)
    if crops == "center":
        places = [spare // 2]
    else:
        gaps = -(-spare // max(1, side // 4))
        places = [place * spare // max(1, gaps) for place in range(gaps + 1)]
    return [(place, 0) if height > width else (0, place) for place in places]


def five_windows(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Return (top, left, height, width) of five crops: top left, top right, bottom left, bottom right and centre.

    Each has FIVE_RATIO of the height and of the width, rounded down, at least a pixel.
    """
    h, w = max(1, int(height * FIVE_RATIO)), max(1, int(width * FIVE_RATIO))
    bottom, right = height - h, width - w
    places = ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2))
    return [(*place, h, w) for place in places]


def cut_squares(
    image: np.ndarray, size: int, crops: Crops, resample: Resample = "nearest"
) -> list[tuple[tuple[int, int], np.ndarray]]:
    """Cut the squares [size,size,3] (of a label [size,size]) that training or evaluation sees -> [(place, square)].

    "center" and "slide" resize the short side to `size`, then cut at `square_offsets`. "five" resizes the short side of
    each of `five_windows` to `size`, and cuts the square in its middle. A place is (top, left) in the image at the
    scale of its squares: the short side is `size` there, and for "five" `size` / FIVE_RATIO, up to rounding. An image
    and its label of the same size are cut at the same places. Squares are copies, which do not keep the whole image in
    memory.
    """
    height, width = image.shape[:2]
    inside_window = "center" if crops == "five" else crops
    squares = []
    for top, left, h, w in five_windows(height, width) if crops == "five" else [(0, 0, height, width)]:
        resized = resize_short_side(image[top : top + h, left : left + w], size, resample)
        scaled_h, scaled_w = resized.shape[:2]
        for y, x in square_offsets(scaled_h, scaled_w, inside_window):
            place = (top * scaled_h // h + y, left * scaled_w // w + x)
            squares.append((place, resized[y : y + size, x : x + size].copy()))
    return squares


def turn_of(image: Image.Image | tiff.Page) -> AbstractContextManager:
    """Let the threads decode as many images at once as fit into the budget; one that is larger goes alone."""
    return _decoding.take(DECODED_BYTES * image.width * image.height)


_limits_lock = threading.Lock()
_limits: list[int | None] = []


@contextmanager
def _without_pixel_limit() -> Iterator[None]:
    """Lift Pillow's global limit on pixels while any thread of ours is inside; the last one to leave restores it."""
    with _limits_lock:
        _limits.append(Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _limits_lock:
            Image.MAX_IMAGE_PIXELS = _limits.pop()  # of the first thread to enter, for the last to leave


@contextmanager
def opened(path: Path | str, *, label: bool = False) -> Iterator[Image.Image]:
    """Open the file as a Pillow image that decodes on demand; whatever goes wrong inside is raised as ImageError.

    label: whether an image may be as blank as a label.
    """
    try:
        with (
            about(path),
            _without_pixel_limit(),
            open_image(path) as file,
            Image.open(file, formats=photo_formats()) as image,
        ):
            require_pixels(path, image, _raw_bytes(image), label=label)
            yield image
    except UserError:  # also of a store without its package
        raise
    except UnidentifiedImageError as error:
        raise ImageError(path, "not an image of a kind that can be read, or damaged from the start") from error
    except Exception as error:  # not only OSError: a damaged file makes Pillow's decoders raise nearly anything
        raise undecodable(path, error) from error


def _raw_bytes(image: Image.Image) -> float:
    """Bytes of the pixels as the file has them before it packs them."""
    tiles = getattr(image, "tile", None)
    depth = re.search(r";(\d+)", str(tiles[0][3])) if tiles else None  # such as P;1
    bits = int(depth[1]) if depth else {"1": 1, "I;16": 16, "I": 32, "F": 32}.get(image.mode, 8)
    return image.width * image.height * len(image.getbands()) * bits / 8
