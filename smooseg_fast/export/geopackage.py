"""GeoPackage: a layer of regions for each coordinate system of the images, and one in pixels for images on no map."""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from .job import Extras, Job
from .place import Place
from .polygons import PACKAGES, PIXELS_NOTE, TOGETHER, oriented, properties, regions_of, require

PIXELS = "pixels"  # the layer of images that lie on no map: y points down


class Layer:
    """A layer of the file at `path`, which is written in batches."""

    def __init__(self, path: Path, name: str, crs: str | None):
        self.path, self.name, self.crs = path, name, crs
        self._written = 0
        self._polygons: list[np.ndarray] = []
        self._columns: dict[str, list[Any]] = defaultdict(list)

    def add(self, polygons: np.ndarray, columns: dict[str, list[Any]]) -> None:
        self._polygons.append(polygons)
        for name, values in columns.items():
            self._columns[name] += values
        if len(self._columns["image"]) >= TOGETHER:
            self.flush()

    def flush(self) -> int:
        """Write what is left -> how many regions the layer has."""
        import shapely
        from pyogrio.raw import write

        polygons = np.concatenate([*self._polygons, np.array([], object)])
        if len(polygons):
            kinds = {"group": np.int32, "pixels": np.int64, "area": np.float64}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "'crs' was not provided")
                write(
                    self.path,
                    geometry=shapely.to_wkb(polygons),
                    field_data=[np.array(values, kinds.get(name, object)) for name, values in self._columns.items()],
                    fields=list(self._columns),
                    layer=self.name,
                    driver="GPKG",
                    geometry_type="Polygon",
                    crs=self.crs,
                    append=self._written > 0,
                )
        self._written += len(polygons)
        self._polygons, self._columns = [], defaultdict(list)
        return self._written


def write(job: Job, target: Path) -> Extras:
    """Write the regions of all images to `target`, in batches."""
    require(*PACKAGES, "pyogrio")
    import shapely

    layers: dict[str, Layer] = {}
    for image in job.images:
        place, layer = image.place, layer_of(layers, target, image.place)
        for regions in regions_of(image, job).parts():
            polygons = regions.polygons if place is None else shapely.transform(regions.polygons, place.to_map)
            layer.add(oriented(polygons), properties(image, regions, job))
    counts = {name: layer.flush() for name, layer in layers.items()}
    job.require_regions(sum(counts.values()))
    notes = [f"layer {name}: {count:,} regions" for name, count in counts.items()]
    return Extras(notes=(*notes, *([PIXELS_NOTE] if PIXELS in layers else [])))


def layer_of(layers: dict[str, Layer], target: Path, place: Place | None) -> Layer:
    """The layer of images at this place, which is added if it is new."""
    name = PIXELS if place is None else place.name.replace(":", "_")
    if name not in layers:
        layers[name] = Layer(target, name, None if place is None else place.crs.to_wkt())
    return layers[name]
