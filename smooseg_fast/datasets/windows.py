"""Large maps in a data set: each counts as many images, its windows, which are read from the disk one by one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..system.ahead import ahead
from ..system.stores import File
from . import gdal, raster
from .base import Dataset
from .evenly import evenly
from .folder import ImageFolder
from .imageerror import ImageError
from .reading import Reading, Rectangle

WINDOW = 2048  # pixels of a window's side, at most
MAPS = (".tif", ".tiff", *gdal.SUFFIXES)
LOOKED_AT = 32  # files to see whether there are maps among them
ASKED = 16  # files of a store whose tags are read at the same time

Size = tuple[int, int]


def with_windows(dataset: Dataset) -> Dataset:
    """The same images, but every map that is read in windows is several of them, which cover it side by side.

    A window is named by its row and column: a#2-07.tif lies second from the top in a.tif, seventh from the left.
    """
    if not isinstance(dataset, ImageFolder):
        return dataset
    windows = [windows_of(size) for size in sizes_of_maps(dataset.images, dataset.reading)]
    maps = sum(len(of_image) > 1 for of_image in windows)
    if not maps:
        return dataset
    places = [(index, place) for index, of_image in enumerate(windows) for place in range(len(of_image))]
    pieces = sum(len(of_image) for of_image in windows if len(of_image) > 1)
    note = f"{maps} of {len(dataset)} images are large maps, seen as {pieces} windows of at most {WINDOW} pixels a side"
    names = [window_names(name, of_image) for name, of_image in zip(dataset.names, windows)]
    return replace(
        dataset,
        names=tuple(names[index][place] for index, place in places),
        images=tuple(dataset.images[index] for index, _ in places),
        labels=tuple(dataset.labels[index] for index, _ in places),
        pages=tuple(dataset.pages[index] for index, _ in places) if dataset.pages else (),
        windows=tuple(windows[index][place] for index, place in places),
        notes=(*dataset.notes, note),
    )


def with_note_of_maps(dataset: Dataset) -> Dataset:
    """The same images, with a note where there are large maps among a few of them: they are seen small."""
    if not isinstance(dataset, ImageFolder):
        return dataset
    looked_at = evenly([file for file in dataset.images if file.suffix.lower() in MAPS], LOOKED_AT)
    maps = sum(size is not None for size in sizes_of_maps(looked_at, dataset.reading))
    if not maps:
        return dataset
    some = f"{maps} of {len(looked_at)} TIFFs and other maps that were looked at are large"
    note = f"{some}: seen whole, at the size of a square; --scale native learns from all their pixels"
    return replace(dataset, notes=(*dataset.notes, note))


def sizes_of_maps(files: Sequence[File], reading: Reading) -> list[Size | None]:
    """(height, width) of the maps that are read in windows, None of other files. Asks a store for the tags of TIFFs, of
    several at a time."""

    def size(file: File) -> Size | None:
        with suppress(ImageError, OSError):  # whoever reads it learns of it
            local = isinstance(file, Path)
            if (local or file.suffix.lower() in MAPS) and raster.in_windows(file, reading, sparse=not local):
                return raster.size_of(file, reading, sparse=not local)
        return None

    if all(isinstance(file, Path) for file in files):
        return [*map(size, files)]
    return [*ahead(size, files, threads=ASKED, waiting=4 * ASKED)]


def windows_of(size: Size | None) -> Sequence[Rectangle | None]:
    """The windows of a map, row by row, of nearly equal sizes; [None] of another image."""
    if size is None:
        return [None]
    (tops, bottoms), (lefts, rights) = map(edges, size)
    rows, columns = zip(tops, bottoms), [*zip(lefts, rights)]
    return [Rectangle(top, left, bottom, right) for top, bottom in rows for left, right in columns]


def edges(length: int) -> tuple[list[int], list[int]]:
    """The starts and ends of pieces of at most WINDOW."""
    count = -(-length // WINDOW)
    places = [place * length // count for place in range(count + 1)]
    return places[:-1], places[1:]


def window_names(name: str, windows: Sequence[Rectangle | None]) -> list[str]:
    """The names of the windows of the image `name`."""
    path, tops = Path(name), sorted({window.top for window in windows if window is not None})
    lefts = sorted({window.left for window in windows if window is not None})
    if not tops:
        return [name]
    numbers = [(tops.index(window.top) + 1, lefts.index(window.left) + 1) for window in windows if window is not None]
    down, across = len(str(len(tops))), len(str(len(lefts)))
    return [path.with_name(f"{path.stem}#{y:0{down}}-{x:0{across}}{path.suffix}").as_posix() for y, x in numbers]
