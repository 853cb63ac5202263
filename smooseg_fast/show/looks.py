"""The look at an image for its tile of the page, collected from its codes as they pass by in bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from smooseg_kernels.rows import unit_rows

from ..datasets import IGNORE
from ..segment.grouping import Grouping
from ..segment.model import Head
from ..segment.refine import TEMPERATURE


@dataclass(frozen=True)
class Look:
    """The labels of one image's patches, for its tile.

    Attributes:
        fine: the fine group of every cell, uint8 [h,w], IGNORE without data; None without a tree.
        seen: the share of the cells' rows and columns that lie on the image: the last ones may reach beyond it.
        certainty: the mean over cells of the probability of the best group, less that of the second; 0 to 1.
    """

    fine: np.ndarray | None
    seen: tuple[float, float]
    certainty: float | None


@dataclass(frozen=True)
class Band:
    """The part of a look in a band of cells.

    Attributes:
        row, rows: its first row of cells, and how many it has.
        labels: fine groups of every `step`-th cell, uint8 [n,m]; None without a tree.
        margins: the sum over cells, for each number of groups.
        count: cells with data.
    """

    row: int
    rows: int
    labels: np.ndarray | None
    margins: list[float]
    count: int


class Keeper(Protocol):
    """Keeps the bands of an image on a disk, see `unfinished.Unfinished`."""

    def bands(self) -> list[Band]: ...
    def see(self, band: Band) -> None: ...


class Looking:
    """Collects the `Look` of an image, at several numbers of groups, while its codes pass by in `bands`.

    Args:
        fine: the head of the fine groups, or None without a tree.
        valid: which cells show data, bool [h,w]; None if all do.
        step: every how many rows and columns of cells a fine group is kept.
    """

    def __init__(self, groupings: Sequence[Grouping], fine: Head | None, valid: np.ndarray | None, step: int = 1):
        self._groupings, self._fine, self._valid, self._step = groupings, fine, valid, step
        heads = [grouping.head for grouping in groupings] + ([] if fine is None else [fine])
        self._heads = list({id(head): head for head in heads}.values())
        self.bands: list[Band] = []

    @torch.no_grad()
    def see(self, codes: Mapping[int, Tensor]) -> Band:
        """Take in the next band: codes [n,w,Z] by the `id` of their head."""
        band, row = next(iter(codes.values())), self.bands[-1].row + self.bands[-1].rows if self.bands else 0
        valid = torch.ones(band.shape[:2], dtype=torch.bool)
        if self._valid is not None:
            valid = torch.from_numpy(self._valid[row : row + len(band)])
        cosines = {id(head): cosines_of(codes[id(head)], head) for head in self._heads}
        labels, margins = None, [margins_of(grouping, cosines[id(grouping.head)]) for grouping in self._groupings]
        sums = [float(margin[valid.to(margin.device)].sum()) for margin in margins]
        if self._fine is not None:
            labels = cosines[id(self._fine)].argmax(-1).to(torch.uint8).cpu().numpy()
            labels[~valid.numpy()] = IGNORE
            labels = np.ascontiguousarray(labels[-row % self._step :: self._step, :: self._step])
        self.bands.append(Band(row, len(band), labels, sums, int(valid.sum())))
        return self.bands[-1]

    def look(self, place: int, height: int, seen: tuple[float, float]) -> Look:
        """That of one of the groupings, once the bands have passed. height: rows of cells; seen: as in `Look`."""
        fine, maps = None, [band.labels for band in self.bands if band.labels is not None]
        if maps:
            rows, height = np.concatenate(maps), -(-height // self._step)
            fine = np.pad(rows, ((0, height - len(rows)), (0, 0)), "edge")
        count = sum(band.count for band in self.bands)
        return Look(fine, seen, sum(band.margins[place] for band in self.bands) / count if count else None)


def cosines_of(codes: Tensor, head: Head) -> Tensor:
    """The cosines [n,w,K] of codes [n,w,Z] with the prototypes of their head."""
    return unit_rows(codes.float()) @ unit_rows(head.teacher.float()).mT


def margins_of(grouping: Grouping, cosines: Tensor) -> Tensor:
    """The probability of the best group less that of the second, of cosines [n,w,K] with all prototypes -> [n,w]; 1 for
    a single group."""
    logits = TEMPERATURE * (cosines if grouping.groups is None else grouping.merged(cosines))
    if logits.shape[-1] == 1:
        return torch.ones_like(logits[..., 0])
    best = (logits.topk(2, -1).values - logits.logsumexp(-1, keepdim=True)).exp()  # a softmax of few is slow
    return best[..., 0] - best[..., 1]
