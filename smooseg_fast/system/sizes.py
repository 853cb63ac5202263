"""Read and write sizes in bytes as people do."""

from __future__ import annotations

import re

from ..errors import UserError

_UNITS = {
    f"{letter}{i}": base**power for power, letter in enumerate("KMGT", 1) for i, base in (("", 1000), ("I", 1024))
}


def parse_size(text: str, argument: str) -> int:
    """Read a size -> bytes: "50GB" is 50e9, "50GiB" is 50 * 2**30.

    UserError, naming `argument`, unless `text` is a number above 0 with a unit.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]I?)B\s*", str(text).upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not size:
        raise UserError(
            f"{argument} {text}: no size; give a number above 0 with its unit, such as 50GB, 500MB or 1.5TiB"
        )
    return size


def readable(nbytes: int) -> str:
    """`nbytes` as text with a unit, such as 1.5 GB."""
    unit, size = next(
        ((unit, size) for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if nbytes >= size), ("kB", 1e3)
    )
    return f"{nbytes / size:.1f} {unit}"
