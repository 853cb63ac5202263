"""The values of an image that Pillow has opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from .imageerror import require_bands
from .reading import ROWS, Samples
from .tiff import Page

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def samples_of(image: Image.Image, tags: Page | None, source: str | None) -> Samples:
    """The values of a decoded image of any mode; `tags` are those of a TIFF, and `source` is its format."""
    deep = image.mode.startswith("I;16") or image.mode in ("I", "F")
    nodata = None if tags is None else tags.nodata
    if not deep:
        if nodata is not None and tags is not None and tags.photometric == 0:
            nodata = 255 - nodata  # Pillow inverts 8 bits
        data = tags is not None and tags.opacity is None  # a fourth band is data unless it is declared as opacity
        alpha = None if data or not image.has_transparency_data else _opacity(image)
        if nodata is not None and image.mode == "P":  # a number of a colour
            alpha, nodata = np.where(np.asarray(image) == nodata, np.uint8(0), np.uint8(255)), None
        return Samples(_rgb(image), "uint8", alpha=alpha, nodata=nodata)
    values = np.asarray(image)
    if tags is not None:
        kind = tags.kind
    elif image.mode == "F":
        kind = "float32"
    else:
        kind = "int32" if image.mode == "I" and source != "PNG" else "uint16"  # PNG: by the release of Pillow
    if kind == "uint32":
        values = values.view(np.uint32)
    return Samples(values[..., None], kind, nodata=nodata, inverted=tags is not None and tags.photometric == 0)


def half_of_16_bits(image: Image.Image) -> str | None:
    """The raw mode of an opened PNG of 16-bit colours, of which Pillow decodes one half at a time; None for others."""
    if image.format != "PNG" or image.mode not in ("RGB", "RGBA") or not image.tile:  # type: ignore[attr-defined]
        return None
    raw = image.tile[0].args  # type: ignore[attr-defined]
    raw = raw if isinstance(raw, str) else raw[0]
    return raw if raw.endswith(";16B") else None


def samples_of_16_bits(image: Image.Image, again: Image.Image, raw: str) -> Samples:
    """The values of a PNG of 16-bit colours with this raw mode, opened twice and not decoded yet."""
    if raw == "LA;16B":  # its pixels are four bytes
        halves = _decoded(image, "RGBA").astype(np.uint16)
        values = halves[..., 0::2] << 8 | halves[..., 1::2]
    else:
        values = _decoded(image, raw).astype(np.uint16) << 8
        values |= _decoded(again, raw[:-1] + "L")  # the other half, as if the bytes were in the other order
    alpha = None
    if values.shape[2] in (2, 4):
        opacity, values = values[..., -1], values[..., :-1]
        alpha = np.maximum(opacity >> 8, opacity > 0).astype(np.uint8)
    elif "transparency" in image.info:
        opaque = (values != np.array(image.info["transparency"])).any(2)
        alpha = opaque.astype(np.uint8) * 255
    return Samples(values, "uint16", alpha=alpha)


def with_bands(samples: Samples, bands: tuple[int, ...] | None, path: Path | str) -> Samples:
    """Some bands, from 1, of all that a file has; the one after its colours is its opacity."""
    if bands is None:
        return samples
    values, alpha = samples.values, samples.alpha
    if alpha is not None and max(bands) == values.shape[2] + 1:  # asked for as data
        values, alpha = np.dstack([values, alpha.astype(values.dtype)]), None
    require_bands(max(bands), values.shape[2], path)
    return samples._replace(values=values[..., [band - 1 for band in bands]], alpha=alpha)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) when the block is damaged, no reason to lose the picture."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged blocks raise nearly anything
        return 1


def upright(image: Image.Image) -> Image.Image:
    """Turn an image upright by its EXIF orientation."""
    # not ImageOps.exif_transpose: it rewrites the EXIF block, and fails on pictures whose block has odd entries
    turn = _UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> np.ndarray:
    """The colours uint8 [H,W,3] of an image of 8 bits, without its opacity."""
    if image.mode in ("P", "PA", "La", "RGBa"):  # the first two lose colours, the others are multiplied by opacity
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    image = image if image.mode == "RGB" else image.convert("RGB")
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, ROWS):  # np.array would hold two more copies of the whole on its way
        bottom = min(top + ROWS, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels


def _opacity(image: Image.Image) -> np.ndarray:
    """The opacity uint8 [H,W] of an image of 8 bits."""
    if image.mode not in ("LA", "RGBA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return np.asarray(image.getchannel("A"))


def _decoded(image: Image.Image, raw: str) -> np.ndarray:
    """The bytes of an opened image, decoded by a raw mode of its choice."""
    image.tile = [tile._replace(args=raw) for tile in image.tile]  # type: ignore[attr-defined]
    image.load()
    return np.asarray(image)
