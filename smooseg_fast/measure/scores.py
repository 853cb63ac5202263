"""Scores of a segmentation that was learnt without labels: clusters are matched to classes, then counted pixel by pixel.

K clusters, C classes. Everything starts from one table of counts, `confusion` [K, C], summed over the images of a set; which cluster
stands for which class is chosen with the labels (as everywhere in the field), by `hungarian` or by `majority`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..system.files import finite

_CHUNK = 1 << 22  # pixels counted at once: the working memory stays at some 100 MB whatever the image


@dataclass(frozen=True)
class Scores:
    """What a mapping from clusters to classes is worth. Fractions lie in 0..1.

    Every labelled pixel counts in `accuracy`; those of a cluster without a class are wrong, whatever their label. The IoU of a class is
    its right pixels over those that are labelled so or predicted so. A class is absent when no pixel is labelled so: its IoU is nan and
    left out of `miou`; a cluster mapped to it counts as a false positive of no class, and as missed pixels of the true ones.
    A class that is present but has no cluster has IoU 0. Without any labelled pixel accuracy and miou are nan.
    """

    mapping: tuple[int, ...]  # [K] the class of each cluster, -1 none
    accuracy: float
    miou: float
    iou: tuple[float, ...]  # [C]
    matching: str  # "hungarian" | "majority"
    class_pixels: tuple[int, ...]  # [C] labelled pixels of each class

    @property
    def pixels(self) -> int:
        """All labelled pixels."""
        return sum(self.class_pixels)

    def as_dict(self, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Ready for JSON: nan becomes None; classes are named by `class_names` (C of them), else by their numbers."""
        names = _names(class_names, len(self.iou))
        classes = [{"name": n, "pixels": p, "iou": v} for n, p, v in zip(names, self.class_pixels, self.iou)]
        clusters = [{"cluster": k, "class": names[c] if c >= 0 else None} for k, c in enumerate(self.mapping)]
        whole = {"matching": self.matching, "accuracy": self.accuracy, "miou": self.miou, "pixels": self.pixels}
        return finite({**whole, "classes": classes, "clusters": clusters})


def confusion(prediction: np.ndarray, label: np.ndarray, clusters: int, classes: int) -> np.ndarray:
    """Counts int64 [K, C] of pixels in cluster k with label c. Add the tables of several images.

    `prediction` and `label`: integers of one shape; predictions lie in 0..clusters-1; labels outside 0..classes-1 are ignored.
    ValueError for different shapes, other dtypes, a prediction out of range, and for clusters or classes below 1.
    """
    prediction, label = np.asarray(prediction), np.asarray(label)
    if clusters < 1 or classes < 1:
        raise ValueError(f"clusters and classes must be at least 1, got {clusters} and {classes}")
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} must have the same shape")
    for name, array in (("prediction", prediction), ("label", label)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} must hold integers, got {array.dtype}")
    if prediction.size and not 0 <= prediction.min() <= prediction.max() < clusters:
        raise ValueError(f"prediction must lie in 0..{clusters - 1}, got {prediction.min()}..{prediction.max()}")
    counts = np.zeros(clusters * classes, np.int64)
    prediction, label = prediction.reshape(-1), label.reshape(-1)
    for start in range(0, label.size, _CHUNK):
        k, c = prediction[start : start + _CHUNK], label[start : start + _CHUNK]
        known = (c >= 0) & (c < classes)
        counts += np.bincount(k[known].astype(np.int64) * classes + c[known].astype(np.int64), minlength=counts.size)
    return counts.reshape(clusters, classes)


def hungarian(confusion: np.ndarray) -> Scores:
    """One cluster to one class so that the most pixels of `confusion` [K, C] are right (Kuhn 1955).

    With K > C the clusters left over have no class, with K < C the classes left over no cluster. A pair that shares no pixel is left
    apart (-1), which changes no score. ValueError when `confusion` is not a table of counts.
    """
    counts = _checked(confusion)
    mapping = np.full(len(counts), -1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    shared = counts[rows, columns] > 0
    mapping[rows[shared]] = columns[shared]
    return _scores(counts, mapping, "hungarian")


def majority(confusion: np.ndarray) -> Scores:
    """Every cluster to the class that most of its pixels in `confusion` [K, C] have (ties: the lowest), many to one; an empty one to none.

    With many clusters this is close to 1 whatever was learnt (one cluster a pixel is perfect): compare it at equal K only.
    ValueError when `confusion` is not a table of counts.
    """
    counts = _checked(confusion)
    return _scores(counts, np.where(counts.any(1), counts.argmax(1), -1), "majority")


def table(scores_by_name: Mapping[str, Scores], class_names: Sequence[str] | None = None) -> str:
    """Plain text: a row a class (name, share of the labelled pixels, IoU in each of the scores), then mean IoU and accuracy, in %.

    Absent classes show "-". The shares are those of the first scores. ValueError without scores, or when the numbers of classes differ.
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
    """A fraction in %, one decimal, without the sign; "-" for nan."""
    return "-" if value != value else f"{100 * value:.1f}"


def _checked(confusion: np.ndarray) -> np.ndarray:
    counts = np.asarray(confusion)
    if counts.ndim != 2 or not counts.size or not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError(f"confusion must be a table [K, C] of counts, got {counts.dtype} {counts.shape}")
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
    """Columns of a terminal that `text` takes: two for a wide character, none for a combining mark."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    gaps = [" " * (width - _width(cell)) for cell, width in zip(cells, widths)]
    return "  ".join([cells[0] + gaps[0], *(gap + cell for cell, gap in zip(cells[1:], gaps[1:]))]).rstrip()
