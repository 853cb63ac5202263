"""Sizes in bytes as people write and read them."""

from __future__ import annotations

import re

from ..errors import UserError

_UNITS = {
    f"{letter}{i}": base**power for power, letter in enumerate("KMGT", 1) for i, base in (("", 1000), ("I", 1024))
}


def parse_size(text: str, argument: str) -> int:
    """Bytes: "50GB" is 50e9, "50GiB" is 50 * 2**30. UserError, naming `argument`, for what is no size, or none above 0."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]I?)B\s*", str(text).upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not size:
        raise UserError(
            f"{argument} {text}: no size; give a number above 0 with its unit, such as 50GB, 500MB or 1.5TiB"
        )
    return size


def readable(nbytes: int) -> str:
    """With a unit."""
    unit, size = next(
        ((unit, size) for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if nbytes >= size), ("kB", 1e3)
    )
    return f"{nbytes / size:.1f} {unit}"
