"""Predictions on disk: masks and overlays of many images, a journal of those that are done, and their sheet."""

from __future__ import annotations

import json
import math
import zlib
from collections import ChainMap, Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from ..datasets import IGNORE, recognise
from ..datasets.formats import photo_suffixes
from ..datasets.images import ImageError, read_label, read_picture
from ..datasets.reading import Picture, Reading
from ..datasets.scaled import Scaled
from ..datasets.scan import normal, scan
from ..datasets.survey import Place, page_counts, page_names, survey
from ..errors import UserError
from ..features.sample import evenly_spaced
from ..segment.segmenter import Segmenter
from ..system.outfolder import Journal, OutFolder
from ..system.processes import Processes
from ..system.progress import Bar, announced, say
from ..system.signals import stop_request
from ..system.terminal import printable
from . import pictures
from .sheet import Shown, groups_sheet

SHEET_IMAGES = 24
OVERLAY_PIXELS = 2**24  # an overlay of a larger image is reduced to as many
BAND = 512  # rows that are reduced at a time
RUN, DONE, MASKS, OVERLAYS = "predict.json", "done.jsonl", "masks", "overlays"
SHARES, SHEET = "shares.json", "sheet.jpg"
LABELS = frozenset(map(str, range(256)))  # that a mask can hold

Shares = dict[str, float]  # group -> share of an image's pixels that show data; empty where none does
Done = Sequence[Mapping[str, Shares]]  # in each folder, the images that are segmented


@dataclass(frozen=True)
class Item:
    """One image to segment."""

    file: Path
    name: str  # path relative to --images, posix
    stem: str  # names the files written for it in the folders below --out
    page: int | None = None  # of the file, from 1; None for the one that the checkpoint reads

    def stamp(self) -> list[str | int] | None:
        """[place, bytes, modification time in ns], which tell an image that changed; None when it is gone."""
        try:
            status = self.file.stat()
        except OSError:
            return None
        # the place too: sizes and times of uncompressed tiles from an archive are all alike
        return [str(self.file.absolute()), status.st_size, status.st_mtime_ns]


@dataclass
class Outcome:
    """The result of segmenting a share of the images, by their names: shares in each folder."""

    shares: list[dict[str, Shares]]
    skipped: dict[str, ImageError] = field(default_factory=dict)
    signal: int | None = None  # the number of the one that stopped the work


class Predictions(OutFolder):
    """The masks and overlays of one checkpoint and one set of settings, and a journal of the images that are done.

    An image's line in the journal comes after its mask and overlay, and carries their sizes and a CRC-32 of the mask
    and of the line itself. The last line of a stem counts: the files of that name may have been another image's before.
    All processes append to one file. An image is segmented again where its line is spoilt by a kill or a network drive,
    and where its mask or the size of its overlay is not as the line says.

    UserError when the folder at `path` is another's.
    """

    def __init__(self, path: Path, settings: dict[str, Any], processes: Processes):
        super().__init__(path, settings, record=RUN, outputs=(MASKS, OVERLAYS, SHARES, SHEET), below=(MASKS, OVERLAYS))
        self.processes, self._journal = processes, Journal(path / DONE)

    def mask(self, item: Item) -> Path:
        return self.path / MASKS / f"{item.stem}.png"

    def overlay(self, item: Item) -> Path:
        return self.path / OVERLAYS / f"{item.stem}.jpg"

    def done(self, items: Sequence[Item]) -> dict[str, Shares]:
        """The shares in the images that are done and have not changed since, by name. Reads every mask of theirs.

        Call it inside `claimed`.
        """
        done = {}
        for item in items:
            record = self._done.get(item.stem)
            if record and record["stamp"] == item.stamp() and record == self._line(item, record):
                done[item.name] = record["shares"]
        return done

    def _line(self, item: Item, record: dict[str, Any]) -> dict[str, Any] | None:
        """`record` with the sizes of the files on disk, and the checksum; None where a file cannot be read."""
        mask_file, overlay_file = self.mask(item), self.overlay(item)
        try:
            if not (mask_file.is_file() and overlay_file.is_file()):
                return None
            mask = mask_file.read_bytes()
            sizes = [len(mask), overlay_file.stat().st_size]
        except OSError:
            return None
        plain = {name: record[name] for name in ("stem", "stamp", "shares")} | {"bytes": sizes}
        return plain | {"crc": f"{zlib.crc32(mask, zlib.crc32(json.dumps(plain).encode())):08x}"}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder for this command and let all its processes write into it.

        One process leaves nothing in a new folder where no image was done. UserError where another command is at work.
        """
        with self.held() if self.processes.first else nullcontext():
            before = set(self.path.glob("*"))
            if self.processes.first:
                self._done = {record["stem"]: record for record in self._journal.read(is_record)}
                self.claim()
                self._journal.rewrite(self._done.values())
            self.processes.wait()
            try:
                yield
            finally:
                added = set(self.path.glob("*")) - before
                if self.processes.size == 1 and self.path / RUN in added and not any(path.is_dir() for path in added):
                    for path in added:
                        path.unlink()

    def write(self, item: Item, stamp: list[str | int] | None, image: np.ndarray, labels: np.ndarray) -> Shares:
        """Write mask and overlay of `image` uint8 [H,W,3] with labels uint8 [H,W], then a line of the journal.

        Pixels without data have the label IGNORE, and no part in the shares.
        """
        colours = pictures.palette(256)
        pictures.save(self.overlay(item), pictures.overlay(*reduced(image, labels), colours))
        pictures.write_mask(self.mask(item), labels, colours)
        # row by row, because bincount takes eight bytes a label
        counts = np.zeros(len(colours), np.int64)
        for row in labels:
            counts += np.bincount(row, minlength=len(colours))
        counts = counts[:IGNORE]
        shares = {str(k): round(float(n / counts.sum()), 6) for k, n in enumerate(counts) if n}
        if record := self._line(item, {"stem": item.stem, "stamp": stamp, "shares": shares}):
            self._journal.append(record)
        return shares


def is_record(record: dict[str, Any]) -> bool:
    """Whether a line of the journal is one. Its checksum is verified against the mask."""
    stem, shares = record.get("stem"), record.get("shares")
    return (
        isinstance(stem, str)
        and "stamp" in record
        and isinstance(shares, dict)
        and all(group in LABELS and isinstance(share, float) and 0 <= share <= 1 for group, share in shares.items())
    )


def segment(
    segmenter: Segmenter, items: Sequence[Item], folders: Mapping[int, Predictions], done: Done, **options: Any
) -> Outcome:
    """Segment the `items` that are not `done`, each process a share of them, until a signal stops it.

    The outcome is that of all processes. folders: by the number of groups of their masks; an image passes the backbone
    once for all of them. options: as for `Segmenter.predict`.
    """
    processes, outcome = next(iter(folders.values())).processes, Outcome([{} for _ in folders])
    todo = [item for item in items if any(item.name not in names for names in done)]
    bar = Bar(total=len(items), initial=len(items) - len(todo), desc="predict", unit="image")
    with bar, stop_request() as stop:
        for item in todo[processes.rank :: processes.size]:
            if stop.number is not None:
                outcome.signal = stop.number
                break
            due = [number for number, names in zip(folders, done) if item.name not in names]
            try:
                stamp, picture = item.stamp(), segmenter.picture(item.file, item.page)
                labels = labels_at(segmenter, picture, due, options)
            except ImageError as error:
                outcome.skipped[item.name] = ImageError(item.file, error.reason, error.advice)
                say_skipped(outcome.skipped[item.name])
            else:
                for (number, folder), shares in zip(folders.items(), outcome.shares):
                    if number in labels:
                        shares[item.name] = folder.write(item, stamp, picture.pixels, labels[number])
            bar.update(min(processes.size, bar.total - bar.n))  # the others are about as far
    with announced("waiting    for the other processes"):
        outcomes = processes.all(outcome)
    for other in outcomes[1:]:  # which could not be heard
        for skipped in other.skipped.values():
            say_skipped(skipped)
    parts = zip(*(outcome.shares for outcome in outcomes))
    return Outcome(
        shares=[{**before, **dict(ChainMap(*part))} for before, part in zip(done, parts)],
        skipped=dict(ChainMap(*(outcome.skipped for outcome in outcomes))),
        signal=next((outcome.signal for outcome in outcomes if outcome.signal is not None), None),
    )


def labels_at(
    segmenter: Segmenter, picture: Picture, numbers: Sequence[int], options: Mapping[str, Any]
) -> dict[int, np.ndarray]:
    """The labels uint8 [H,W] of a picture at each of these numbers of groups; one that is the segmenter's needs no tree
    and little memory."""
    if list(numbers) == [segmenter.groups]:
        return {segmenter.groups: segmenter.predict(picture, **options)}
    return segmenter.predict_at(picture, numbers, **options)


def reduced(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bring an image [H,W,3] and its labels [H,W] to at most OVERLAY_PIXELS, in memory for a band and the result."""
    factor = math.sqrt(OVERLAY_PIXELS / labels.size)
    if factor >= 1:
        return image, labels
    scaled = [Scaled.by(image, factor, "bilinear"), Scaled.by(labels, factor, "nearest")]
    height, width = scaled[0].size
    bands = [(top, min(BAND, height - top)) for top in range(0, height, BAND)]
    small = [np.concatenate([part.window(top, 0, rows, width) for top, rows in bands]) for part in scaled]
    return small[0], small[1]


def say_skipped(error: ImageError) -> None:
    say(printable(f"skipped: {error}"))


def mean_shares(shares: Collection[Shares]) -> Shares:
    """The mean over images that show data, whatever their sizes."""
    shares = [image for image in shares if image]
    groups = sorted({k for image in shares for k in image}, key=int)
    return {k: round(sum(image.get(k, 0) for image in shares) / len(shares), 6) for k in groups}


def draw_sheet(folder: Predictions, done: Sequence[Item], mean: Shares, reading: Reading) -> None:
    """Draw images evenly spaced over all that are done, read back from the disk."""

    def shown() -> Iterator[Shown]:
        for item in (done[place] for place in evenly_spaced(len(done), SHEET_IMAGES)):
            with suppress(ImageError):  # removed or damaged since
                yield item.name, read_picture(item.file, reading, item.page).pixels, read_label(folder.mask(item))

    title = f"{min(len(done), SHEET_IMAGES)} of {len(done)} images, {len(mean)} groups"
    shares = {int(k): share for k, share in mean.items()}
    pictures.save(folder.path / SHEET, groups_sheet(shown(), pictures.palette(256), shares, title))


def items_below(root: Path) -> list[Item]:
    """The photos at or below `root`, with a line for each kind of file left out. UserError when none is left."""
    layout = recognise(root)
    if layout is not None:  # its label files are images too
        advice = layout.pictures or "the pictures alone"
        raise UserError(f"--images {root}: is {layout.title}, which holds more than pictures; give {advice}")
    found = scan(root, "--images")
    for note in found.notes:
        say(printable(f"note: {note}"))
    names = [Path(photo) for photo in found.photos]
    return [Item(found.folder / name, name.as_posix(), stem) for name, stem in zip(names, output_stems(names))]


def look_at(items: Sequence[Item], reading: Reading) -> tuple[list[Item], Reading]:
    """The images with an item for every page that is read, and `reading` with a range for every kind of value.

    Says what was measured and what of the images is not shown.
    """
    items = list(items)
    if reading.pages == "all":
        counts = page_counts([item.file for item in items])
        names = page_names([item.name for item in items], counts)
        pages = [(item.file, page) for item, count in zip(items, counts) for page in range(1, count + 1)]
        stems = output_stems([Path(name) for name in names])
        items = [Item(file, name, stem, page) for (file, page), name, stem in zip(pages, names, stems)]
    reading, notes = survey([Place(item.file, item.page) for item in items], reading)
    for note in notes:
        say(printable(f"data       {note}"))
    return items, reading


def output_stems(files: Sequence[Path]) -> list[str]:
    """Names for the files written for each image, no two alike even if neither case nor Unicode form counted.

    A name has no suffix. Of a.jpg and a.png in one folder, the first in the order of `photo_suffixes` is called so,
    whether or not the other is there, and the other keeps its suffix.
    """
    order, names = photo_suffixes(), [file.as_posix() for file in files]
    stems: dict[Path, str] = {}
    taken = Counter(map(normal, names))
    for file in sorted(files, key=lambda file: (order.index(file.suffix.lower()), file.as_posix())):
        stem, name = file.with_suffix("").as_posix(), file.as_posix()
        if normal(stem) in taken:
            stem = name if taken[normal(name)] == 1 else f"{name}.{crc32(name.encode(errors='surrogateescape')):08x}"
        stems[file] = stem
        taken[normal(stem)] += normal(stem) != normal(name)
    return [stems[file] for file in files]
