"""Confusion counts over a whole set: of a trained head or plain k-means on cached squares, or of whole pictures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import smooseg_kernels as sk

from ..backbones.shifts import interleaved
from ..config import Refine
from ..datasets import IGNORE, Dataset, classes_of
from ..datasets.cutting import Cut, Cutting
from ..datasets.folder import ImageFolder
from ..datasets.images import ImageError, require_patch
from ..datasets.labelmap import Rows
from ..datasets.reading import Picture
from ..errors import UserError
from ..features.sample import BATCH
from ..features.store import FeatureStore
from ..segment.grouping import Grouping
from ..segment.model import project
from ..segment.refine import Plane, Refiner, refined_bands
from ..segment.segmenter import Segmenter
from ..segment.tiles import faded, shared
from ..segment.views import Views
from ..system.ahead import ahead
from ..system.processes import ALONE, Processes
from ..system.progress import SILENT_S, Bar
from .boundary import BoundaryCounts
from .scores import Scores, hungarian

KEPT_BYTES = 64 * 2**20  # label squares that a process keeps: 650 of 320 pixels
THREADS = 4  # that read labels, at most, each a batch


class LabelSquares:
    """The labels of the squares of a store: all are checked at once, and read again whenever they are counted.

    KEPT_BYTES of them stay in memory, which is all of most sets; the others only pass through it.

    Args:
        cutting: how the squares were cut; their side is S pixels.
        processes: each reads the batches alone that it will count; all ask for the same counts in the same order.
        progress: show a bar where reading or counting takes long.
        density: cells per patch and axis in the codes that are counted.

    Raises:
        UserError: when a label does not fit its image, or no pixel of any square is labelled.
    """

    def __init__(
        self,
        dataset: Dataset,
        store: FeatureStore,
        cutting: Cutting,
        processes: Processes = ALONE,
        progress: bool = True,
        density: int = 1,
    ):
        self.density, self.grid = density, (store.grid[0] * density, store.grid[1] * density)
        self.dataset, self.store, self.cutting = dataset, store, cutting
        self.processes, self.progress = processes, progress
        places = {name: index for index, name in enumerate(dataset.names)}
        self._images = [places[name] for name in store.names]
        self._kept: dict[int, np.ndarray] = {}
        self._cut: tuple[int, list[Cut]] = (-1, [])  # an image and its squares
        labelled, room = torch.zeros(2, dtype=torch.int64), KEPT_BYTES // (BATCH * cutting.size**2)
        for start, squares, labels in self._batches("labels"):
            labelled += torch.tensor([labels, np.count_nonzero(squares != IGNORE)])
            if len(self._kept) < room:
                self._kept[start] = squares
        labels, pixels = processes.sum(labelled).tolist()
        if not labels:
            raise UserError(f"--data: none of the {self.images} images of {dataset.name} has a label")
        if not pixels:
            raise UserError(
                f"--data: every pixel in the squares of all {labels} labels of {dataset.name} is {IGNORE} "
                "(ignore), so nothing can be measured; write class numbers from 0 into the labels"
            )

    @property
    def images(self) -> int:
        return len(set(self._images))

    def boundaries(
        self, codes: Callable[[Tensor], Tensor], prototypes: Tensor, classes: Sequence[int]
    ) -> BoundaryCounts:
        """Compare borders between classes with those of the truth. codes, prototypes: as for `confusion`.

        classes: of each group, [K]; -1 for none, which is then a class of its own.
        """
        counts, class_of = BoundaryCounts(), torch.tensor(classes)
        for start, squares, _ in self._batches("boundaries"):
            truth, rows = torch.from_numpy(squares), torch.arange(start, start + len(squares))
            labels = sk.assign(self._faded(codes, rows), prototypes, grid=self.grid, size=truth.shape[1:])
            counts.add(class_of[labels.cpu()], truth)
        return BoundaryCounts(*self.processes.sum(torch.tensor(dataclasses.astuple(counts))).tolist())

    def confusion(self, codes: Callable[[Tensor], Tensor], prototypes: Tensor) -> np.ndarray:
        """int64 [K,classes] over all labelled pixels. `codes` gives [n,P,Z] for int64 [n] numbers of rows.

        Several processes count different batches, and all get the sum, which equals that of one process to the last
        pixel.
        """
        classes = len(classes_of(self.dataset))
        counts = torch.zeros(len(prototypes), classes, dtype=torch.int64)
        for start, squares, _ in self._batches("scores"):
            truth = torch.from_numpy(squares).to(prototypes.device)
            rows, grid = torch.arange(start, start + len(truth)), self.grid
            placed = self._faded(codes, rows)
            part = sk.assign(placed, prototypes, grid=grid, size=truth.shape[1:], labels=truth, classes=classes)[1]
            counts += part.cpu()
        return self.processes.sum(counts).numpy()

    def refined_confusion(self, codes: Callable[[Tensor], Tensor], grouping: Grouping, refine: Refine) -> np.ndarray:
        """`confusion` of labels that are refined by the pictures of the squares, which are read again for it."""
        if refine == "none":
            return self.confusion(codes, grouping.prototypes)
        classes, S = len(classes_of(self.dataset)), self.cutting.size
        refiner = Refiner(refine, grouping, Plane(self.grid, (S, S), (S, S), self.density))
        counts = np.zeros((len(grouping), classes), np.int64)
        for start, squares, _ in self._batches("scores"):
            rows = torch.arange(start, start + len(squares))
            valid = self._valid(rows)
            for n, (of_row, truth) in enumerate(zip(codes(rows).unflatten(1, self.grid), squares)):
                patches = None if valid is None else valid[n].view(self.grid).numpy()
                bands = refined_bands([of_row], refiner, self.picture(start + n), patches)
                count_picture([counts], [bands], truth)
        return self.processes.sum(torch.from_numpy(counts)).numpy()

    def picture(self, row: int) -> Picture:
        """The picture in the square of a row, uint8 [S,S,3]. The squares of the last image stay in memory."""
        index, margin, end = self._images[row], self.cutting.margin, self.cutting.margin + self.cutting.size
        if self._cut[0] != index:
            self._cut = index, self.cutting.squares(self.dataset.picture(index))
        cut = next(cut for cut in self._cut[1] if tuple(cut.place) == tuple(self.store.crops[row]))
        return Picture(cut.pixels[0, margin:end, margin:end], cut.valid)

    def _faded(self, codes: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """The codes of rows [n,P,Z], P cells, with next to nothing of patches without data."""
        of_rows, valid = codes(rows), self._valid(rows)
        return of_rows if valid is None else faded(of_rows, valid.to(of_rows.device))

    def _valid(self, rows: Tensor) -> Tensor | None:
        """Which cells of rows show data, those of patches that do, bool [n,P]; None where all do."""
        valid = self.store.valid(rows)
        if valid is None or self.density == 1:
            return valid
        cells = valid.unflatten(1, self.store.grid)
        return cells.repeat_interleave(self.density, 1).repeat_interleave(self.density, 2).flatten(1)

    def of_head(self, grouping: Grouping) -> np.ndarray:
        """int64 [N,classes] pixels of every group of a head in every class."""
        return self.confusion(head_codes(grouping, self.store), grouping.prototypes)

    def class_shares(self, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of this process: int64 [n] numbers of rows, and the share of each patch's pixels in every class,
        float32 [n,P,classes]; 0 in all classes for a patch without a label."""
        (h, w), S = self.store.grid, self.cutting.size
        patch = (torch.arange(S) * h // S)[:, None] * w + torch.arange(S) * w // S  # of every pixel, [S,S]
        pixels = torch.bincount(patch.flatten(), minlength=h * w)
        for start, squares, _ in self._batches("labels"):
            truth = torch.from_numpy(squares).long()
            cell = patch * classes + truth
            cell = cell + (torch.arange(len(truth)) * h * w * classes)[:, None, None]
            counts = torch.bincount(cell[truth < classes], minlength=len(truth) * h * w * classes)
            yield torch.arange(start, start + len(truth)), counts.view(len(truth), h * w, classes) / pixels[:, None]

    def kmeans(self, centres: Tensor) -> Scores:
        """Scores of plain k-means centres [K,D] on the same features, which any learning has to beat."""
        centres = self.processes.all(centres.cpu())[0].to(centres.device)
        return hungarian(self.confusion(self.store.rows, centres))

    def _batches(self, title: str) -> Iterator[tuple[int, np.ndarray, int]]:
        """Read the batches of this process, with a bar once they take long."""
        starts = range(self.processes.rank * BATCH, len(self._images), self.processes.size * BATCH)
        threads = min(THREADS, os.cpu_count() or 1)
        with closing(ahead(self._batch, starts, threads=threads, waiting=threads)) as read:
            yield from Bar(
                iterable=read,
                total=len(starts),
                desc=title,
                unit="batch",
                delay=SILENT_S,
                leave=False,
                disable=not self.progress,
            )

    def _batch(self, start: int) -> tuple[int, np.ndarray, int]:
        """(start, uint8 [n,S,S] of that row and the next ones; number of images with a label).

        Pixels without a label or without data are 255. Pictures are read again only where the store says that some of
        their pixels may have no data.
        """
        if start in self._kept:
            return start, self._kept[start], 0
        rows = range(start, min(start + BATCH, len(self._images)))
        squares = np.full((len(rows), self.cutting.size, self.cutting.size), IGNORE, np.uint8)
        labels, last = 0, -1
        label: np.ndarray | None = None
        for square, row in zip(squares, rows):
            index = self._images[row]
            if index != last:  # the rows of an image follow each other
                label, last = self.dataset.label(index), index
                labels += label is not None
                if label is not None and self.store.marked(row):
                    label = of_data(label, self.dataset.picture(index))
            if label is not None:
                square[:] = self.cutting.truth(label, self.store.crops[row])
        return start, squares, labels


class Wholes(NamedTuple):
    """The counts of whole pictures in each refinement, int64 [K,classes] by the numbers in masks, and which pictures
    could not be used: (name, reason)."""

    counts: dict[Refine, np.ndarray]
    skipped: list[tuple[str, str]]


@torch.no_grad()
def count_wholes(
    segmenter: Segmenter,
    dataset: Dataset,
    processes: Processes = ALONE,
    *,
    refinements: Sequence[Refine],
    mirror: bool = True,
    shifts: int = 1,
    short_side: int | None = None,
    progress: bool = True,
) -> Wholes:
    """Count every labelled pixel of every picture at its own size, each process a share of the pictures.

    A picture passes the backbone once for all refinements. mirror, shifts, short_side: as for `Segmenter.predict`.
    Memory: a picture and its label; of a map, some rows. UserError when no pixel is labelled, or no picture can be
    used.
    """
    cutting, classes = segmenter.cutting(short_side=short_side), len(classes_of(dataset))
    counts, skipped = np.zeros((len(refinements), len(segmenter.grouping), classes), np.int64), []
    bar = Bar(total=len(dataset), desc="evaluate", unit="image", delay=SILENT_S, leave=False, disable=not progress)
    with bar:
        for index in range(processes.rank, len(dataset), processes.size):
            try:
                with opened(dataset, index) as (picture, label):
                    require_patch(picture.pixels, segmenter.backbone.patch, dataset.names[index])
                    if label is not None:
                        views = Views(picture, cutting, segmenter.backbone, shifts, segmenter.upsampler)
                        codes = (codes for (codes,) in segmenter.code_bands(views, [segmenter.head], mirror))
                        ways = zip(refinements, shared(codes, len(refinements)))
                        labels = [segmenter.label_bands(views, part, picture, way) for way, part in ways]
                        of_picture = np.zeros_like(counts)
                        count_picture(of_picture, labels, label)
                        counts += of_picture
            except ImageError as error:
                skipped.append((dataset.names[index], error.reason))
            bar.update(min(processes.size, bar.total - bar.n))
    counts = processes.sum(torch.from_numpy(counts)).numpy()
    skipped = [image for part in processes.all(skipped) for image in part]
    if len(skipped) == len(dataset):
        (name, reason), *_ = skipped
        raise UserError(f"--data: none of the {len(dataset)} images can be used (first: {name}: {reason})")
    if not counts.any():
        raise UserError(
            f"--data: no pixel of the labels of {dataset.name} has a class, so nothing can be measured; "
            "write class numbers from 0 into the labels"
        )
    return Wholes(dict(zip(refinements, counts)), skipped)


@contextmanager
def opened(dataset: Dataset, index: int) -> Iterator[tuple[Picture, np.ndarray | Rows | None]]:
    """A picture and its label; maps of a folder are read as they are used. ImageError where one cannot be used."""
    if isinstance(dataset, ImageFolder):
        with dataset.opened(index) as pair:
            yield pair
    else:
        yield dataset.picture(index), dataset.label(index)


def count_picture(
    counts: Sequence[np.ndarray] | np.ndarray, ways: Sequence[Iterator[np.ndarray]], truth: np.ndarray | Rows
) -> None:
    """Add the pixels of a picture, labelled in several ways, to int64 [K,classes] of each way.

    Pixels without a class do not count, and neither do those without a group, because the picture has no data there.

    Args:
        ways: bands uint8 [n,W] from top to bottom. They advance together, so codes that they share can be dropped.
    """
    rows = [0] * len(ways)
    while (first := min(rows)) < len(truth):
        way = rows.index(first)
        band, of_way = next(ways[way]), counts[way]
        part, (groups, classes) = truth[first : first + len(band)], of_way.shape
        known = (part < classes) & (band < groups)
        cells = band[known].astype(np.int64) * classes + part[known]
        of_way += np.bincount(cells, minlength=of_way.size).reshape(of_way.shape)
        rows[way] += len(band)


def of_data(label: np.ndarray, picture: Picture) -> np.ndarray:
    """A label uint8 [H,W], IGNORE where its picture has no data."""
    return label if picture.valid is None else np.where(picture.valid, label, np.uint8(IGNORE))


def head_codes(
    grouping: Grouping, store: FeatureStore, mirrored: FeatureStore | None = None
) -> Callable[[Tensor], Tensor]:
    """From row numbers to codes, or to scores of merged groups; with a store of the mirrored squares, of the average of
    both codes, as in the paper."""
    return shifted_codes(grouping, [[store] if mirrored is None else [store, mirrored]], patch=1)


def shifted_codes(
    grouping: Grouping, stores: Sequence[Sequence[FeatureStore]], patch: int
) -> Callable[[Tensor], Tensor]:
    """As `head_codes`, from the stores of several shifts, each with that of its mirrored squares if any: all cells of
    the finer grid row by row. patch: its pixels."""
    head = grouping.head

    def codes(rows: Tensor) -> Tensor:
        maps, device = [], head.teacher.device
        for sides in stores:
            average = project(head, sides[0].rows(rows).to(device))
            for mirrored in sides[1:]:
                average = (average + project(head, mirrored.rows(rows).to(device))) / 2
            maps.append(average.unflatten(1, sides[0].grid))
        return grouping.scores(interleaved(maps, patch).flatten(1, 2))

    return codes


def require_same_rows(store: FeatureStore, mirrored: FeatureStore) -> None:
    """UserError unless both hold the same images; one that could not be read while features were made is missing."""
    if store.names == mirrored.names:
        return
    odd = sorted(set(store.names) ^ set(mirrored.names))[0]
    raise UserError(
        f"{odd}: is in only one of {store.folder} and {mirrored.folder}, the features of its image and of its mirror "
        "image; remove both folders and start again"
    )
