"""Outlines of regions as polygons with holes, in pixels, degrees or the units of a map.

Regions are traced along the sides of pixels. --simplify removes corners by the area that they enclose (Visvalingam and
Whyatt 1993), over all regions of an image at once: neighbours keep their common borders, so that neither gaps nor
overlaps open, and no region or hole vanishes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..datasets import IGNORE
from ..errors import UserError
from ..segment.names import as_hex
from .folder import Segmented
from .job import Job
from .place import INSTALL

PACKAGES = ("rasterio", "shapely")
TOGETHER = 20_000  # regions that are written at a time
PIXELS_NOTE = "coordinates are pixels, y down: the images lie on no map"


@dataclass(frozen=True)
class Regions:
    """The regions of an image: shapely's `polygons` [N] in pixels (column, row) from the outer corner of the first one,
    their `labels` uint8 [N], and their areas in `pixels` int64 [N] before they were simplified."""

    polygons: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray

    def parts(self) -> Iterator[Regions]:
        """The same, TOGETHER at a time."""
        for first in range(0, len(self.polygons), TOGETHER):
            part = slice(first, first + TOGETHER)
            yield Regions(self.polygons[part], self.labels[part], self.pixels[part])


def require(*packages: str) -> None:
    """UserError where one of these packages is missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"--format: polygons need {' and '.join(missing)}; {INSTALL}")


def regions_of(image: Segmented, job: Job) -> Regions:
    """The regions of an image that are not left out. Pixels of a region share sides, not corners alone."""
    import shapely
    from rasterio.features import shapes

    traced = [
        (shapely.Polygon(shape["coordinates"][0], shape["coordinates"][1:]), label)
        for shape, label in shapes(image.labels, mask=image.labels != IGNORE, connectivity=4)
    ]
    polygons = np.array([polygon for polygon, _ in traced], object)
    labels = np.array([label for _, label in traced], np.uint8)
    pixels = np.rint(shapely.area(polygons)).astype(np.int64)
    kept = pixels >= job.min_area
    polygons, labels, pixels = polygons[kept], labels[kept], pixels[kept]
    polygons = with_common_corners(polygons, image.labels.shape)
    if job.simplify and len(polygons):
        polygons = shapely.coverage_simplify(polygons, job.simplify)
    return Regions(polygons, labels, pixels)


def with_common_corners(polygons: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Polygons [N] along the sides of pixels, with a corner also where a neighbour has one, as where a third region
    begins: other coordinates, or a simplification elsewhere, then open no gap between them. size: (height, width)."""
    import shapely

    corner = np.zeros((size[0] + 1, size[1] + 1), bool)
    columns, rows = shapely.get_coordinates(polygons).astype(np.int64).T
    corner[rows, columns] = True
    parts = [polygons[:0]]
    for first in range(0, len(polygons), TOGETHER):
        dense = shapely.segmentize(polygons[first : first + TOGETHER], 1.0)  # a point at every pixel
        kind, points, (rings, ends) = shapely.to_ragged_array(dense)
        points = np.rint(points)
        kept = corner[points[:, 1].astype(np.int64), points[:, 0].astype(np.int64)]
        rings = np.concatenate(([0], np.cumsum(kept)))[rings]
        parts.append(shapely.from_ragged_array(kind, points[kept], (rings, ends)))
    return np.concatenate(parts)


def oriented(polygons: np.ndarray) -> np.ndarray:
    """Polygons with outer rings counterclockwise where y points up, and holes clockwise, as RFC 7946 has them."""
    import shapely

    return shapely.orient_polygons(polygons)


def properties(image: Segmented, regions: Regions, job: Job) -> dict[str, list[Any]]:
    """The columns of the table of regions. The area is in square units of the map, None where it has none."""
    groups = [job.groups[label] for label in regions.labels]
    pixel = None if image.place is None else image.place.pixel_area
    return {
        "image": [image.name] * len(groups),
        "group": [group.number for group in groups],
        "name": [group.name for group in groups],
        "color": [as_hex(group.colour) for group in groups],
        "pixels": regions.pixels.tolist(),
        "area": [None if pixel is None else n * pixel for n in regions.pixels.tolist()],
    }
