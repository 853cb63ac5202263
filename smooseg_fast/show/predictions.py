"""Predictions on disk: masks and overlays of many images, a journal of those that are done, and their sheet."""

from __future__ import annotations

import math
from collections import ChainMap, Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets import recognise
from ..datasets.images import ImageError, find_images, read_image, read_label
from ..datasets.scaled import Scaled
from ..errors import UserError
from ..features.sample import evenly_spaced
from ..segment.segmenter import Segmenter
from ..system.outfolder import Journal, OutFolder
from ..system.processes import Processes
from ..system.progress import Bar, announced, printable, say
from ..system.signals import stop_request
from . import pictures
from .sheet import Shown, groups_sheet

SHEET_IMAGES = 24
OVERLAY_PIXELS = 2**24  # an overlay of a larger image is reduced to as many
BAND = 512  # rows that are reduced at a time
RUN, DONE, MASKS, OVERLAYS = "predict.json", "done.jsonl", "masks", "overlays"
SHARES, SHEET = "shares.json", "sheet.jpg"

Shares = dict[str, float]  # group -> share of an image's pixels


@dataclass(frozen=True)
class Item:
    """One image to segment."""

    file: Path
    name: str  # path relative to --images, posix
    stem: str  # names the files written for it in the folders below --out

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
    """The result of segmenting a share of the images, by their names."""

    shares: dict[str, Shares] = field(default_factory=dict)
    skipped: dict[str, ImageError] = field(default_factory=dict)
    signal: int | None = None  # the number of the one that stopped the work


class Predictions(OutFolder):
    """The masks and overlays of one checkpoint and one set of settings, and a journal of the images that are done.

    An image's line in the journal comes after its mask and overlay, so they are whole. The last line of a stem counts:
    the files of that name may have been another image's before. All processes append to one file; an image whose line
    is spoilt by a kill or a network drive is segmented again.

    UserError when the folder at `path` is another's.
    """

    def __init__(self, path: Path, settings: dict[str, Any], processes: Processes):
        super().__init__(path, settings, record=RUN, outputs=(MASKS, OVERLAYS, SHARES, SHEET), below=(MASKS, OVERLAYS))
        self.processes, self._journal = processes, Journal(path / DONE)
        self._done = {record.get("stem"): record for record in self._journal.read()} if processes.first else {}

    def mask(self, item: Item) -> Path:
        return self.path / MASKS / f"{item.stem}.png"

    def overlay(self, item: Item) -> Path:
        return self.path / OVERLAYS / f"{item.stem}.jpg"

    def shares(self, item: Item) -> Shares | None:
        """The shares in an image that is done and has not changed since; None when it has to be segmented."""
        record = self._done.get(item.stem, {})
        done = record.get("stamp") == item.stamp() and self.mask(item).is_file() and self.overlay(item).is_file()
        return record.get("shares") if done else None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder for this command and let all its processes write into it.

        One process leaves nothing in a new folder where no image was done. UserError where another command is at work.
        """
        with self.held() if self.processes.first else nullcontext():
            before = set(self.path.glob("*"))
            if self.processes.first:
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
        """Write mask and overlay of `image` uint8 [H,W,3] with labels uint8 [H,W], then a line of the journal."""
        colours = pictures.palette(256)
        pictures.save(self.overlay(item), pictures.overlay(*reduced(image, labels), colours))
        pictures.write_mask(self.mask(item), labels, colours)
        # row by row, because bincount takes eight bytes a label
        counts = np.zeros(len(colours), np.int64)
        for row in labels:
            counts += np.bincount(row, minlength=len(colours))
        shares = {str(k): round(float(n) / labels.size, 6) for k, n in enumerate(counts) if n}
        self._journal.append({"stem": item.stem, "stamp": stamp, "shares": shares})
        return shares


def segment(
    segmenter: Segmenter, items: Sequence[Item], done: dict[str, Shares], folder: Predictions, **options: Any
) -> Outcome:
    """Segment the `items` that are not `done`, each process a share of them, until a signal stops it.

    The outcome is that of all processes. options: as for `Segmenter.predict`.
    """
    processes, outcome = folder.processes, Outcome()
    todo = [item for item in items if item.name not in done]
    bar = Bar(total=len(items), initial=len(items) - len(todo), desc="predict", unit="image")
    with bar, stop_request() as stop:
        for item in todo[processes.rank :: processes.size]:
            if stop.number is not None:
                outcome.signal = stop.number
                break
            try:
                stamp, image = item.stamp(), segmenter.pixels(item.file)
                labels = segmenter.predict(image, **options)
            except ImageError as error:
                outcome.skipped[item.name] = ImageError(item.file, error.reason, error.advice)
                say_skipped(outcome.skipped[item.name])
            else:
                outcome.shares[item.name] = folder.write(item, stamp, image, labels)
            bar.update(min(processes.size, bar.total - bar.n))  # the others are about as far
    with announced("waiting    for the other processes"):
        outcomes = processes.all(outcome)
    for other in outcomes[1:]:  # which could not be heard
        for skipped in other.skipped.values():
            say_skipped(skipped)
    return Outcome(
        shares=dict(ChainMap(done, *(outcome.shares for outcome in outcomes))),
        skipped=dict(ChainMap(*(outcome.skipped for outcome in outcomes))),
        signal=next((outcome.signal for outcome in outcomes if outcome.signal is not None), None),
    )


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
    """The mean over images, whatever their sizes."""
    groups = sorted({k for image in shares for k in image}, key=int)
    return {k: round(sum(image.get(k, 0) for image in shares) / len(shares), 6) for k in groups}


def draw_sheet(folder: Predictions, done: Sequence[Item], mean: Shares) -> None:
    """Draw images evenly spaced over all that are done, read back from the disk."""

    def shown() -> Iterator[Shown]:
        for item in (done[place] for place in evenly_spaced(len(done), SHEET_IMAGES)):
            with suppress(ImageError):  # removed or damaged since
                yield item.name, read_image(item.file), read_label(folder.mask(item))

    title = f"{min(len(done), SHEET_IMAGES)} of {len(done)} images, {len(mean)} groups"
    shares = {int(k): share for k, share in mean.items()}
    pictures.save(folder.path / SHEET, groups_sheet(shown(), pictures.palette(256), shares, title))


def items_below(root: Path) -> list[Item]:
    """The images at or below `root`, without the masks of a labelled layout. UserError when none is left."""
    layout = recognise(root)
    if layout is not None:  # its label files are images too
        advice = layout.pictures or "the pictures alone"
        raise UserError(f"--images {root}: is {layout.title}, which holds more than pictures; give {advice}")
    files = find_images(root, "--images")
    top = root if root.is_dir() else root.parent
    names = [file.relative_to(top) for file in files if not is_label(file, root)]
    if not names:
        raise UserError(
            f"--images {root}: all {len(files)} image files in it are masks, below a labels/ next to an images/; "
            "give the folder that holds the pictures"
        )
    return [Item(top / name, name.as_posix(), stem) for name, stem in zip(names, output_stems(names))]


def is_label(file: Path, root: Path) -> bool:
    """Return whether a file is a mask of the labelled layout: below a labels/ next to an images/."""
    inside = [parent for parent in file.parents if parent != root and root in parent.parents]
    return any(parent.name == "labels" and (parent.parent / "images").is_dir() for parent in inside)


def output_stems(files: Sequence[Path]) -> list[str]:
    """Names for the files written for each image, no two alike even where case makes no difference.

    They have no suffix, but where a.jpg and a.png would get the same name.
    """
    stems = [file.with_suffix("").as_posix() for file in files]
    names = Counter(name.casefold() for name in (*stems, *(file.as_posix() for file in files)))
    return [stem if names[stem.casefold()] == 1 else file.as_posix() for file, stem in zip(files, stems)]
