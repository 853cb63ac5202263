"""The flags that say how image files become pictures: --intensity, --bands and --pages."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Annotated, Any

from ..errors import UserError
from .fields import Bounds, Value


def legal_intensity(words: tuple[str, ...], flag: str) -> None:
    """UserError unless it is data, image, or two numbers in order."""
    if words in (("data",), ("image",)):
        return
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[0] >= numbers[1]:
        legal = "give data, image, or two numbers LOW HIGH, the lower one first"
        raise UserError(f"{flag}: {legal}; got {' '.join(map(str, words)):.80}")


def legal_bands(bands: tuple[int, ...] | None, flag: str) -> None:
    """UserError unless there are three, or one."""
    if bands is not None and len(bands) not in (1, 3):
        raise UserError(f"{flag}: give three bands for red, green and blue, or one; got {' '.join(map(str, bands))}")


def legal_pages(word: str, flag: str) -> None:
    """UserError unless it is all or a number from 1."""
    if word != "all" and not (word.isascii() and word.isdigit() and 1 <= int(word[:10]) < 2**31):
        raise UserError(f"{flag}: give all, or the number of a page from 1; got {word:.80}")


Intensity = Annotated[tuple[str, ...], Value("LOW HIGH"), legal_intensity]
Bands = Annotated[tuple[int, ...], Value("BAND"), Bounds(1, 1 << 16), legal_bands]
Pages = Annotated[str, Value("all|N"), legal_pages]


def intensity_words(value: Any) -> Any:
    """--intensity as the command line has it: a word is a list of one, and numbers are words."""
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)):
        return value
    return tuple(str(word) if isinstance(word, Real) and not isinstance(word, bool) else word for word in words)


def band_numbers(value: Any) -> Any:
    """--bands as the command line has it: a number is a list of one."""
    return (value,) if isinstance(value, Integral) else tuple(value) if isinstance(value, list) else value


def page_word(value: Any) -> Any:
    """--pages as the command line has it."""
    return str(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


WORDS = {"intensity": intensity_words, "bands": band_numbers, "pages": page_word}  # for values from Python
