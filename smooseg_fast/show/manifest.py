"""The list of all images of a prediction: the mask of each, how long it took, or why there is none."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..datasets.imageerror import ImageError
from ..system.files import write_atomic
from .items import Item
from .predictions import MANIFEST, MASKS, Predictions

COLUMNS = ("image", "mask", "seconds", "error")


def write_manifest(folder: Predictions, items: Iterable[Item], skipped: Mapping[str, ImageError]) -> Path:
    """Write a line for each image, in their order: its name, its mask relative to `folder`, the seconds from its file
    to its labels, and the reason why it was skipped. An image that a stop came before has a name alone."""
    seconds = folder.seconds()

    def write(path: Path) -> None:
        # a file name may hold bytes that are not text
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(COLUMNS)
            for item in items:
                if item.name in skipped:
                    lines.writerow((item.name, "", "", skipped[item.name].reason))
                elif item.stem in seconds:
                    mask = f"{MASKS}/{item.stem}{folder.mask(item).suffix}"
                    lines.writerow((item.name, mask, f"{seconds[item.stem]:.3f}", ""))
                else:
                    lines.writerow((item.name, "", "", ""))

    return write_atomic(folder.path / MANIFEST, write)
