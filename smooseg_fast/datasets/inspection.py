"""Opening images and labels to see what a dataset holds: sizes, shares of the classes, and the files that cannot be
used."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..errors import UserError
from ..system.progress import Bar
from .base import IGNORE, Dataset, extent


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
        total = len(self.dataset)
        count = min(count, total)
        return [place * total // count for place in range(count)]

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
        label = dataset.label(index)
    except UserError as error:
        return size, None, str(error)
    return size, None if label is None else np.bincount(label.ravel(), minlength=IGNORE + 1), None
