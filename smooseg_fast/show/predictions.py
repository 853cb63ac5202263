"""Predictions on disk: masks and overlays of many images, a journal of those that are done, and their sheet."""

from __future__ import annotations

import json
import time
import zlib
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from ..datasets import IGNORE
from ..datasets.images import ImageError, read_label
from ..datasets.reading import Picture, Reading
from ..features.sample import evenly_spaced
from ..segment.colours import table_of
from ..segment.names import Group, Names, write_groups
from ..segment.segmenter import Segmenter
from ..system.ahead import behind
from ..system.files import size_of
from ..system.outfolder import Journal, OutFolder, contents
from ..system.processes import Processes
from ..system.progress import IMAGES_S, Bar, announced, say
from ..system.signals import Interrupted, stop_request
from ..system.stores import File, Remote, fetched, sizes_below
from ..system.terminal import printable
from . import pictures, unfinished
from .items import Item
from .looks import Look
from .outputs import FURTHER, Plan
from .overlays import overlay, with_names
from .report import PAGE as REPORT
from .report_tiles import TILES, TileFile
from .sheet import PAGE, Shown, sheet_pages, thumbnail
from .streamed import checksum, reduced, segment_streamed, shares_of, shown_of
from .unfinished import Unfinished

SHEET_PAGES = 10  # at most; of more images, some evenly spaced
WRITTEN = 4  # images that are written to a store at the same time; on a disk, a thread would slow the network down
RUN, DONE, MASKS, OVERLAYS = "predict.json", "done.jsonl", "masks", "overlays"
SHARES, SHEET, SHEETS, GROUPS, MANIFEST = "shares.json", "sheet.jpg", "sheets", "groups.json", "manifest.csv"
LABELS = frozenset(map(str, range(256)))  # that a mask can hold

Shares = dict[str, float]  # group -> share of an image's pixels that show data; empty where none does
Done = Sequence[Mapping[str, Shares]]  # in each folder, the images that are segmented


@dataclass
class Outcome:
    """The result of segmenting a share of the images, by their names: shares in each folder."""

    shares: list[dict[str, Shares]]
    skipped: dict[str, ImageError] = field(default_factory=dict)
    under_way: list[str] = field(default_factory=list)  # a map whose finished part is kept
    signal: int | None = None  # the number of the one that stopped the work


class Predictions(OutFolder):
    """The masks and overlays of one checkpoint and one set of settings, and a journal of the images that are done.

    An image's line in the journal comes after its mask and overlay, and carries their sizes and a CRC-32 of the line
    itself and, on a disk, of the mask. The last line of a stem counts: the files of that name may have been another
    image's before. All processes append to one file. An image is segmented again where its line is spoilt by a kill or
    a network drive, and where its mask or the size of its overlay is not as the line says. It is drawn again from its
    mask where groups have got other names or colours since, or were merged. A store's listing tells the sizes; no file
    of it is read.

    groups: those that masks may hold. merge: the numbers that were merged, see `Names`. more: the folders of FURTHER
    that are written too.

    UserError when the folder at `path` is another's.
    """

    def __init__(
        self,
        path: File,
        settings: dict[str, Any],
        processes: Processes,
        *,
        groups: Sequence[Group],
        merge: list[list[int]],
        more: Sequence[str] = (),
    ):
        below = (MASKS, OVERLAYS, *FURTHER, SHEETS)
        outputs = (*below, SHARES, SHEET, GROUPS, MANIFEST, REPORT, TILES)
        super().__init__(path, settings, record=RUN, outputs=outputs, below=below)
        self.more = list(more)
        self.groups, self.merge, self.processes, self._journal = groups, merge, processes, Journal.at(path / DONE)
        self.colours = table_of({group.number: group.colour for group in groups})
        look = [(group.number, group.name, group.colour) for group in groups]
        self._looks = {"look": f"{crc32(repr((look, merge)).encode()):08x}", "merge": merge}
        self._done: dict[str, dict[str, Any]] = {}
        self.tiles: TileFile | None = None  # for the page; set by the command
        self.drawn_s = 0.0  # that overlays and tiles took
        self._sizes: dict[str, int] = {}  # of the masks and overlays in a store
        self.on_sheets: frozenset[str] = frozenset()  # names
        self.thumbnails: dict[str, Shown] = {}  # of images on the sheets, by name, so that few files are read again

    def mask(self, item: Item) -> Path:
        return self.path / MASKS / f"{item.stem}{'.tif' if item.map else '.png'}"

    def further(self, item: Item, kind: str) -> Path:
        """The file of an image in a folder of FURTHER."""
        return self.path / kind / f"{item.stem}{'.tif' if item.map else FURTHER[kind]}"

    def plan(self, item: Item, shape: tuple[int, int]) -> Plan:
        """The files that are written of an image (height, width), but for its overlay."""
        more = {kind: self.further(item, kind) for kind in self.more}
        scratch = self.path if isinstance(self.path, Path) else None
        return Plan(shape, self.groups, self.colours, self.mask(item), more, scratch)

    def unfinished(self, item: Item, folders: Sequence[Predictions], shape: tuple[int, int]) -> Unfinished:
        """Keeps what is done of a map for these folders, of which this is the first."""
        keys = [
            [folder.settings, folder.merge, folder.more, [group.number for group in folder.groups]]
            for folder in folders
        ]
        return unfinished.of_map(self.path, item.stem, [item.stamp(), item.page, shape, *keys])

    def overlay(self, item: Item) -> Path:
        return self.path / OVERLAYS / f"{item.stem}.jpg"

    def done(self, items: Sequence[Item]) -> dict[str, Shares]:
        """The shares in the images that are done and unchanged, by name. Reads masks. Call it inside `claimed`."""
        done = {}
        for item in items:
            record = self._done.get(item.stem)
            if record and record["look"] == self._looks["look"] and self._holds(item, record):
                done[item.name] = record["shares"]
        return done

    def kept(self, item: Item) -> np.ndarray | None:
        """The labels uint8 [H,W] of an image that was segmented here before and has not changed since; None also where
        groups that were merged then are apart now."""
        record = self._done.get(item.stem)
        if not record or item.map or not self._holds(item, record):
            return None
        if not all(any(set(before) <= set(now) for now in self.merge) for before in record["merge"]):
            return None
        return Names(IGNORE, merge=self.merge).table[read_label(self.mask(item))]

    def _holds(self, item: Item, record: dict[str, Any]) -> bool:
        if record["stamp"] != item.stamp() or not set(self.more) <= set(record["more"]):
            return False
        if isinstance(self.path, Remote):
            return record.get("bytes") == [self._sizes.get(str(file)) for file in (self.mask(item), self.overlay(item))]
        return record == self._line(item, record)

    def seconds(self) -> dict[str, float]:
        """How long each image that is done took, by its stem, from the journal of all processes."""
        self._read_journal()
        return {stem: record["seconds"] for stem, record in self._done.items()}

    def flush(self) -> None:
        self._journal.flush()

    def _line(self, item: Item, record: dict[str, Any]) -> dict[str, Any] | None:
        """`record` with the sizes of the files on disk, and the checksum; None where a file cannot be read."""
        files = [self.mask(item), self.overlay(item), *(self.further(item, kind) for kind in record["more"])]
        try:
            if not all(isinstance(file, Remote) or file.is_file() for file in files):
                return None
            sizes = [size_of(file) for file in files]
            names = ("stem", "stamp", "shares", "look", "merge", "more")
            plain = {name: record[name] for name in names} | {"bytes": sizes}
            crc = zlib.crc32(json.dumps(plain).encode())
            crc = crc if isinstance(self.path, Remote) else checksum(files[0], crc)
            return plain | {"seconds": record["seconds"], "crc": f"{crc:08x}"}
        except OSError:
            return None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder for this command and let all its processes write into it.

        One process leaves nothing in a new folder where no image was done. UserError where another command is at work.
        """
        with self.held() if self.processes.first else nullcontext():
            before = contents(self.path)
            if self.processes.first:
                self._read_journal()
                self.claim()
                self._journal.rewrite(self._done.values())
                write_groups(self.path / GROUPS, self.groups)
            self.processes.wait()
            if not self.processes.first:
                self._read_journal()
            try:
                yield
            finally:
                self.flush()
                added = contents(self.path) - before
                if self.processes.size == 1 and self.path / RUN in added and not any(path.is_dir() for path in added):
                    for path in added:
                        path.unlink()

    def _read_journal(self) -> None:
        self._done = {record["stem"]: record for record in self._journal.read(is_record)}
        if isinstance(self.path, Remote):
            self._sizes = {**sizes_below(self.path / MASKS), **sizes_below(self.path / OVERLAYS)}

    def look(self) -> Look | None:
        """The look of the image that was labelled last, for its tile."""
        return None if self.tiles is None else self.tiles.look()

    def write(
        self, item: Item, image: np.ndarray, labels: np.ndarray, noted: dict[str, Any], look: Look | None
    ) -> Shares:
        """Write mask and overlay of `image` uint8 [H,W,3] with labels uint8 [H,W], then a line of the journal.

        Pixels without data have the label IGNORE, and no part in the shares. noted: "stamp" and "seconds" of the image.
        """
        self.draw(item, *reduced(image, labels), look)
        pictures.write_mask(self.mask(item), labels, self.colours)
        # row by row, because bincount takes eight bytes a label
        counts = np.zeros(256, np.int64)
        for row in labels:
            counts += np.bincount(row, minlength=256)
        return self.note(item, noted, shares_of(counts))

    def draw(self, item: Item, small: np.ndarray, labels: np.ndarray, look: Look | None) -> None:
        """Write the overlay of an image uint8 [h,w,3] with labels uint8 [h,w], and its tile of the page; keep its
        thumbnail for the sheets."""
        started, names = time.perf_counter(), {group.number: group.label for group in self.groups}
        picture = with_names(overlay(small, labels, self.colours), labels, names)
        pictures.save(self.overlay(item), picture, sync=False)  # its size in the journal tells whether it is whole
        if self.tiles is not None:
            self.tiles.add(item.name, small, labels, look)
        if item.name in self.on_sheets:
            self.thumbnails[item.name] = thumbnail(Shown(item.name, small, labels), len(self.on_sheets))
        self.drawn_s += time.perf_counter() - started

    def known(self, item: Item) -> Shares | None:
        """The shares in a map whose files are here but for names and colours; None where it has to be segmented."""
        record = self._done.get(item.stem)
        same = record and item.map and record["merge"] == self.merge and self._holds(item, record)
        return record["shares"] if record and same else None

    def note(self, item: Item, noted: dict[str, Any], shares: Shares) -> Shares:
        """Add a line to the journal for an image whose files are written."""
        if record := self._line(item, {"stem": item.stem, "shares": shares, "more": self.more, **self._looks, **noted}):
            self._journal.append(record)
        return shares


def is_record(record: dict[str, Any]) -> bool:
    """Whether a line of the journal is one. Its checksum is verified against the mask."""
    stem, shares, seconds = (record.get(name) for name in ("stem", "shares", "seconds"))
    return (
        isinstance(stem, str)
        and isinstance(seconds, float)
        and {"stamp", "look"} <= record.keys()
        and isinstance(record.get("more"), list)
        and set(map(str, record["more"])) <= FURTHER.keys()
        and isinstance(record.get("merge"), list)
        and all(isinstance(numbers, list) and LABELS.issuperset(map(str, numbers)) for numbers in record["merge"])
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
    on_sheets = frozenset(item.name for item in for_sheets(items))
    for folder in folders.values():
        folder.on_sheets = on_sheets
    todo = [item for item in items if any(item.name not in names for names in done)]
    done_by_all, stores = processes.counter(), any(isinstance(folder.path, Remote) for folder in folders.values())
    bar = Bar(total=len(items), initial=len(items) - len(todo), desc="predict", unit="image", plain_s=IMAGES_S)

    def write(
        item: Item,
        pixels: np.ndarray,
        labels: Mapping[int, np.ndarray],
        noted: dict[str, Any],
        looks: Mapping[int, Look | None],
    ) -> None:
        for (number, folder), shares in zip(folders.items(), outcome.shares):
            if number in labels:
                shares[item.name] = folder.write(item, pixels, labels[number], noted, looks[number])

    with bar, stop_request() as stop, behind(WRITTEN if stores else 0) as later:
        for item, _ in fetched([(item, item.file) for item in todo[processes.rank :: processes.size]]):
            if stop.number is not None:
                outcome.signal = stop.number
                break
            due, started = [n for n, names in zip(folders, done) if item.name not in names], time.perf_counter()
            try:
                if item.map or any(folders[number].more for number in due):
                    streamed = {number: folders[number] for number in due}
                    for number, written in segment_streamed(segmenter, item, streamed, options, stop.check).items():
                        outcome.shares[[*folders].index(number)][item.name] = written
                    bar.update(done_by_all(1) - (bar.n - bar.initial))
                    continue
                stamp, picture = item.stamp(), segmenter.picture(item.file, item.page)
                labels = {number: kept for number in due if (kept := folders[number].kept(item)) is not None}
                if rest := [number for number in due if number not in labels]:
                    labels |= labels_at(segmenter, picture, rest, options)
            except Interrupted as error:
                if not item.map:
                    raise
                outcome.signal, outcome.under_way = error.number, [item.name]
                break
            except ImageError as error:
                outcome.skipped[item.name] = ImageError(item.file, error.reason, error.advice)
                say_skipped(outcome.skipped[item.name])
            else:
                noted = {"stamp": stamp, "seconds": round(time.perf_counter() - started, 4)}
                looks = {number: folders[number].look() for number in labels}
                later(write, item, picture.pixels, labels, noted, looks)
            bar.update(done_by_all(1) - (bar.n - bar.initial))
    for folder in folders.values():
        folder.flush()
        gone = any(isinstance(item.file, Remote) and item.name in outcome.skipped for item in items if item.map)
        if outcome.signal is None and processes.size == 1 and not gone:  # a store may give it at the next try
            unfinished.forget(folder.path)
    with announced("waiting    for the other processes"):
        outcomes = processes.all(outcome)
    for other in outcomes[1:]:  # which could not be heard
        for skipped in other.skipped.values():
            say_skipped(skipped)
    parts = zip(*(outcome.shares for outcome in outcomes))
    return Outcome(
        shares=[{**before, **dict(ChainMap(*part))} for before, part in zip(done, parts)],
        skipped=dict(ChainMap(*(outcome.skipped for outcome in outcomes))),
        under_way=[name for outcome in outcomes for name in outcome.under_way],
        signal=next((outcome.signal for outcome in outcomes if outcome.signal is not None), None),
    )


def labels_at(
    segmenter: Segmenter, picture: Picture, numbers: Sequence[int], options: Mapping[str, Any]
) -> dict[int, np.ndarray]:
    """The labels uint8 [H,W] of a picture at each of these numbers of groups; one that is the segmenter's needs no tree
    and little memory."""
    if list(numbers) == [len(segmenter.grouping)]:
        return {numbers[0]: segmenter.predict(picture, **options)}
    return segmenter.predict_at(picture, numbers, **options)


def say_skipped(error: ImageError) -> None:
    say(printable(f"skipped: {error}"))


def mean_shares(shares: Collection[Shares]) -> Shares:
    """The mean over images that show data, whatever their sizes."""
    shares = [image for image in shares if image]
    groups = sorted({k for image in shares for k in image}, key=int)
    return {k: round(sum(image.get(k, 0) for image in shares) / len(shares), 6) for k in groups}


def for_sheets(items: Sequence[Item]) -> list[Item]:
    """All images, or as many evenly spaced ones as the sheets hold."""
    return [items[place] for place in evenly_spaced(len(items), PAGE * SHEET_PAGES)]


def draw_sheets(folder: Predictions, done: Sequence[Item], groups: Sequence[Group], reading: Reading) -> list[Path]:
    """Draw all images that are done, or some evenly spaced over them, read back from the disk -> the pages, of which
    the first is SHEET. Pages of an earlier time that are no more are removed."""
    chosen = for_sheets(done)

    def shown() -> Iterator[Shown]:
        for item in chosen:
            with suppress(ImageError):  # removed or damaged since
                if item.name in folder.thumbnails:
                    yield folder.thumbnails[item.name]
                else:
                    yield thumbnail(Shown(item.name, *shown_of(item, folder.mask(item), reading)), len(chosen))

    all_or_some = f", evenly spaced over {len(done)}" if len(chosen) < len(done) else ""
    some = f"{{first}} to {{last}} of {len(chosen)}{all_or_some}"
    in_use = sum(bool(group.share) for group in groups)
    paths = []
    with behind(1) as later:
        for number, page in enumerate(sheet_pages(shown(), groups, f"images {some}: {in_use} groups"), 1):
            paths.append(folder.path / SHEET if number == 1 else folder.path / SHEETS / f"{number}.jpg")
            later(partial(pictures.save, sync=False), paths[-1], page)  # each command draws them
    for path in folder.path.glob(f"{SHEETS}/*.jpg"):
        if path not in paths:
            path.unlink()
    return paths
