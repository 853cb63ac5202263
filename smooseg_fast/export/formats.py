"""The table of formats: which module writes each, which options it takes, and what to do with the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import arrays, coco, cvat, geojson, geopackage, labelstudio, tables
from .job import Extras, Job


@dataclass(frozen=True)
class Format:
    """A format of exports.

    Attributes:
        title: what people call it.
        file: the usual name, whose suffix every file of the format has.
        write: writes the images of a job to a path.
        use: lines that say how to open the files, with the texts {out}, {stem} (`out` without its suffix), {root} (the
            folder of images) and {above} (the folder that holds it) filled in.
        options: the settings of a job that it heeds.
        opens_images: whether its readers look for the images by their names.
        use_in_stores: `use` where the images lie in a store; None for the same.
    """

    title: str
    file: str
    write: Callable[[Job, Path], Extras]
    use: tuple[str, ...]
    options: frozenset[str] = frozenset()
    use_in_stores: tuple[str, ...] | None = None
    opens_images: bool = False


OUTLINES = frozenset({"simplify", "min_area"})
QGIS = "in QGIS: Layer > Add Layer > Add Vector Layer, or drop the file on the map"
FORMATS = {
    "coco": Format(
        title="COCO annotations",
        file="coco.json",
        write=coco.write,
        use=(
            "in Python: pycocotools.coco.COCO({out!r}); file names are relative to {root}",
            "in FiftyOne: fo.Dataset.from_dir(dataset_type=fo.types.COCODetectionDataset, data_path={root!r}, "
            'labels_path={out!r}, label_types="segmentations")',
        ),
        options=frozenset({"instances", "min_area"}),
        opens_images=True,
    ),
    "cvat": Format(
        title="a CVAT segmentation mask",
        file="cvat.zip",
        write=cvat.write,
        use=(
            "in CVAT: new task > Constructor > Raw, paste {stem}_labels.json, and add the images in {root}, folders "
            "as one .zip",
            'then in the menu of its job: Upload annotations > "Segmentation mask 1.1" > {out}',
        ),
    ),
    "labelstudio": Format(
        title="Label Studio predictions",
        file="labelstudio.json",
        write=labelstudio.write,
        use=(
            "start it with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true "
            "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={above} label-studio start",
            "in a new project: Settings > Labeling Interface > Code, paste {stem}.xml",
            "Settings > Cloud Storage > Add Source Storage > Local files, {root}, and save it without a sync",
            "then Import > {out}",
        ),
        use_in_stores=(
            "in a new project: Settings > Labeling Interface > Code, paste {stem}.xml",
            "Settings > Cloud Storage > Add Source Storage, {root}, and save it without a sync; then Import > {out}",
        ),
        opens_images=True,
    ),
    "geojson": Format("GeoJSON polygons", "polygons.geojson", geojson.write, (QGIS,), OUTLINES),
    "gpkg": Format("GeoPackage polygons", "polygons.gpkg", geopackage.write, (QGIS,), OUTLINES),
    "csv": Format(
        title="tables",
        file="images.csv",
        write=tables.write,
        use=("in a spreadsheet, or pandas.read_csv({out!r}); {stem}_groups.csv has a row for each group",),
    ),
    "npz": Format(
        title="NumPy arrays",
        file="labels.npz",
        write=arrays.write,
        use=('in Python: numpy.load({out!r})["labels/NAME"] for each NAME in ["images"]; also names and colours',),
    ),
}
