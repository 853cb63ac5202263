"""Text in pictures: one line in any language, shortened to the room there is."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageDraw, ImageFont

# usual fonts of Linux, macOS and Windows with the Chinese, Japanese and Korean that DejaVu Sans lacks
_WIDE = "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Arial Unicode MS", "Microsoft YaHei"


@lru_cache(maxsize=1)
def families() -> list[str]:
    """Return the names of DejaVu Sans, which comes with matplotlib, and of what the system has for wide characters."""
    from matplotlib.font_manager import fontManager

    installed = fontManager.get_font_names()
    return ["DejaVu Sans", *(name for name in _WIDE if name in installed)]


@lru_cache(maxsize=2)
def shipped(name: str) -> str | None:
    """Return the path of a font that comes with matplotlib, without importing it, which takes half a second; None where
    a distribution keeps it elsewhere."""
    spec = find_spec("matplotlib")
    path = Path((spec and spec.origin) or "").with_name("mpl-data") / "fonts" / "ttf" / name
    return str(path) if path.is_file() else None


@lru_cache(maxsize=64)
def _font(size: int, bold: bool, wide: bool) -> ImageFont.FreeTypeFont:
    plain = shipped("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
    if plain is not None and not wide:
        return ImageFont.truetype(plain, size)
    from matplotlib.font_manager import FontProperties, findfont

    properties = FontProperties(family=families()[-1 if wide else 0], weight="bold" if bold else "normal")
    return ImageFont.truetype(str(findfont(properties)), size)


def font_for(text: str, size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return a font `size` pixels high that has the characters of `text`, as far as one is installed."""
    return _font(size, bold, wide=max(text, default="") >= "\u2e80")


def shorten(text: str, size: int, bold: bool, room: float) -> str:
    """Return `text` as one printable line, or its two ends around an ellipsis when it is wider than `room` pixels."""
    # file names can hold line breaks and bytes that are not text
    text = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    font = font_for(text, size, bold)

    def ends(keep: int) -> str:
        return text[: keep - keep // 2] + "…" + text[len(text) - keep // 2 :]

    if font.getlength(text) <= room:
        return text
    return ends(bisect_right(range(1, len(text)), room, key=lambda keep: font.getlength(ends(keep))))


def write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, ink: str, *, bold: bool = False, room: int
) -> None:
    """Draw `text` right of `at` and centred in height; text wider than `room` pixels loses its middle."""
    text = shorten(text, size, bold, room)
    draw.text(at, text, fill=ink, font=font_for(text, size, bold), anchor="lm")
