"""Images and label masks on disk: finding, decoding, resizing and cutting into squares. Arrays are uint8, [H,W,3] or [H,W]."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
# pictures that a command leaves beside each of these files; where that lies among the photos, they are none of them
MADE = {
    "metrics.jsonl": ("groups.png", "curves.png", "ladder.png", "samples"),
    "predict.json": ("masks", "overlays", "sheet.jpg"),
    "scores.json": ("confusion.png",),
    "similarity.json": ("similarity.png",),
}
MAX_PIXELS = 2**30  # 32,768 pixels square: beyond this a header is more likely damaged than true

Crops = Literal["center", "slide", "five"]
FIVE_RATIO = 0.5  # of the image's height and width: the size of each of five crops, as in the paper
Resample = Literal["nearest", "bilinear"]

_FILTERS = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
_EXTRA_SAMPLES = 338  # the TIFF tag that says what channels beyond the colours are
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
    """One image that cannot be used: `path`, the `reason`, and a message that adds what to do. A run may skip the image."""

    def __init__(
        self,
        path: Path | str,
        reason: str,
        advice: str = "copy it again, export it as 8-bit PNG or JPEG, or take it out",
    ):
        super().__init__(f"{path}: {reason}; {advice}")
        self.path = Path(path)
        self.reason, self.advice = reason, advice

    def __reduce__(self) -> tuple:  # so that processes can hand it on
        return ImageError, (self.path, self.reason, self.advice)


def find_images(path: Path | str, argument: str = "--data") -> list[Path]:
    """Every image in `path`, a file or a folder in any nesting, sorted by relative path.

    Known by suffix (SUFFIXES, in upper or lower case). Hidden files and folders are left out, and so is what commands made (MADE);
    links to folders are followed.
    Raises UserError naming `argument` when there is no such path, when a folder cannot be read, and when it holds no image.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"{argument} {path}: not an image by its suffix; give a folder, or a file that ends in {_listed(SUFFIXES)}"
            )
        return [path]
    if not path.is_dir():
        raise UserError(f"{argument} {path}: no such file or folder; give a folder of images ({_listed(SUFFIXES)})")
    files = visible_files(path, argument)
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        others = ", ".join(
            f"{count} {suffix or 'without suffix'}" for suffix, count in Counter(f.suffix for f in files).most_common(5)
        )
        found = f"only other files ({others})" if files else "no files"
        ours = [name for name in sorted(_made_beside(os.listdir(path))) if (path / name).exists()]
        found += f", beside what a command made of others ({', '.join(ours)})" if ours else ""
        raise UserError(
            f"{argument} {path}: no images in it; looked in all folders below for {_listed(SUFFIXES)} and found {found}"
        )
    return images


def visible_files(folder: Path, argument: str) -> list[Path]:
    """All files below `folder` that are neither hidden nor MADE, sorted by relative path; UserError naming a folder that cannot be read."""

    def unreadable(error: OSError) -> None:
        raise UserError(
            f"{argument} {error.filename}: cannot be read ({error.strerror}); change its permissions"
        ) from error

    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(parent)
        if real in seen:  # a link back to a folder above would go round for ever
            folders.clear()
            continue
        seen.add(real)
        made = _made_beside(names)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in made)
        files += [Path(parent, name) for name in names if not name.startswith(".") and name not in made]
    return sorted(files, key=Path.as_posix)  # all begin alike


def _made_beside(names: Iterable[str]) -> set[str]:
    """Names of what commands made in a folder that holds files of these `names`."""
    return {made for record in MADE.keys() & set(names) for made in MADE[record]}


def read_image(path: Path | str) -> np.ndarray:
    """The image as RGB, uint8 [H,W,3], turned upright by its EXIF orientation. ImageError when it cannot be decoded whole.

    Anything transparent is laid on white. Deeper images come down to 8 bits: 16-bit grey by v / 257, rounded, so that 65535 becomes
    255; 16-bit colour by its high byte (Pillow's own reading); 32-bit integer and float grey, which have no fixed white, from their
    own smallest..largest finite value to 0..255 (a constant image becomes black, nan too). Only the first frame is read. An
    embedded colour profile is ignored.
    """
    with _opened(path) as image:
        source = image.format
        image.load()
        return as_rgb(_upright(image), source)


def read_label(path: Path | str) -> np.ndarray:
    """The class numbers of a label mask, uint8 [H,W]: grey values as they are, palette indices, or 0 and 1 of a 1-bit image.

    Raises ImageError for other kinds (colours, 16 bits, transparency) and when the file cannot be decoded whole.
    """
    with _opened(path) as image:
        if image.mode not in ("L", "P", "1"):
            expected = "write class numbers as 8-bit grey or palette PNG (255 = ignore), one channel"
            raise ImageError(path, f"a label of mode {image.mode}, which holds no class numbers", expected)
        image.load()
        return np.array(_upright(image), dtype=np.uint8)


def read_strips(path: Path | str, rows: int) -> Iterator[np.ndarray]:
    """An 8-bit colour image from top to bottom in strips, uint8 [at most `rows`,W,3]: the first three channels as they are, because in
    satellite images the fourth is infrared and not transparency. ImageError for other images; only the decoded image and a strip are in
    memory.
    """
    with _opened(path) as image:
        if image.mode not in ("RGB", "RGBA", "RGBX", "P"):
            raise ImageError(path, f"an image of mode {image.mode}, not of 8-bit colours")
        if (
            image.format == "TIFF" and image.mode == "RGBA" and image.tag_v2.get(_EXTRA_SAMPLES) == (1,)
        ):  # decoding would divide by it
            raise ImageError(
                path, "calls its fourth channel transparency that is multiplied in", "export it with three channels"
            )
        image.load()
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            yield np.asarray(strip.convert("RGB") if strip.mode == "P" else strip)[..., :3]


def image_size(path: Path | str) -> tuple[int, int]:
    """(height, width) that `read_image` would return, from the file's header; ImageError when there is none.

    The one exception: a PNG that notes its orientation after its pixels is taken as it lies.
    """
    with _opened(path) as image:
        width, height = image.size
        if image.format == "TIFF":  # releases of Pillow differ in whether its size is turned already
            width, height = (image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
        elif {"exif", "xmp"}.isdisjoint(image.info):  # asking on would decode the whole of a PNG
            return height, width
        return (width, height) if _orientation(image) >= 5 else (height, width)


def require_patch(image: np.ndarray, patch: int, path: Path | str) -> None:
    """ImageError naming `path` when `image` [H,W,3] is smaller than one patch of the backbone (`patch` pixels) in its own pixels.

    Enlarging could fill one, but there is hardly anything in so few pixels to tell groups apart by.
    """
    height, width = image.shape[:2]
    if min(height, width) < patch:
        raise ImageError(
            path, f"{width} x {height} pixels, less than one patch of the backbone ({patch} pixels)", "take it out"
        )


def whole_patches(size: int, patch: int) -> int:
    """The multiple of `patch`, at least one of it, that is nearest to `size` pixels."""
    return max(1, round(size / patch)) * patch


def resize_short_side(image: np.ndarray, size: int, resample: Resample = "nearest") -> np.ndarray:
    """`image` [H,W,3] or label [H,W], uint8, with its short side at `size` pixels and the long side rounded down, as the paper does.

    Labels are always resized by nearest neighbour, whatever `resample` says. An image of that size comes back as it is.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    if short == size:
        return image
    kind = _FILTERS[resample] if image.ndim == 3 else Image.Resampling.NEAREST
    return np.array(Image.fromarray(image).resize((width * size // short, height * size // short), kind))


def square_offsets(height: int, width: int, crops: Literal["center", "slide"]) -> list[tuple[int, int]]:
    """(top, left) of squares of side min(height, width).

    "center": the one in the middle. "slide": evenly spaced along the long side, the first at its start, the last at its end,
    neighbours at most a quarter of the side apart, so that the whole image is seen; a square image has one.
    """
    side, spare = min(height, width), abs(height - width)
    if crops == "center":
        places = [spare // 2]
    elif crops == "slide":
        gaps = -(-spare // max(1, side // 4))
        places = [place * spare // max(1, gaps) for place in range(gaps + 1)]
    else:
        raise ValueError(f'crops must be "center" or "slide", not {crops!r}')
    return [(place, 0) if height > width else (0, place) for place in places]


def five_windows(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of the five crops of an image: its corners (top left, top right, bottom left, bottom right) and its
    centre, each FIVE_RATIO of the height and of the width, rounded down, at least a pixel."""
    h, w = max(1, int(height * FIVE_RATIO)), max(1, int(width * FIVE_RATIO))
    bottom, right = height - h, width - w
    return [
        (top, left, h, w) for top, left in ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2))
    ]


def cut_squares(
    image: np.ndarray, size: int, crops: Crops, resample: Resample = "nearest"
) -> list[tuple[tuple[int, int], np.ndarray]]:
    """The squares [size,size,3] (of a label [size,size]) that training or evaluation sees of an image, each with its place.

    "center" and "slide": the image's short side is brought to `size`, then squares are cut at `square_offsets` of the result. "five":
    each of `five_windows` has its own short side brought to `size`, and the square in its middle is cut. A place is (top, left) in the
    image at the scale of its squares: the short side is `size` there, and for "five" `size` / FIVE_RATIO, up to rounding. An image and
    its label of the same size are cut at the same places. Squares are copies, which do not keep the whole image in memory.
    """
    height, width = image.shape[:2]
    within = "center" if crops == "five" else crops
    found = []
    for top, left, h, w in five_windows(height, width) if crops == "five" else [(0, 0, height, width)]:
        resized = resize_short_side(image[top : top + h, left : left + w], size, resample)
        scaled_h, scaled_w = resized.shape[:2]
        for y, x in square_offsets(scaled_h, scaled_w, within):
            place = (top * scaled_h // h + y, left * scaled_w // w + x)
            found.append((place, resized[y : y + size, x : x + size].copy()))
    return found


class _PixelLimit:
    """Lifts Pillow's global limit on pixels while any thread of ours is inside, and puts it back when the last one leaves."""

    def __init__(self) -> None:
        self._lock, self._inside, self._saved = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    @contextmanager
    def lifted(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    Image.MAX_IMAGE_PIXELS = self._saved


_pixel_limit = _PixelLimit()


@contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """The file as a Pillow image that decodes on demand; whatever goes wrong meanwhile is raised as ImageError."""
    try:
        with _pixel_limit.lifted(), open(path, "rb") as file, Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    path, f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,} in all", "cut it into tiles"
                )
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(path, "not an image of a kind that can be read, or damaged from the start") from error
    except MemoryError as error:
        raise ImageError(path, "does not fit into memory", "cut it into tiles") from error
    except Exception as error:  # not only OSError: a damaged file makes Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(path, f"cannot be decoded ({reason.splitlines()[0]})") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) also when the EXIF block is damaged, which is no reason to lose the picture."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as in _opened: damaged blocks raise nearly anything
        return 1


def _upright(image: Image.Image) -> Image.Image:
    # not ImageOps.exif_transpose: it writes the EXIF block anew, and fails on pictures whose block has odd entries
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image, source: str | None) -> np.ndarray:
    """uint8 [H,W,3] of a Pillow image of any mode, as of `read_image` but as it lies. source: the format of the file it came from."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # some releases of Pillow open a 16-bit PNG in mode I
        sixteen = image.mode.startswith("I;16") or (image.mode == "I" and source == "PNG")
        grey = _sixteen_to_eight(image) if sixteen else _stretch_to_eight(image)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return np.array(image.convert("RGB"))


def _sixteen_to_eight(image: Image.Image) -> np.ndarray:
    table = (np.arange(2**16) + 128) // 257
    return table.astype(np.uint8)[np.asarray(image)]


def _stretch_to_eight(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.float64)  # fp32 would lose steps of large integers
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    if high == low:
        return np.zeros(values.shape, np.uint8)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
    return np.rint(scaled).astype(np.uint8)


def _listed(suffixes: tuple[str, ...]) -> str:
    return " ".join(suffixes)
