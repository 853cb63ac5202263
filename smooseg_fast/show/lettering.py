"""Text in pictures: one line in any language, shortened to the room there is."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

# usual fonts of Linux, macOS and Windows with the Chinese, Japanese and Korean that DejaVu Sans lacks
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "malgun.ttf",
)


def length(text: str, size: int, bold: bool = False) -> int:
    """Return the pixels that `text` takes."""
    text = _one_line(text)
    return math.ceil(_font(text, size, bold).getlength(text))


def shorten(text: str, size: int, bold: bool, room: float) -> str:
    """Return `text` as one printable line, or its two ends around an ellipsis when it is wider than `room` pixels."""
    text = _one_line(text)
    if length(text, size, bold) <= room:
        return text
    fits, longer = 0, len(text)  # the ends of a path say most: bisect how many characters of them fit
    while longer - fits > 1:
        keep = (fits + longer) // 2
        shorter = text[: keep - keep // 2] + "…" + text[len(text) - keep // 2 :]
        fits, longer = (keep, longer) if length(shorter, size, bold) <= room else (fits, keep)
    return text[: fits - fits // 2] + "…" + text[len(text) - fits // 2 :]


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    ink: str,
    *,
    bold: bool = False,
    room: float = math.inf,
    anchor: str = "lm",
) -> None:
    """Draw `text` with its `anchor` (as Pillow names them) at `at`; text wider than `room` pixels loses its middle."""
    text = shorten(text, size, bold, room)
    draw.text(at, text, fill=ink, font=_font(text, size, bold), anchor=anchor)


def font_file(text: str, bold: bool = False) -> Path:
    """Return the font for `text`: matplotlib's DejaVu Sans if it has every character, else a system font."""
    path, known = _dejavu(bold)
    return Path(path if known.issuperset(map(ord, text)) else _wide_font() or path)


def _one_line(text: str) -> str:
    """Replace what cannot be printed: file names can hold line breaks and bytes that are not text."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


@lru_cache(maxsize=2)
def _dejavu(bold: bool) -> tuple[str, frozenset[int]]:
    """Return matplotlib's font and the characters in it: Latin, Greek, Cyrillic, Arabic, Hebrew and most signs."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    path = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"))
    return path, frozenset(FT2Font(path).get_charmap())


@lru_cache(maxsize=1)
def _wide_font() -> str | None:
    for name in _WIDE_FONTS:
        try:
            return str(ImageFont.truetype(name, 12).path)
        except OSError:
            continue
    return None


_truetype = lru_cache(maxsize=32)(ImageFont.truetype)


def _font(text: str, size: int, bold: bool) -> ImageFont.FreeTypeFont:
    return _truetype(str(font_file(text, bold)), size)
