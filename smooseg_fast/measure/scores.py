"""Scores of a segmentation learnt without labels: match groups to classes, then count pixels.

K groups, C classes. Everything starts from the counts `confusion` [K, C] of pixels in group k of class c, summed over
the images of a set. The ground truth decides which group stands for which class (as everywhere in the field), by
`hungarian` or by `majority`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..system.files import finite


@dataclass(frozen=True)
class Scores:
    """Accuracy and IoU under one mapping from groups to classes. Fractions lie in 0..1.

    Every labelled pixel counts in `accuracy`; those in a group without a class are wrong. The IoU of a class is its
    right pixels over all pixels of that truth or that prediction. A class is absent when no pixel has it as truth: its
    IoU is nan and `miou` leaves it out; a group mapped to it is a false positive of no class, and missed pixels of the
    true ones. A class that is present but has no group has IoU 0. Without any labelled pixel accuracy and miou are nan.
    """

    mapping: tuple[int, ...]  # [K] the class of each group, -1 none
    accuracy: float
    miou: float
    iou: tuple[float, ...]  # [C]
    matching: str  # "hungarian" | "majority"
    class_pixels: tuple[int, ...]  # [C] labelled pixels of each class

    @property
    def pixels(self) -> int:
        """The number of all labelled pixels."""
        return sum(self.class_pixels)

    def as_dict(self, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Convert to a dict ready for JSON: nan becomes None; without `class_names` [C], numbers name the classes."""
        names = _names(class_names, len(self.iou))
        classes = [{"name": n, "pixels": p, "iou": v} for n, p, v in zip(names, self.class_pixels, self.iou)]
        clusters = [{"cluster": k, "class": names[c] if c >= 0 else None} for k, c in enumerate(self.mapping)]
        means = {"matching": self.matching, "accuracy": self.accuracy, "miou": self.miou, "pixels": self.pixels}
        return finite({**means, "classes": classes, "clusters": clusters})


def hungarian(confusion: np.ndarray) -> Scores:
    """Match one group to one class so that the most pixels of `confusion` [K, C] are right (Kuhn 1955).

    With K > C some groups have no class, with K < C some classes no group. Pairs that share no pixel stay unmatched
    (-1), which changes no score. ValueError when `confusion` does not hold counts.
    """
    counts = _checked(confusion)
    mapping = np.full(len(counts), -1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    shared = counts[rows, columns] > 0
    mapping[rows[shared]] = columns[shared]
    return _scores(counts, mapping, "hungarian")


def majority(confusion: np.ndarray) -> Scores:
    """Match every group to the class of most of its pixels in `confusion` [K, C] (ties: the lowest); an empty one to
    none.

    With many groups the scores come close to 1 whatever was learnt (one group a pixel is perfect): compare at equal K
    only. ValueError when `confusion` does not hold counts.
    """
    counts = _checked(confusion)
    return _scores(counts, np.where(counts.any(1), counts.argmax(1), -1), "majority")


def scores_table(scores_by_name: Mapping[str, Scores], class_names: Sequence[str] | None = None) -> str:
    """Write a table in %: a row a class (name, share of the labelled pixels, an IoU for each scores), then the means.

    Absent classes show "-". The shares are those of the first scores. ValueError without scores, or when they differ in
    the number of classes.
    """
    scores = list(scores_by_name.values())
    if not scores:
        raise ValueError("scores_by_name is empty")
    names = _names(class_names, len(scores[0].iou))
    if any(len(s.iou) != len(names) for s in scores):
        raise ValueError("scores of different numbers of classes cannot share a table")
    shares = [pixels / max(scores[0].pixels, 1) or float("nan") for pixels in scores[0].class_pixels]
    head = ["class", "share", *scores_by_name]
    classes = [
        [name, *map(percent, (share, *(s.iou[c] for s in scores)))]
        for c, (name, share) in enumerate(zip(names, shares))
    ]
    means = [
        ["mean IoU", "", *(percent(s.miou) for s in scores)],
        ["accuracy", "", *(percent(s.accuracy) for s in scores)],
    ]
    widths = [max(map(_width, column)) for column in zip(head, *classes, *means)]
    rule = ["-" * width for width in widths]
    return "\n".join(_line(row, widths) for row in (head, rule, *classes, rule, *means))


def percent(value: float) -> str:
    """Write a fraction in %, with one decimal and without the sign; "-" for nan."""
    return "-" if value != value else f"{100 * value:.1f}"


def _checked(confusion: np.ndarray) -> np.ndarray:
    counts = np.asarray(confusion)
    if counts.ndim != 2 or not counts.size or not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError(f"confusion must hold counts [K, C], got {counts.dtype} {counts.shape}")
    return counts.astype(np.int64, copy=False)


def _scores(counts: np.ndarray, mapping: np.ndarray, matching: str) -> Scores:
    merged = np.zeros((counts.shape[1], counts.shape[1]), np.int64)  # [predicted class, true class]
    np.add.at(merged, mapping[mapping >= 0], counts[mapping >= 0])
    right, labelled = merged.diagonal(), counts.sum(0)
    present = labelled > 0
    iou = np.full(len(labelled), np.nan)
    iou[present] = right[present] / (labelled + merged.sum(1) - right)[present]
    return Scores(
        mapping=tuple(mapping.tolist()),
        accuracy=float(right.sum() / labelled.sum()) if present.any() else float("nan"),
        miou=float(iou[present].mean()) if present.any() else float("nan"),
        iou=tuple(iou.tolist()),
        matching=matching,
        class_pixels=tuple(labelled.tolist()),
    )


def _names(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    names = tuple(map(str, range(classes))) if class_names is None else tuple(class_names)
    if len(names) != classes:
        raise ValueError(f"{len(names)} class names for {classes} classes")
    return names


def _width(text: str) -> int:
    """Return the columns that `text` takes in a terminal: two for a wide character, none for a combining mark."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    gaps = [" " * (width - _width(cell)) for cell, width in zip(cells, widths)]
    return "  ".join([cells[0] + gaps[0], *(gap + cell for cell, gap in zip(cells[1:], gaps[1:]))]).rstrip()
