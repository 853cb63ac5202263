"""Cached features and labels -> confusion counts over a whole set, of a trained head or of plain k-means."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

import smooseg_kernels as sk

from ..datasets import IGNORE, Dataset
from ..datasets.images import cut_squares
from ..errors import UserError
from ..features.sample import BATCH
from ..features.store import FeatureStore
from ..segment.model import Head, project
from ..system.ahead import ahead
from ..system.processes import ALONE, Processes
from ..system.progress import Bar

KEPT_BYTES = 64 * 2**20  # label squares that a process keeps: 650 of 320 pixels
THREADS = 4  # that read labels, at most, each a batch
SILENT_S = 2.0  # that reading or counting may take before it shows a bar


class LabelSquares:
    """The labels of a store of central squares: all are checked at once, and read again whenever they are counted.

    KEPT_BYTES of them stay in memory, which is all of most sets; the others only pass through it.

    Args:
        size: S, the side of a square in pixels.
        processes: each reads the batches alone that it will count.
        progress: show a bar where reading or counting takes long.

    Raises:
        UserError: when a label does not fit its image, or no pixel of any square is labelled.
    """

    def __init__(
        self, dataset: Dataset, store: FeatureStore, size: int, processes: Processes = ALONE, progress: bool = True
    ):
        self.dataset, self.size, self.processes, self.progress = dataset, size, processes, progress
        places = {name: index for index, name in enumerate(dataset.names)}
        self._images = [places[name] for name in store.names]
        self._kept: dict[int, np.ndarray] = {}
        labelled, room = torch.zeros(2, dtype=torch.int64), KEPT_BYTES // (BATCH * size**2)
        with self.bar("labels", "label") as bar:
            for start, squares, labels in self._read():
                labelled += torch.tensor([labels, np.count_nonzero(squares != IGNORE)])
                if len(self._kept) < room:
                    self._kept[start] = squares
                bar.update(min(processes.size * BATCH, len(store) - bar.n))
        labels, pixels = processes.sum(labelled).tolist()
        if not labels:
            raise UserError(f"--data: none of the {len(store)} images of {dataset.name} has a label")
        if not pixels:
            raise UserError(
                f"--data: every pixel in the central squares of all {labels} labels of {dataset.name} is {IGNORE} "
                "(ignore), so nothing can be measured; write class numbers from 0 into the labels"
            )

    def bar(self, name: str, unit: str) -> Bar:
        """A bar over all rows, which shows once they take long."""
        total, off = len(self._images), not self.progress
        return Bar(total=total, desc=name, unit=unit, delay=SILENT_S, leave=False, disable=off)

    def batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """(rows int64 [n], their labels uint8 [n,S,S], 255 without a label) of every batch of this process."""
        for start, squares, _ in self._read():
            yield torch.arange(start, start + len(squares)), torch.from_numpy(squares)

    def _read(self) -> Iterator[tuple[int, np.ndarray, int]]:
        starts = range(self.processes.rank * BATCH, len(self._images), self.processes.size * BATCH)
        threads = min(THREADS, os.cpu_count() or 1)
        return ahead(self._batch, starts, threads=threads, waiting=threads)

    def _batch(self, start: int) -> tuple[int, np.ndarray, int]:
        """(start, uint8 [n,S,S] of that row and the next ones, number of them that have a label)"""
        if start in self._kept:
            return start, self._kept[start], 0
        labels = [self.dataset.label(index) for index in self._images[start : start + BATCH]]
        squares = np.full((len(labels), self.size, self.size), IGNORE, np.uint8)
        for square, label in zip(squares, labels):
            if label is not None:
                square[:] = cut_squares(label, self.size, "center")[0][1]
        return start, squares, sum(label is not None for label in labels)


def confusion_of(
    codes: Callable[[Tensor], Tensor], prototypes: Tensor, grid: tuple[int, int], labels: LabelSquares, classes: int
) -> np.ndarray:
    """int64 [K,classes] over all labelled pixels. `codes` gives [n,P,Z] for int64 [n] numbers of rows.

    Several processes count different batches, and all get the sum, which equals that of one process to the last pixel.
    """
    counts = torch.zeros(len(prototypes), classes, dtype=torch.int64)
    with closing(labels.batches()) as batches, labels.bar("scores", "image") as bar:
        for rows, squares in batches:
            truth = squares.to(prototypes.device)
            _, part = sk.assign(codes(rows), prototypes, grid=grid, size=truth.shape[1:], labels=truth, classes=classes)
            counts += part.cpu()
            bar.update(min(labels.processes.size * len(rows), bar.total - bar.n))
    return labels.processes.sum(counts).numpy()


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
