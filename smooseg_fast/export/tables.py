"""CSV: a row for every group of every image, and a table of the groups over all images."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets import IGNORE
from ..segment.names import as_hex
from .folder import BAND, SURE, Segmented
from .job import Extras, Job

IMAGES = ("image", "group", "name", "pixels", "share", "area", "unit", "confidence")
GROUPS = ("group", "name", "colour", "images", "pixels", "share", "area", "unit", "confidence")


def write(job: Job, target: Path) -> Extras:
    """Write the table of images to `target`, one image at a time in memory -> that of the groups.

    A share is of the pixels with data, of the image or of all images. Areas are in square units of the map, empty for
    images on none and where images have several units. The confidence is the mean over the pixels, 0 to 1, empty where
    predict wrote none.
    """
    pixels, images, sums = np.zeros(256, np.int64), np.zeros(256, np.int64), np.zeros(256)
    areas, units, sure = np.zeros(256), set(), True
    with open(target, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(IMAGES)
        for image in job.images:
            counts, confidence = measured(image)
            pixels += counts
            images += counts > 0
            sums += 0 if confidence is None else confidence
            sure &= confidence is not None
            place = image.place
            pixel, unit = (None, "") if place is None or place.pixel_area is None else (place.pixel_area, place.unit)
            areas += counts * (pixel or 0)
            units.add(unit)
            for k in np.flatnonzero(counts).tolist():
                mean = None if confidence is None else confidence[k] / counts[k]
                row = figures(counts[k], counts.sum(), None if pixel is None else counts[k] * pixel, unit, mean)
                table.writerow([image.name, k, job.groups[k].name, *row])
    buffer = io.StringIO(newline="")
    table = csv.writer(buffer)
    table.writerow(GROUPS)
    unit = units.pop() if len(units) == 1 else ""
    for k, group in job.groups.items():
        mean = sums[k] / pixels[k] if sure and pixels[k] else None
        row = figures(pixels[k], pixels.sum(), areas[k] if unit else None, unit, mean)
        table.writerow([k, group.name, as_hex(group.colour), images[k], *row])
    return Extras({"_groups.csv": buffer.getvalue()})


def figures(pixels: int, total: int, area: float | None, unit: str, confidence: float | None) -> list[Any]:
    """The cells of a row from its pixels on."""
    share = f"{pixels / total:.6f}" if total else ""
    square = f"square {unit}" if unit else ""
    return [
        pixels,
        share,
        "" if area is None else f"{area:.10g}",
        square,
        "" if confidence is None else f"{confidence:.4f}",
    ]


def measured(image: Segmented) -> tuple[np.ndarray, np.ndarray | None]:
    """(pixels int64 [256] of each label, the sum float64 [256] of their confidences or None); none of IGNORE."""
    counts, sums, confidence = np.zeros(256, np.int64), np.zeros(256), image.confidence()
    for top in range(0, len(image.labels), BAND):  # because bincount takes eight bytes a label
        rows = slice(top, top + BAND)
        labels = image.labels[rows].ravel()
        counts += np.bincount(labels, minlength=256)
        if confidence is not None:
            sums += np.bincount(labels, confidence[rows].ravel(), minlength=256) / SURE
    counts[IGNORE] = sums[IGNORE] = 0
    return counts, None if confidence is None else sums
