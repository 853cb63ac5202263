"""`smooseg export`: write predictions as a file that annotation tools, maps and scripts open."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from .command import run
from .errors import UserError
from .system.commandline import parse, quoted
from .system.fields import Bounds, Value, flag
from .system.files import ABANDONED_S, size_of, sweep, write_atomic
from .system.signals import with_kept
from .system.sizes import readable
from .system.stores import File, Remote, place

if TYPE_CHECKING:
    from .export.formats import Format
    from .export.job import Extras

EXPORTS = "exports"  # the folder inside that of predictions
OPTIONS = {"instances": False, "simplify": 0.0, "min_area": 1}  # and the values at which they change nothing


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the predictions of smooseg predict as one file for another tool, with the groups' names and colours.

    coco: COCO annotations with run-length masks. cvat: a zip for CVAT's "Segmentation mask 1.1". labelstudio: tasks
    with brush masks, and the labelling interface. geojson and gpkg: polygons with holes, on the map where images are
    GeoTIFF, else in pixels. csv: pixels, shares and areas of each group, by image and in all. npz: NumPy arrays.
    """

    predictions: Annotated[str, Value("FOLDER", usual=True, stores=True)]
    """The --out folder of smooseg predict, on a disk or in a store."""
    format: Literal["coco", "cvat", "labelstudio", "geojson", "gpkg", "csv", "npz"]
    """Kind of file to write."""
    out: Annotated[str | None, Value("PATH", stores=True)] = None
    """File to write, or a folder for it [exports in the folder of predictions]."""
    instances: bool = False
    """Make each connected region an annotation of its own (coco), instead of all pixels of a group in an image."""
    simplify: Annotated[float, Bounds(0.0, 1000.0)] = 0.0
    """Tolerance in pixels at which outlines lose corners (geojson, gpkg). Neighbours keep their common borders."""
    min_area: Annotated[int, Bounds(1)] = 1
    """Pixels below which a region is left out (geojson, gpkg, and coco with --instances)."""


def main(args: Sequence[str]) -> None:
    config = parse(ExportConfig, args, "export")
    from .export.folder import PredictionFolder
    from .export.formats import FORMATS
    from .export.job import Job

    form = FORMATS[config.format]
    require_options(config, form.options)
    folder = PredictionFolder(place(config.predictions))
    out = out_of(config, form)
    job = Job(folder, **{name: getattr(config, name) for name in OPTIONS})
    files = [out]
    sweep(out.parent, older=ABANDONED_S)
    try:
        extras: list[Extras] = []
        write_atomic(out, lambda target: extras.append(form.write(job, target)))
        for end, text in extras[0].files.items():
            files.append(write_atomic(out.with_name(out.stem + end), text))
    except KeyboardInterrupt as stop:
        raise with_kept(stop, f"{out} is as it was before; the same command starts over") from None
    count = f"{len(folder) - folder.skipped - extras[0].left_out} of {len(folder)} images"
    print(f"exported   {count} and {len(job.groups)} groups as {form.title}")
    for file in files:
        print(f"written    {file} ({readable(size_of(file))})")
    for note in extras[0].notes:
        print(f"note       {note}")
    if form.opens_images and folder.not_files:
        first, rest = folder.not_files[0], len(folder.not_files) - 1
        more = f" and {rest} more" if rest else ""
        print(f"note       {first!r}{more}: no file has this name, so other tools cannot open it")
    if not folder.finished:
        print("note       predict has not ended in this folder: resume it, then export again for the other images")
    above, stem = quoted(str(folder.root.parent)), out.with_name(out.stem)
    use = form.use_in_stores if form.use_in_stores and isinstance(folder.root, Remote) else form.use
    for begin, line in zip(["next", *[""] * len(use)], use):
        print(f"{begin:10} " + line.format(out=str(out), stem=stem, root=str(folder.root), above=above))


def require_options(config: ExportConfig, heeded: frozenset[str]) -> None:
    """UserError for an option that the format would not heed."""
    for name, neutral in OPTIONS.items():
        if getattr(config, name) != neutral and name not in heeded:
            raise UserError(f"{flag(name)}: does nothing to {config.format}; leave it out")
    if config.format == "coco" and config.min_area > 1 and not config.instances:
        raise UserError("--min-area: coco has regions with --instances only; add it, or leave out --min-area")


def out_of(config: ExportConfig, form: Format) -> File:
    """The file to write. UserError where its suffix is that of something else."""
    if config.out is None:
        return place(config.predictions) / EXPORTS / form.file
    out = place(config.out)
    if (not out.suffix) if isinstance(out, Remote) else out.is_dir():
        return out / form.file
    suffix = Path(form.file).suffix
    if out.suffix.lower() != suffix:
        raise UserError(f"--out {out}: {config.format} is a {suffix} file; give {out.with_suffix(suffix)}")
    return out


if __name__ == "__main__":
    sys.exit(run(main))
