"""Images and label masks on disk: find, decode, resize, cut into squares. Arrays are uint8, [H,W,3] or [H,W]."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from ..errors import UserError
from ..system.outfolder import MARKER, written_by_us

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
SUFFIX_LIST = " ".join(SUFFIXES)
MAX_PIXELS = 2**30  # 32,768 pixels square: beyond this a header is more likely damaged than true

LARGE_PIXELS = 2**25  # 100 MB

Crops = Literal["center", "slide", "five"]
ROWS = 512  # that are copied at a time
FIVE_RATIO = 0.5  # height and width of each of five crops, as a share of the image's (the paper's value)
Resample = Literal["nearest", "bilinear"]

DEFAULT_ADVICE = "copy it again, export it as 8-bit PNG or JPEG, or take it out"
_EXTRA_SAMPLES = 338  # the TIFF tag for the meaning of channels beyond the colours
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """One image that cannot be used: its `path`, the `reason` and `advice`. A run may skip the image."""

    def __init__(self, path: Path | str, reason: str, advice: str = DEFAULT_ADVICE):
        super().__init__(f"{path}: {reason}; {advice}")
        self.path, self.reason, self.advice = Path(path), reason, advice

    def __reduce__(self) -> tuple:  # so that processes can hand it on
        return ImageError, (self.path, self.reason, self.advice)


def find_images(path: Path | str, argument: str = "--data") -> list[Path]:
    """List every image in `path`, a file or a folder in any nesting, sorted by relative path.

    Recognises images by suffix (SUFFIXES, upper or lower case) and follows links to folders. Ignores hidden files and
    folders, and files written by smooseg (`visible_files`), so runs and predictions can live inside a photo folder.
    UserError naming `argument` when the path does not exist, cannot be read, or holds no image.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{argument} {path}: no such file or folder; give a folder of images ({SUFFIX_LIST})")
    files = [path] if path.is_file() else visible_files(path, argument)
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        kinds = Counter(file.suffix or "without suffix" for file in files).most_common(5)
        others = ", ".join(f"{count} {kind}" for kind, count in kinds)
        contents = f"only other files ({others})" if files else "no files"
        ours = ", next to smooseg's own output" if written_by_us(path) else ""
        raise UserError(f"{argument} {path}: no images in it; looked for {SUFFIX_LIST} and found {contents}{ours}")
    return images


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
        ours = written_by_us(parent) if MARKER in names else set()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ours)
        files += [Path(parent, name) for name in names if not name.startswith(".") and name not in ours]
    return sorted(files, key=Path.as_posix)  # all begin alike


def read_image(path: Path | str) -> np.ndarray:
    """Read an image as RGB uint8 [H,W,3], upright by its EXIF orientation. ImageError if it cannot be decoded whole.

    Lays transparent images on white. Brings deeper images down to 8 bits: 16-bit grey by v / 257, rounded, so that
    65535 becomes 255; 16-bit colour by its high byte (Pillow's own reading); 32-bit integer and float grey, which have
    no fixed white, by stretching their smallest..largest finite value to 0..255 (a constant image becomes black, and so
    does nan). Reads the first frame only, and ignores an embedded colour profile.
    """
    with _opened(path) as image, _turn_of(image):
        source = image.format
        image.load()
        return as_rgb(_upright(image), source)


def read_label(path: Path | str) -> np.ndarray:
    """Read the class numbers uint8 [H,W] of a label mask: grey values, palette indices, or 0 and 1 of a 1-bit image.

    ImageError for other kinds (colours, 16 bits, transparency), and if the file cannot be decoded whole.
    """
    with _opened(path) as image:
        if image.mode not in ("L", "P", "1"):
            expected = "write class numbers as 8-bit grey or palette PNG (255 = ignore), one channel"
            raise ImageError(path, f"a label of mode {image.mode}, which holds no class numbers", expected)
        image.load()
        return np.array(_upright(image), dtype=np.uint8)


def read_colours(path: Path | str) -> Image.Image:
    """Read the first three channels of an 8-bit colour image as they are. ImageError for other images.

    In satellite images the fourth channel is infrared and not transparency.
    """
    with _opened(path) as image:
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
    with _opened(path) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # releases of Pillow differ in whether its size is turned already
            width, height = (image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
        elif {"exif", "xmp"}.isdisjoint(image.info):  # to ask further would decode all of a PNG
            return height, width
        return (width, height) if _orientation(image) >= 5 else (height, width)


def require_patch(image: np.ndarray, patch: int, path: Path | str) -> None:
    """Raise ImageError naming `path` when `image` [H,W,3] is smaller than one patch of the backbone (`patch` pixels).

    Enlarging could fill a patch, but so few pixels hold hardly anything that tells groups apart.
    """
    height, width = image.shape[:2]
    if min(height, width) < patch:
        reason = f"{width} x {height} pixels, less than one patch of the backbone ({patch} pixels)"
        raise ImageError(path, reason, "take it out")


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
    resampling = Image.Resampling[resample.upper() if image.ndim == 3 else "NEAREST"]
    return np.array(Image.fromarray(image).resize((width * size // short, height * size // short), resampling))


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


_large_lock = threading.Lock()


def _turn_of(image: Image.Image) -> AbstractContextManager:
    """Let one thread at a time decode a large image, which takes twice the memory of its pixels."""
    return _large_lock if image.width * image.height > LARGE_PIXELS else nullcontext()


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
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """Open the file as a Pillow image that decodes on demand; whatever goes wrong inside is raised as ImageError."""
    try:
        with _without_pixel_limit(), open(path, "rb") as file, Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,} in all"
                raise ImageError(path, size, "cut it into tiles")
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(path, "not an image of a kind that can be read, or damaged from the start") from error
    except Exception as error:  # not only OSError: a damaged file makes Pillow's decoders raise nearly anything
        raise ImageError(path, f"cannot be decoded ({reason(error)})") from error


def reason(error: Exception) -> str:
    """Say in one line why a file cannot be decoded."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) when the block is damaged, no reason to lose the picture."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # see _opened: damaged blocks raise nearly anything
        return 1


def _upright(image: Image.Image) -> Image.Image:
    # not ImageOps.exif_transpose: it rewrites the EXIF block, and fails on pictures whose block has odd entries
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image, source: str | None) -> np.ndarray:
    """Convert a Pillow image of any mode to uint8 [H,W,3] as `read_image` does, but unturned; `source`: its format."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and source == "PNG")  # by the release of Pillow
    if sixteen or image.mode in ("I", "F"):
        values = np.asarray(image)
        grey = (values.astype(np.uint32) + 128) // 257 if sixteen else _stretch(values)
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    image = image if image.mode == "RGB" else image.convert("RGB")
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, ROWS):  # np.array would hold two more copies of the whole on its way
        bottom = min(top + ROWS, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels


def _stretch(values: np.ndarray) -> np.ndarray:
    """Stretch the smallest..largest finite value to 0..255."""
    values = values.astype(np.float64)  # fp32 would lose steps of large integers
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    return np.rint((np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / (high - low or 1)))
