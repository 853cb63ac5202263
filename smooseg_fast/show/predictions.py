"""Predictions on disk: masks and overlays of many images, a journal of those that are done, and their sheet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets import recognise
from ..datasets.images import ImageError, find_images, read_image, read_label
from ..errors import UserError
from ..features.sample import spread
from ..segment.segmenter import Segmenter
from ..system.outfolder import Journal, OutFolder
from ..system.processes import Processes
from ..system.progress import Bar, printable, say
from ..system.signals import stop_request
from . import pictures
from .sheet import Shown, groups_sheet

SHEET_IMAGES = 24
RUN, DONE, MASKS, OVERLAYS = "predict.json", "done.jsonl", "masks", "overlays"
SHARES, SHEET = "shares.json", "sheet.jpg"
PART = re.compile(r"done-\d+\.jsonl")  # the journal of another process than the first

Shares = dict[str, float]  # group -> share of an image's pixels


@dataclass(frozen=True)
class Item:
    """One image to segment."""

    file: Path
    name: str  # path relative to --images, posix
    stem: str  # of the files written for it, in the folders below --out

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
    the files of that name may have been another image's before. Each of several processes appends to a file of its own,
    so a kill at any time costs no more than the images under way; the next command puts the files together.

    UserError when the folder at `path` is another's.
    """

    def __init__(self, path: Path, settings: dict[str, Any], processes: Processes):
        super().__init__(path, settings, record=RUN, made=(MASKS, OVERLAYS, SHARES, SHEET), below=(MASKS, OVERLAYS))
        self.processes, self._alone = processes, processes.size == 1  # whether no other process writes
        self._journal = Journal(self._journal_path(processes.rank))
        self._done = self._read_journals() if processes.first else {}

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

        Nothing is left in a new folder where no image was done. UserError where another command is at work.
        """
        with self.held() if self.processes.first else nullcontext():
            made: list[Path] = []
            if self.processes.first:
                before = set(self.path.iterdir())
                self.claim()
                self._write_journal(self._done)
                made = [path for path in self.path.iterdir() if path not in before]
            self.processes.wait()
            try:
                yield
            finally:
                journals = [path for path in (self.path / DONE, *self._parts()) if path.exists()]
                if self._alone and self.path / RUN in made and not any(path.stat().st_size for path in journals):
                    for path in (*made, *journals):
                        path.unlink(missing_ok=True)

    def write(
        self, item: Item, stamp: list[str | int] | None, image: np.ndarray, labels: np.ndarray, colours: np.ndarray
    ) -> Shares:
        """Write mask and overlay of `image` uint8 [H,W,3] with labels uint8 [H,W], then a line of the journal."""
        pictures.save(self.overlay(item), pictures.overlay(image, labels, colours))
        pictures.write_mask(self.mask(item), labels, colours)
        shares = {str(k): round(float(n) / labels.size, 6) for k, n in enumerate(np.bincount(labels.ravel())) if n}
        self._journal.append({"stem": item.stem, "stamp": stamp, "shares": shares})
        return shares

    def join_journals(self) -> None:
        """Put the files of all processes together, once nobody writes any more."""
        self._alone = True
        if self._parts():
            self._write_journal(self._read_journals())

    def _journal_path(self, rank: int) -> Path:
        return self.path / (DONE if rank == 0 else f"done-{rank}.jsonl")

    def _parts(self) -> list[Path]:
        """The files of all processes but the first, also of an earlier command with more of them."""
        return sorted(path for path in self.path.glob("done-*.jsonl") if PART.fullmatch(path.name))

    def _read_journals(self) -> dict[str, dict[str, Any]]:
        records = [record for path in (self.path / DONE, *self._parts()) for record in Journal(path).read()]
        return {str(record.get("stem")): record for record in records}

    def _write_journal(self, records: dict[str, dict[str, Any]]) -> None:
        parts = self._parts()
        Journal(self.path / DONE).rewrite(records.values())
        for path in parts:  # a kill before this leaves lines twice, which does no harm
            path.unlink(missing_ok=True)


def segment(
    segmenter: Segmenter,
    items: Sequence[Item],
    done: Collection[str],
    folder: Predictions,
    *,
    mirror: bool,
    short_side: int | None,
) -> Outcome:
    """Segment this process's share of the `items` that are not `done`, until a signal stops it.

    mirror, short_side: as for `Segmenter.predict`.
    """
    rank, size = folder.processes.rank, folder.processes.size
    outcome = Outcome()
    colours = pictures.palette(segmenter.groups)
    todo = [item for item in items if item.name not in done]
    bar = Bar(total=len(items), initial=len(items) - len(todo), desc="predict", unit="image")
    with bar, stop_request() as stop:
        for item in todo[rank::size]:
            if stop.number is not None:
                outcome.signal = stop.number
                break
            try:
                stamp, image = item.stamp(), segmenter.pixels(item.file)
                labels = segmenter.predict(image, mirror=mirror, short_side=short_side).astype(np.uint8)
            except ImageError as error:
                outcome.skipped[item.name] = error
                say_skipped(item, error)
            else:
                outcome.shares[item.name] = folder.write(item, stamp, image, labels, colours)
            bar.update(min(size, bar.total - bar.n))  # the others are about as far
    return outcome


def say_skipped(item: Item, error: ImageError) -> None:
    say(printable(f"skipped: {item.file}: {error.reason}; {error.advice}"))


def mean_shares(shares: Collection[Shares]) -> Shares:
    """The mean over images, whatever their sizes."""
    totals: Counter[str] = Counter()
    for image in shares:
        totals.update(image)
    return {k: round(totals[k] / len(shares), 6) for k in sorted(totals, key=int)}


def draw_sheet(path: Path, done: Sequence[Item], folder: Predictions, segmenter: Segmenter, mean: Shares) -> None:
    """Draw images evenly spaced over all that are done, read back from the disk."""

    def shown() -> Iterator[Shown]:
        for place in spread(len(done), SHEET_IMAGES).tolist():
            try:
                image, labels = read_image(done[place].file), read_label(folder.mask(done[place]))
            except ImageError:  # removed or damaged since
                continue
            yield done[place].name, image, labels

    title = f"{min(len(done), SHEET_IMAGES)} of {len(done)} images, {len(mean)} groups"
    shares = {int(k): share for k, share in mean.items()}
    pictures.save(path, groups_sheet(shown(), pictures.palette(segmenter.groups), shares, title))


def items_below(root: Path) -> list[Item]:
    """The images at or below `root`, without the masks of a labelled layout. UserError when none is left."""
    layout = recognise(root)
    if layout is not None:  # its label files are images too
        advice = "the pictures alone" if layout.pictures is None else str(layout.pictures)
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
    """Whether a file is a mask of the labelled layout: below a labels/ next to an images/."""
    inside = [parent for parent in file.parents if parent != root and root in parent.parents]
    return any(parent.name == "labels" and (parent.parent / "images").is_dir() for parent in inside)


def output_stems(files: Sequence[Path]) -> list[str]:
    """Names for the files written for each image, no two alike even where case makes no difference.

    They have no suffix, but where a.jpg and a.png would get the same name.
    """
    names = {file.as_posix().casefold() for file in files}
    stems = [file.with_suffix("").as_posix() for file in files]
    count = Counter(stem.casefold() for stem in stems)
    taken = names | {stem for stem in count if count[stem] > 1}
    return [file.as_posix() if stem.casefold() in taken else stem for file, stem in zip(files, stems)]
