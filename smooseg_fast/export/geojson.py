"""GeoJSON (RFC 7946): a feature for each region, in degrees where images lie on a map, else in pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import UserError
from .folder import Segmented
from .job import Extras, Job
from .polygons import PACKAGES, PIXELS_NOTE, oriented, properties, regions_of, require

DIGITS = 8  # of a degree: a millimetre


def write(job: Job, target: Path) -> Extras:
    """Write the regions of all images to `target`, one image at a time in memory.

    UserError where some images lie on a map and others do not, because one collection has one kind of coordinates.
    """
    require(*PACKAGES)
    count = 0
    first: Segmented | None = None
    with open(target, "w", encoding="ascii") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for image in job.images:
            first = first or image
            if (first.place is None) != (image.place is None):
                on, off = (image, first) if first.place is None else (first, image)
                raise UserError(f"{off.name}: has no place on a map, but {on.name} has; predict them into two folders")
            for feature in features_of(image, job):
                file.write("," * (count > 0) + "\n" + feature)
                count += 1
        file.write("\n]}\n")
    job.require_regions(count)
    degrees = "coordinates are longitude and latitude (WGS 84)"
    return Extras(notes=(f"{count:,} regions", PIXELS_NOTE if first is None or first.place is None else degrees))


def features_of(image: Segmented, job: Job) -> Iterator[str]:
    """The regions of an image as JSON."""
    import shapely

    place = image.place
    for regions in regions_of(image, job).parts():
        polygons = regions.polygons
        if place is not None:
            polygons = shapely.transform(polygons, lambda points: np.round(place.to_degrees(points), DIGITS))
        columns = properties(image, regions, job)
        for row, geometry in zip(zip(*columns.values()), shapely.to_geojson(oriented(polygons))):
            values = json.dumps(dict(zip(columns, row)))
            yield f'{{"type": "Feature", "properties": {values}, "geometry": {geometry}}}'
