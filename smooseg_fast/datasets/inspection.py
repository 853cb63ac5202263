"""Opening images and labels to see what a dataset holds: sizes, shares of the classes, and the files that cannot be
used."""

from __future__ import annotations

import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError
from ..system.progress import Bar
from .base import IGNORE, Dataset, extent
from .images import ImageError

TINY_PIXELS = 16  # an image with a shorter side is called small: about two patches of a backbone


@dataclass
class Inspection:
    """The result of opening `opened` images of a dataset. Class counts are over the labels that could be read."""

    dataset: Dataset
    opened: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width)
    small: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # a line for each image
    wrong: list[str] = field(default_factory=list)  # a line for each label
    labels: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(IGNORE + 1, np.int64))  # pixels of each class

    @property
    def complete(self) -> bool:
        """True when every image was opened."""
        return self.opened == len(self.dataset)

    def add(self, index: int, size: tuple[int, int] | str, counts: np.ndarray | str | None) -> None:
        """Take in what `look` returned for an image."""
        self.opened += 1
        if isinstance(size, str):
            self.broken.append(size)
        else:
            self.sizes[size] += 1
            if min(size) < TINY_PIXELS:
                self.small.append(self.dataset.names[index])
        if isinstance(counts, str):
            self.wrong.append(counts)
        elif counts is not None:
            self.labels += 1
            self.counts += counts

    def shares(self) -> np.ndarray:
        """[classes] shares of the labelled pixels; NaN without any."""
        counts = self.counts[: len(self.dataset.class_names or ())]
        total = counts.sum()
        return counts / total if total else np.full(len(counts), np.nan)

    def line(self) -> str:
        """How many images there are, how many were opened, and how large they are."""
        count = len(self.dataset)
        parts = [f"{count} images" + (", held out" if self.dataset.held_out else "")]
        parts.append(f"{'all' if self.complete else self.opened} opened, {self.labels} of them with a label")
        if self.sizes:
            (common, often), *_ = self.sizes.most_common(1)
            least, most = (extent(end(self.sizes, key=lambda size: size[0] * size[1])) for end in (min, max))
            rest = "" if len(self.sizes) == 1 else f" in {often} of them; from {least} to {most}"
            parts.append(f"{extent(common)} pixels{rest}")
        return "; ".join(parts)


def inspect(dataset: Dataset, split: str, sample: int) -> Inspection:
    """Open `sample` evenly spaced images, or with 0 all, and their labels, with a progress line."""
    inspection = Inspection(dataset)
    _ = dataset.class_names  # counted here, where they have to be: its own progress line should not cross ours
    count = min(sample, len(dataset)) or len(dataset)
    chosen = [place * len(dataset) // count for place in range(count)]
    bar = Bar(total=count, desc=f"check {split}", unit="image", leave=False, file=sys.stderr)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for index, (size, counts) in zip(chosen, pool.map(lambda index: look(dataset, index), chosen)):
                inspection.add(index, size, counts)
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return inspection


def look(dataset: Dataset, index: int) -> tuple[tuple[int, int] | str, np.ndarray | str | None]:
    """(height and width of an image, or why it cannot be used; pixels of each class, why its label cannot be used, or
    None without)."""
    try:
        size = dataset.image(index).shape[:2]
    except ImageError as error:
        return str(error), None
    try:
        label = dataset.label(index)
    except UserError as error:
        return size, str(error)
    return size, None if label is None else np.bincount(label.ravel(), minlength=IGNORE + 1)
