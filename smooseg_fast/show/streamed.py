"""Images whose results are written part by part as they come: maps of any size, and probabilities."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import numpy as np

from ..datasets import IGNORE, gdal, raster
from ..datasets.georeference import WORLD_FILES, Georeference, georeference_of
from ..datasets.images import ImageError, read_label, read_picture
from ..datasets.reading import Picture, Reading
from ..datasets.scaled import Scaled
from ..segment.names import Group
from ..segment.parts import parts_at
from ..segment.segmenter import Segmenter
from ..system.ahead import ahead
from ..system.files import open_binary
from ..system.progress import SILENT_S, Bar, say
from ..system.stores import File
from ..system.terminal import printable
from . import cog
from .looks import Look
from .outputs import MapFiles, PhotoFiles, Plan, write_categories
from .report_tiles import Watched
from .unfinished import Unfinished

OVERLAY_PIXELS = 2**24  # an overlay of a larger image is reduced to as many
TIFFS = (".tif", ".tiff")
SHEET_PIXELS = 2**20  # of a map on the sheet
BAND = 512  # rows that are reduced at a time
ASKED = 16  # files of a store whose tags are read at the same time

Shares = dict[str, float]  # group -> share of an image's pixels that show data; empty where none does
Stamp = list[str | int] | None
Options = Mapping[str, Any]  # of `Segmenter.predict`


class Item(Protocol):
    """An image to segment; a `map` gets GeoTIFFs."""

    @property
    def file(self) -> File: ...
    @property
    def name(self) -> str: ...
    @property
    def page(self) -> int | None: ...
    @property
    def map(self) -> bool: ...
    def stamp(self) -> Stamp: ...


class Folder(Protocol):
    """The folder of one number of groups, see `predictions.Predictions`."""

    groups: Sequence[Group]
    colours: np.ndarray

    def unfinished(self, item: Any, folders: Sequence[Any], shape: tuple[int, int]) -> Unfinished: ...
    def mask(self, item: Any) -> Path: ...
    def known(self, item: Any) -> Shares | None: ...
    def plan(self, item: Any, shape: tuple[int, int]) -> Plan: ...
    def look(self) -> Look | None: ...
    def draw(self, item: Any, small: np.ndarray, labels: np.ndarray, look: Look | None) -> None: ...
    def note(self, item: Any, noted: dict[str, Any], shares: Shares) -> Shares: ...
    def flush(self) -> None: ...
    def write(
        self, item: Any, image: np.ndarray, labels: np.ndarray, noted: dict[str, Any], look: Look | None
    ) -> Shares: ...


def go_on() -> None:
    """Lets the work go on."""


def segment_streamed(
    segmenter: Segmenter,
    item: Item,
    folders: Mapping[int, Folder],
    options: Options,
    check: Callable[[], None] = go_on,
) -> dict[int, Shares]:
    """Write the files of a map, or of a photo with probabilities, into each of these folders, by their numbers of
    groups -> the shares in each.

    A map whose names or colours alone changed keeps its labels. One that was stopped in the middle resumes there, and
    gets the same files as without the stop. check: called after every part, may raise to stop. ImageError where the
    image cannot be used.
    """
    started, stamp, reading = time.perf_counter(), item.stamp(), segmenter.checkpoint.reading
    shares = {number: known for number, folder in folders.items() if (known := folder.known(item)) is not None}
    for number in shares:
        mask = cog.recolour(folders[number].mask(item), folders[number].colours)
        write_categories(mask, folders[number].groups)
    with opened_map(item, reading) as opened:
        picture = segmenter.picture(item.file, item.page) if opened is None else segmenter.picture(opened)
        shape = picture.pixels.shape[:2]
        plans = {n: folder.plan(item, (shape[0], shape[1])) for n, folder in folders.items() if n not in shares}
        if not item.map:
            photo_files = {n: PhotoFiles(plan) for n, plan in plans.items()}
            labels = filled(segmenter, picture, photo_files, options, lambda _: check())
            noted = {"stamp": stamp, "seconds": round(time.perf_counter() - started, 4)}
            return {
                n: folder.write(item, picture.pixels, labels[n], noted, folder.look()) for n, folder in folders.items()
            }
        place = georeference_of(item.file, item.page or reading.first_page)
        todo = [folders[number] for number in plans]
        unfinished = todo[0].unfinished(item, todo, (shape[0], shape[1])) if todo else None
        files = map_files(item, plans, place, unfinished)
        rows = min((one.rows for one in files.values()), default=0)
        title = printable(item.name)
        with Bar(total=shape[0], initial=rows, desc=title, unit="row", delay=SILENT_S, leave=False) as bar:

            def passed(bottom: int) -> None:
                bar.update(max(0, bottom - bar.n))
                check()

            counts = filled(segmenter, picture, files, options, passed, unfinished)
        shares |= {number: shares_of(of_labels) for number, of_labels in counts.items()}
        for folder in folders.values():
            folder.draw(item, *map_at(picture, folder.mask(item), OVERLAY_PIXELS), folder.look())
    noted = {"stamp": stamp, "seconds": round(time.perf_counter() - started, 4)}
    shares = {number: folder.note(item, noted, shares[number]) for number, folder in folders.items()}
    for folder in folders.values():
        folder.flush()
    if unfinished is not None:
        unfinished.remove()
    return shares


def map_files(
    item: Item, plans: Mapping[int, Plan], place: Georeference | None, unfinished: Unfinished | None
) -> dict[int, MapFiles]:
    """The files of a map to fill, by their numbers of groups, with the rows of tiles that an earlier command finished.
    Says where it resumes."""
    try:
        files = {number: MapFiles(plan, place, unfinished, number) for number, plan in plans.items()}
    except (zlib.error, ValueError):
        assert unfinished is not None
        say(printable(f"damaged: the finished part of {item.name} is not as it was written; starting it over"))
        unfinished.start_over()
        files = {number: MapFiles(plan, place, unfinished, number) for number, plan in plans.items()}
    rows = min((one.rows for one in files.values()), default=0)
    if rows:
        height = next(iter(plans.values())).shape[0]
        say(printable(f"resumed    {item.name} with {rows:,} of {height:,} rows of pixels done"))
    return files


@contextmanager
def opened_map(item: Item, reading: Reading) -> Iterator[Picture | None]:
    """The picture of a map that is read as it is used; None for others, which are read whole. ImageError where it
    cannot be read."""
    if item.map and raster.in_windows(item.file, reading, item.page):
        with raster.opened(item.file, reading, item.page) as opened:
            yield opened.picture
    else:
        yield None


def maps_among(items: Sequence[Item], reading: Reading) -> list[bool]:
    """Which items lie on the earth, by their tags or a world file, or are read in windows. World files in a store are
    not looked for."""
    folders = {item.file.parent for item in items if isinstance(item.file, Path)}
    worlds = {folder for folder in folders if any(path.suffix.lower() in WORLD_FILES for path in folder.iterdir())}

    def is_map(item: Item) -> bool:
        if item.file.suffix.lower() not in (*TIFFS, *gdal.SUFFIXES) and item.file.parent not in worlds:
            return False
        on_earth = georeference_of(item.file, item.page or reading.first_page, sparse=True) is not None
        return on_earth or raster.in_windows(item.file, reading, item.page, sparse=True)

    def is_map_in_store(item: Item) -> bool:
        with suppress(ImageError):  # whoever reads it learns of it
            return is_map(item)
        return False

    if all(isinstance(item.file, Path) for item in items):
        return [*map(is_map, items)]
    return [*ahead(is_map_in_store, items, threads=ASKED, waiting=4 * ASKED)]


def filled(
    segmenter: Segmenter,
    picture: Picture,
    sinks: Mapping[int, MapFiles | PhotoFiles],
    options: Options,
    check: Callable[[int], None],
    unfinished: Unfinished | None = None,
) -> dict[int, np.ndarray]:
    """Segment a picture into sinks, by their numbers of groups -> what these return at the end. check: called with the
    row below every part."""
    if not sinks:
        return {}
    soft = any(sink.plan.more for sink in sinks.values())
    each = list(sinks.values())
    with ExitStack() as stack:
        for sink in each:
            stack.callback(sink.discard)
        if isinstance(segmenter, Watched) and unfinished is not None:
            segmenter.kept = unfinished
            stack.callback(setattr, segmenter, "kept", None)
        cuts = [segmenter if len(segmenter.grouping) == number else segmenter.at(number) for number in sinks]
        with segmenter.memory("image", options.get("scale"), options.get("short_side")):
            for place, part in parts_at(cuts, picture, soft=soft, rows=[sink.rows for sink in each], **options):
                each[place].put(part)
                check(part.place.bottom)
        return {number: sink.close() for number, sink in sinks.items()}


def map_at(picture: Picture, mask: Path, most: int) -> tuple[np.ndarray, np.ndarray]:
    """A map [h,w,3] and its labels [h,w] at the size of the overview with at most `most` pixels."""
    labels = cog.read_level(mask, most)
    return in_bands(Scaled(picture.pixels, (labels.shape[0], labels.shape[1]), "bilinear")), labels


def shares_of(counts: np.ndarray) -> Shares:
    """The share of every label among pixels with data, from the pixels of each label, int64 [256]."""
    counts = counts[:IGNORE]
    return {str(k): round(float(n / counts.sum()), 6) for k, n in enumerate(counts) if n}


def shown_of(item: Item, mask: Path, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """The image uint8 [h,w,3] and its labels [h,w] for a sheet, read back; maps are reduced. ImageError where one of
    them is damaged."""
    with opened_map(item, reading) as opened:
        picture = opened or read_picture(item.file, reading, item.page)
        return map_at(picture, mask, SHEET_PIXELS) if item.map else (picture.pixels, read_label(mask))


def reduced(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bring an image [H,W,3] and its labels [H,W] to at most OVERLAY_PIXELS, in memory for a band and the result."""
    factor = (OVERLAY_PIXELS / labels.size) ** 0.5
    if factor >= 1:
        return image, labels
    return in_bands(Scaled.by(image, factor, "bilinear")), in_bands(Scaled.by(labels, factor, "nearest"))


def in_bands(scaled: Scaled) -> np.ndarray:
    """The whole of a scaled picture."""
    height, width = scaled.size
    bands = [scaled.window(top, 0, min(BAND, height - top), width) for top in range(0, height, BAND)]
    return np.concatenate(bands)


def checksum(path: Path, start: int) -> int:
    """The CRC-32 of a file, continued from `start`. OSError where it cannot be read."""
    with open_binary(path) as file:
        while block := file.read(2**20):
            start = crc32(block, start)
    return start
