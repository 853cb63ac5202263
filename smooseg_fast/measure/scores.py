"""Scores of a segmentation learnt without labels: match groups to classes, then count pixels.

K groups, C classes. Everything starts from the counts `confusion` [K, C] of pixels in group k of class c, summed over
the images of a set. The ground truth decides which group stands for which class (as everywhere in the field), by
`hungarian` or by `majority`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..config import Refine
from ..system.files import finite
from ..system.table import aligned


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
    matching: str  # "hungarian", "majority", or where else the mapping comes from
    class_pixels: tuple[int, ...]  # [C] labelled pixels of each class

    @property
    def pixels(self) -> int:
        """The number of all labelled pixels."""
        return sum(self.class_pixels)

    def as_dict(self, class_names: Sequence[str], numbers: Sequence[int] | None = None) -> dict[str, Any]:
        """Convert to a dict ready for JSON: nan becomes None. `numbers` [K] are those of the groups in masks [0..K-1].
        ValueError unless `class_names` are [C]."""
        classes = [
            {"name": name, "pixels": pixels, "iou": iou}
            for name, pixels, iou in zip(class_names, self.class_pixels, self.iou, strict=True)
        ]
        pairs = zip(range(len(self.mapping)) if numbers is None else numbers, self.mapping, strict=True)
        clusters = [{"cluster": k, "class": class_names[c] if c >= 0 else None} for k, c in pairs]
        means = {"matching": self.matching, "accuracy": self.accuracy, "miou": self.miou, "pixels": self.pixels}
        return finite({**means, "classes": classes, "clusters": clusters})


def hungarian(confusion: np.ndarray) -> Scores:
    """Match one group to one class so that the most pixels of `confusion` [K, C] are right (Kuhn 1955).

    With K > C some groups have no class, with K < C some classes no group. Pairs that share no pixel stay unmatched
    (-1), which changes no score.
    """
    mapping = np.full(len(confusion), -1)
    rows, columns = linear_sum_assignment(confusion, maximize=True)
    shared = confusion[rows, columns] > 0
    mapping[rows[shared]] = columns[shared]
    return matched(confusion, mapping, "hungarian")


def majority(confusion: np.ndarray) -> Scores:
    """Match every group to the class of most of its pixels in `confusion` [K, C] (ties: the lowest); an empty one to
    none.

    With many groups the scores come close to 1 whatever was learnt (one group a pixel is perfect): compare at equal K
    only.
    """
    return matched(confusion, np.where(confusion.any(1), confusion.argmax(1), -1), "majority")


def proposed_names(confusion: np.ndarray, class_names: Sequence[str]) -> dict[int, str]:
    """The class of each group that `hungarian` matches and that most of its labelled pixels are of, by its row."""
    mapping = hungarian(confusion).mapping
    return {k: class_names[c] for k, c in enumerate(mapping) if c >= 0 and 2 * confusion[k, c] > confusion[k].sum()}


def scores_table(
    scores_by_name: Mapping[str, Scores], class_names: Sequence[str], groups: Sequence[str] | None = None
) -> str:
    """Write a table in %: a row a class (name, share of the labelled pixels, an IoU for each scores), then the means.

    Absent classes show "-". The scores are of one confusion. groups: the names [K] of its groups, for a column with the
    one that the first scores match to each class.
    """
    scores = list(scores_by_name.values())
    pixels = scores[0].class_pixels
    shares = [percent(count / sum(pixels)) if count else "-" for count in pixels]
    rows = [["class", "share", *scores_by_name]]
    rows += [[*row, *(percent(s.iou[c]) for s in scores)] for c, row in enumerate(zip(class_names, shares))]
    rows.append(["mean IoU", "", *(percent(s.miou) for s in scores)])
    rows.append(["accuracy", "", *(percent(s.accuracy) for s in scores)])
    if groups is not None:
        group_of = {c: groups[k] for k, c in enumerate(scores[0].mapping)}
        column = ["group", *(group_of.get(c, "-") for c in range(len(class_names))), "", ""]
        rows = [[row[0], cell, *row[1:]] for row, cell in zip(rows, column)]
    head, *body = aligned(rows, left=[0] if groups is None else [0, 1]).splitlines()
    rule = "-" * len(head)
    return "\n".join([head, rule, *body[:-2], rule, *body[-2:]])


def by_refinement(
    rows: Mapping[Refine, Mapping[str, Scores]], class_names: Sequence[str], numbers: Sequence[int] | None = None
) -> dict[str, Any]:
    """For JSON: {refinement: {matching: scores}}. numbers: as for `Scores.as_dict`."""
    return {
        way: {name: scores.as_dict(class_names, numbers) for name, scores in row.items()} for way, row in rows.items()
    }


def percent(value: float) -> str:
    """Write a fraction in %, with one decimal and without the sign; "-" for nan."""
    return "-" if value != value else f"{100 * value:.1f}"


def matched(counts: np.ndarray, mapping: np.ndarray, matching: str) -> Scores:
    """Score `counts` [K, C] under a given mapping [K] from groups to classes, -1 for none; `matching` says whence."""
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
