"""Large maps in a data set: each counts as many images, its windows, which are read from the disk one by one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from . import raster
from .base import Dataset
from .folder import ImageFolder
from .images import ImageError, image_size
from .reading import Reading, Rectangle

WINDOW = 2048  # pixels of a window's side, at most


def with_windows(dataset: Dataset) -> Dataset:
    """The same images, but every map that is read in windows is several of them, which cover it side by side.

    A window is named by its row and column: a#2-07.tif lies second from the top in a.tif, seventh from the left.
    """
    if not isinstance(dataset, ImageFolder):
        return dataset
    windows = [windows_of(file, dataset.reading) for file in dataset.images]
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


def windows_of(file: object, reading: Reading) -> Sequence[Rectangle | None]:
    """The windows of a map, row by row, of nearly equal sizes; [None] of another image."""
    if isinstance(file, Path):
        with suppress(ImageError, OSError):  # whoever reads it learns of it
            if raster.in_windows(file, reading):
                (tops, bottoms), (lefts, rights) = map(edges, image_size(file))
                rows, columns = zip(tops, bottoms), [*zip(lefts, rights)]
                return [Rectangle(top, left, bottom, right) for top, bottom in rows for left, right in columns]
    return [None]


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
