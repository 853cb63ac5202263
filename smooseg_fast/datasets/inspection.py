"""Opening images and labels to see what a dataset holds: sizes, shares of the classes, and the files that cannot be
used."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..errors import UserError
from ..system.ahead import ahead
from ..system.progress import Bar
from .base import IGNORE, Dataset, Files, classes_of, extent
from .evenly import evenly
from .folder import ImageFolder

LOOKED_AT = 16  # images
COUNTED = 200  # labels whose pixels are counted before a run
LISTED = 8  # classes whose shares a line lists
TINT = 4.0  # mean difference of the colour channels, of 255, below which an image is grey, with the noise of JPEG


@dataclass
class Inspection:
    """The result of opening `opened` images of a dataset. Class counts are over the labels that could be read."""

    dataset: Dataset
    opened: int
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width)
    broken: list[str] = field(default_factory=list)  # a line for each image
    wrong: list[str] = field(default_factory=list)  # a line for each label
    labels: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(IGNORE + 1, np.int64))  # pixels of each class

    @property
    def complete(self) -> bool:
        """True when every image was opened."""
        return self.opened == len(self.dataset)

    def evenly_spaced(self, count: int) -> list[int]:
        """Numbers of `count` images that are evenly spaced over the dataset, or of all."""
        return evenly(range(len(self.dataset)), count)

    def shares(self) -> np.ndarray:
        """[classes] shares of the labelled pixels; 0 without any."""
        counts = self.counts[: len(self.dataset.class_names or ())]
        return counts / max(counts.sum(), 1)

    def line(self) -> str:
        """How many images there are, how many were opened, and how large they are."""
        parts = [f"{len(self.dataset)} images" + (", held out" if self.dataset.held_out else "")]
        parts.append(f"{'all' if self.complete else self.opened} opened, {self.labels} of them with a label")
        if self.sizes:
            [(common, often)] = self.sizes.most_common(1)
            least, most = (extent(end(self.sizes, key=math.prod)) for end in (min, max))
            rest = "" if len(self.sizes) == 1 else f" in {often} of them; from {least} to {most}"
            parts.append(f"{extent(common)} pixels{rest}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Classes:
    """Pixels int64 [256] of every class, and of IGNORE at the end, in so many `labels` of some splits."""

    dataset: Dataset
    labels: dict[str, int]  # by the name of the split
    complete: bool
    counts: np.ndarray

    def line(self) -> str:
        """How many classes there are, and where their pixels were counted."""
        where = " and ".join(f"{count} labels of {split}" for split, count in self.labels.items())
        where = f"all {where}" if self.complete else f"{where} (a sample)"
        return f"{len(classes_of(self.dataset))}; share of the labelled pixels in {where}"

    def shares(self) -> str:
        """The shares of the largest classes, and of pixels without a label."""
        names = classes_of(self.dataset)
        counts = self.counts[: len(names)]
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda number: -counts[number])
        shares = [f"{names[number]} {counts[number] / counts.sum():.1%}" for number in order[:LISTED]]
        if len(order) > LISTED:
            shares.append(f"{counts[order[LISTED:]].sum() / counts.sum():.1%} in {len(order) - LISTED} others")
        return f"{', '.join(shares)}; not labelled {self.counts[IGNORE] / max(self.counts.sum(), 1):.1%} of all pixels"

    def require_two(self) -> None:
        """UserError where all labels hold one class, on which any segmentation scores the same."""
        seen = self.counts[: len(classes_of(self.dataset))]
        if isinstance(self.dataset, ImageFolder) and self.dataset.labelling is not None:
            seen = np.array(self.dataset.labelling.scheme.seen)
        elif not self.complete:
            return
        if np.count_nonzero(seen) == 1:
            name = classes_of(self.dataset)[int(np.argmax(seen))]
            raise UserError(
                f"--data: every labelled pixel of {self.dataset.name} is of one class, {name}, so a score would say "
                "nothing; label two classes or more, or take the labels out to learn without figures"
            )


def label_lines(dataset: Dataset) -> list[tuple[str, str]]:
    """Tell what the labels mean before a run measures on them: (title, line). UserError where scores would say nothing.

    Reads at most COUNTED labels, evenly spaced; those that cannot be read are not counted.
    """
    total = len(dataset)
    count = min(COUNTED, total)
    counts, labels = np.zeros(IGNORE + 1, np.int64), 0
    _ = dataset.class_names  # UserError where the labels hold no classes

    def read(index: int) -> np.ndarray | None:
        with suppress(UserError):
            return dataset.label(index)
        return None

    with closing(ahead(read, (place * total // count for place in range(count)), threads=4, waiting=4)) as truths:
        for truth in truths:
            if truth is not None:
                counts += np.bincount(truth.ravel(), minlength=IGNORE + 1)
                labels += 1
    split = "val" if dataset.held_out else "train"
    classes = Classes(dataset, {split: labels}, count == total, counts)
    if counts[:IGNORE].any():
        classes.require_two()
    notes = dataset.label_notes if isinstance(dataset, Files) else ()
    return [*(("labels", note) for note in notes), ("classes", f"{classes.line()}: {classes.shares()}")]


def is_grey(dataset: Dataset) -> bool:
    """True when most of a few images, evenly spaced, have no colour; without any that opens, False."""
    tints = []
    for index in evenly(range(len(dataset)), LOOKED_AT):
        with suppress(UserError):
            small = dataset.image(index)[::8, ::8].astype(np.int16)
            tints.append(float((small.max(2) - small.min(2)).mean()))
    return len(tints) > 0 and float(np.median(tints)) < TINT


def inspect(dataset: Dataset, split: str, sample: int) -> Inspection:
    """Open `sample` evenly spaced images, or with 0 all, and their labels, with a progress line."""
    _ = dataset.class_names  # counted here, where they have to be: its own progress line should not cross ours
    count = min(sample, len(dataset)) or len(dataset)
    inspection = Inspection(dataset, count)
    chosen = inspection.evenly_spaced(count)
    bar = Bar(total=count, desc=f"check {split}", unit="image", leave=False, file=sys.stderr)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for size, counts, problem in pool.map(partial(look, dataset), chosen):
                if size is not None:
                    inspection.sizes[size] += 1
                if problem is not None:
                    (inspection.broken if size is None else inspection.wrong).append(problem)
                if counts is not None:
                    inspection.labels += 1
                    inspection.counts += counts
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return inspection


def look(dataset: Dataset, index: int) -> tuple[tuple[int, int] | None, np.ndarray | None, str | None]:
    """(height and width of an image, pixels of each class in its label, what is wrong with either)."""
    size = None
    try:
        size = dataset.image(index).shape[:2]
        if isinstance(dataset, ImageFolder) and dataset.in_windows(index):  # of which a part was read
            size = dataset.size(index)
        label = dataset.label(index)
    except UserError as error:
        return size, None, str(error)
    return size, None if label is None else np.bincount(label.ravel(), minlength=IGNORE + 1), None
