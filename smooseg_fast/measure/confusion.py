"""Cached features and labels -> confusion counts over a whole set, of a trained head or of plain k-means."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

import smooseg_kernels as sk

from ..datasets import IGNORE, Dataset, classes_of
from ..datasets.images import cut_squares
from ..errors import UserError
from ..features.sample import BATCH
from ..features.store import FeatureStore
from ..segment.model import Head, project
from ..system.ahead import ahead
from ..system.processes import ALONE, Processes
from ..system.progress import SILENT_S, Bar
from .scores import Scores, hungarian

KEPT_BYTES = 64 * 2**20  # label squares that a process keeps: 650 of 320 pixels
THREADS = 4  # that read labels, at most, each a batch


class LabelSquares:
    """The labels of a store of central squares: all are checked at once, and read again whenever they are counted.

    KEPT_BYTES of them stay in memory, which is all of most sets; the others only pass through it.

    Args:
        size: S, the side of a square in pixels.
        processes: each reads the batches alone that it will count; all ask for the same counts in the same order.
        progress: show a bar where reading or counting takes long.

    Raises:
        UserError: when a label does not fit its image, or no pixel of any square is labelled.
    """

    def __init__(
        self, dataset: Dataset, store: FeatureStore, size: int, processes: Processes = ALONE, progress: bool = True
    ):
        self.dataset, self.store, self.size = dataset, store, size
        self.processes, self.progress = processes, progress
        places = {name: index for index, name in enumerate(dataset.names)}
        self._images = [places[name] for name in store.names]
        self._kept: dict[int, np.ndarray] = {}
        labelled, room = torch.zeros(2, dtype=torch.int64), KEPT_BYTES // (BATCH * size**2)
        for start, squares, labels in self._batches("labels"):
            labelled += torch.tensor([labels, np.count_nonzero(squares != IGNORE)])
            if len(self._kept) < room:
                self._kept[start] = squares
        labels, pixels = processes.sum(labelled).tolist()
        if not labels:
            raise UserError(f"--data: none of the {len(store)} images of {dataset.name} has a label")
        if not pixels:
            raise UserError(
                f"--data: every pixel in the central squares of all {labels} labels of {dataset.name} is {IGNORE} "
                "(ignore), so nothing can be measured; write class numbers from 0 into the labels"
            )

    def confusion(self, codes: Callable[[Tensor], Tensor], prototypes: Tensor) -> np.ndarray:
        """int64 [K,classes] over all labelled pixels. `codes` gives [n,P,Z] for int64 [n] numbers of rows.

        Several processes count different batches, and all get the sum, which equals that of one process to the last
        pixel.
        """
        classes = len(classes_of(self.dataset))
        counts = torch.zeros(len(prototypes), classes, dtype=torch.int64)
        for start, squares, _ in self._batches("scores"):
            truth = torch.from_numpy(squares).to(prototypes.device)
            rows, grid = torch.arange(start, start + len(truth)), self.store.grid
            part = sk.assign(codes(rows), prototypes, grid=grid, size=truth.shape[1:], labels=truth, classes=classes)[1]
            counts += part.cpu()
        return self.processes.sum(counts).numpy()

    def of_head(self, head: Head) -> np.ndarray:
        """int64 [K,classes] pixels of every group of a head in every class."""
        return self.confusion(head_codes(head, self.store), head.teacher)

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
        """(start, uint8 [n,S,S] of that row and the next ones, 255 without a label; number of images with a label)"""
        if start in self._kept:
            return start, self._kept[start], 0
        labels = [self.dataset.label(index) for index in self._images[start : start + BATCH]]
        squares = np.full((len(labels), self.size, self.size), IGNORE, np.uint8)
        for square, label in zip(squares, labels):
            if label is not None:
                square[:] = cut_squares(label, self.size, "center")[0][1]
        return start, squares, sum(label is not None for label in labels)


def head_codes(head: Head, store: FeatureStore, mirrored: FeatureStore | None = None) -> Callable[[Tensor], Tensor]:
    """From row numbers to codes; with a store of the mirrored squares, to the average of both, as in the paper."""

    def codes(rows: Tensor) -> Tensor:
        device = head.teacher.device
        plain = project(head, store.rows(rows).to(device))
        return plain if mirrored is None else (plain + project(head, mirrored.rows(rows).to(device))) / 2

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
