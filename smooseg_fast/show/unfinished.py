"""Keeps the finished part of a map while it is segmented: tiles and a journal, in a folder of their own, so that a stop
or a kill loses minutes at most.

The journal names the checkpoint, the settings and the image. Another one of these starts over. For predictions in a
store, the folder lies in the cache of this machine.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shutil
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..system.files import default_cache, finite
from ..system.outfolder import Journal
from ..system.stores import File
from .cog import Places
from .looks import Band

UNFINISHED = ".unfinished"  # the folder of all maps under way, next to the masks
CACHED = "unfinished"  # that of predictions in stores, in the cache
JOURNAL, FORMAT = "journal.jsonl", 1


@dataclass
class Kept:
    """The finished rows of tiles of one file: `path` holds them packed, `rows` tells where they lie in it."""

    path: Path
    rows: list[Places]
    name: str
    journal: Journal

    def note(self, row: int, places: Places) -> None:
        """Add a row of tiles, whose bytes are in the file."""
        self.journal.append({"tiles": self.name, "row": row, "places": places})


class Unfinished:
    """The folder of one map. `key`: everything that decides its files, ready for JSON."""

    def __init__(self, folder: Path, key: dict[str, Any]):
        self.folder, self.journal = folder, Journal(folder / JOURNAL)
        first: dict[str, Any] = finite({"format": FORMAT, "key": key})
        self._lines = self.journal.read(is_line)
        if not self._lines or self._lines[0] != first:
            self.start_over(first)
        else:
            self.journal.rewrite(self._lines)  # a line that a kill cut short would glue to the next one
        self._first = first

    def start_over(self, first: dict[str, Any] | None = None) -> None:
        """Forget what is done."""
        self.remove()
        self._lines = [self._first if first is None else first]
        self.journal.rewrite(self._lines)

    def kept(self, name: str) -> Kept:
        """The rows of tiles of a file that are done, from the first one to the first gap."""
        by_row = {line["row"]: line["places"] for line in self._lines if line.get("tiles") == name}
        rows: list[Places] = []
        while len(rows) in by_row:
            rows.append(by_row[len(rows)])
        return Kept(self.folder / name, rows, name, self.journal)

    def bands(self) -> list[Band]:
        """The look at the codes that have passed, by their rows."""
        bands = {line["band"]: band_of(line) for line in self._lines if "band" in line}
        widths = {None if band.labels is None else band.labels.shape[1] for band in bands.values()}
        return [*bands.values()] if len(widths) == 1 else []

    def see(self, band: Band) -> None:
        """Keep the look at a band of codes."""
        labels = band.labels
        packed = (
            None if labels is None else [list(labels.shape), base64.b85encode(zlib.compress(labels.tobytes())).decode()]
        )
        self.journal.append(
            {"band": band.row, "rows": band.rows, "margins": band.margins, "count": band.count, "labels": packed}
        )

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


def is_line(line: dict[str, Any]) -> bool:
    """Whether a line of the journal is one; its tiles are verified as they are read."""
    if "tiles" in line:
        places = line.get("places")
        return type(line.get("row")) is int and isinstance(places, list) and all(map(is_place, places))
    return is_band(line) if "band" in line else "key" in line


def is_band(line: dict[str, Any]) -> bool:
    with suppress(KeyError, TypeError, ValueError, zlib.error):
        band = band_of(line)
        numbers = all(type(number) is int and number >= 0 for number in (band.row, band.rows, band.count))
        flat = band.labels is None or band.labels.ndim == 2
        return numbers and flat and all(isinstance(margin, float) for margin in band.margins)
    return False


def is_place(place: Any) -> bool:
    return isinstance(place, list) and len(place) == 2 and all(type(n) is int and n >= 0 for n in place)


def band_of(line: dict[str, Any]) -> Band:
    labels = None
    if line["labels"] is not None:
        shape, packed = line["labels"]
        data = zlib.decompressobj().decompress(base64.b85decode(packed), math.prod(shape) + 1)
        labels = np.frombuffer(data, np.uint8).reshape(shape)
    return Band(line["band"], line["rows"], labels, line["margins"], line["count"])


def home_of(predictions: File) -> Path:
    """The folder of all maps under way of the predictions in a folder, on this disk."""
    if isinstance(predictions, Path):
        return predictions / UNFINISHED
    url = str(predictions).rstrip("/")
    return default_cache() / CACHED / hashlib.sha256(url.encode()).hexdigest()[:16]


def of_map(predictions: File, stem: str, keys: Sequence[Any]) -> Unfinished:
    """Opens the finished part of a map in a folder of predictions. keys: everything that decides its files."""
    return Unfinished(home_of(predictions) / stem, {"keys": list(keys)})


def forget(predictions: File) -> None:
    """Remove what earlier commands left of maps that are done or gone."""
    shutil.rmtree(home_of(predictions), ignore_errors=True)
