"""Labels and probabilities of a picture part by part, at one or several numbers of groups in one pass of the backbone.

Nothing of the whole picture's size is kept, so that memory grows with its width alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..backbones import Backbone
from ..backbones.upsampler import Upsampler
from ..config import Refine
from ..datasets import IGNORE
from ..datasets.cutting import Cutting
from ..datasets.reading import Picture, Rectangle
from .grouping import Grouping
from .model import Head
from .names import Names
from .refine import Plane, Refiner, refined_tiles
from .tiles import TOP, Start, shared
from .views import Views

LEVELS = 254  # a probability or margin p is stored as round(254 p); IGNORE, 255, stands where there is no data


class Part(NamedTuple):
    """A finished rectangle of a picture: `labels` uint8 [n,m], IGNORE without data, and `probs` float32 [n,m,K], which
    are NaN there; None unless they were asked for."""

    place: Rectangle
    labels: np.ndarray
    probs: np.ndarray | None = None


class Labeller(Protocol):
    """The part of a `Segmenter` that is needed here."""

    backbone: Backbone
    upsampler: Upsampler | None
    grouping: Grouping
    head: Head
    names: Names

    def cutting(self, scale: Any, short_side: int | None) -> Cutting: ...
    def refinement(self, refine: Refine | None) -> Refine: ...
    def band_start(self, views: Views, row: int) -> int: ...
    def code_bands(
        self, views: Views, heads: Sequence[Head], mirror: bool, first: int = 0
    ) -> Iterator[tuple[Tensor, ...]]: ...
    def label_bands(
        self, views: Views, codes: Iterable[Tensor], picture: Picture, refine: Refine, start: Start = TOP
    ) -> Iterator[np.ndarray]: ...


@torch.no_grad()
def parts_at(
    segmenters: Sequence[Labeller],
    picture: Picture,
    *,
    soft: bool = False,
    rows: Sequence[int] = (),
    mirror: bool = True,
    shifts: int = 1,
    short_side: int | None = None,
    scale: Any = None,
    refine: Refine | None = None,
) -> Iterator[tuple[int, Part]]:
    """Label a picture with each of these segmenters, which share a backbone -> (place among them, part).

    The parts of each cover the picture from top to bottom. Codes are computed once, and kept as long as one of the
    segmenters needs them.

    Args:
        rows: of pixels that are labelled already at the top, for each segmenter. The parts of each begin there or
            above, and are the same to the last bit as without it.
        soft: whether parts have probabilities. Without refinement their labels may differ from those without them where
            two groups are equally likely up to rounding.

    The other options are those of `Segmenter.predict`.
    """
    first = segmenters[0]
    views = Views(picture, first.cutting(scale, short_side), first.backbone, shifts, first.upsampler)
    refine, parts = first.refinement(refine), soft_parts if soft else hard_parts
    heads = list({id(segmenter.head): segmenter.head for segmenter in segmenters}.values())  # trained, fine, or both
    (height, width), rows = views.shape, rows or [0] * len(segmenters)
    starts = [start_of(one, views, row, refine, soft) for one, row in zip(segmenters, rows)]
    cell = first.band_start(views, min((start.cell for start in starts if start.pixel < height), default=0))
    bands = shared(first.code_bands(views, heads, mirror, cell), len(segmenters))
    of_each = [
        parts(
            segmenter,
            views,
            map(itemgetter(heads.index(segmenter.head)), copies),
            picture,
            refine,
            Start(start.pixel, cell),
        )
        for segmenter, copies, start in zip(segmenters, bands, starts)
    ]
    done = [start.pixel for start in starts]
    while min(done) < height:
        place = done.index(min(done))  # the one furthest behind, so that few bands are kept
        part = next(of_each[place])
        if part.place.right == width:
            done[place] = part.place.bottom
        yield place, part


def start_of(segmenter: Labeller, views: Views, row: int, refine: Refine, soft: bool) -> Start:
    """Where to begin so that the row `row` of pixels is labelled."""
    if row >= views.shape[0]:
        return Start(row, views.grid[0])
    start = Refiner(refine, segmenter.grouping, plane_of(views)).start(row)
    if refine != "none" or soft:
        return start
    return Start(row, max(0, int((row + 0.5) * views.grid[0] / views.size[0]) - 2))  # rows of labels have no rectangles


def plane_of(views: Views) -> Plane:
    return Plane(views.grid, views.size, views.shape, views.density)


def hard_parts(
    segmenter: Labeller, views: Views, codes: Iterable[Tensor], picture: Picture, refine: Refine, start: Start
) -> Iterator[Part]:
    """The labels of `Segmenter.label_bands`, as parts."""
    top, width = start.pixel, views.shape[1]
    for labels in segmenter.label_bands(views, codes, picture, refine, start):
        yield Part(Rectangle(top, 0, top + len(labels), width), labels)
        top += len(labels)


def soft_parts(
    segmenter: Labeller, views: Views, codes: Iterable[Tensor], picture: Picture, refine: Refine, start: Start
) -> Iterator[Part]:
    """Labels as `hard_parts` gives them, and probabilities, added where groups are merged."""
    names = segmenter.names
    sums = torch.from_numpy(names.merged(np.eye(names.groups, dtype=np.float32)).T).to(segmenter.backbone.device)
    refiner = Refiner(refine, segmenter.grouping, plane_of(views))
    scores = map(segmenter.grouping.scores, codes)
    for place, probs in refined_tiles(scores, refiner, picture, views.patches, start):
        labels, values = names.table[probs.argmax(-1).cpu().numpy()], (probs.float() @ sums).cpu().numpy()
        if picture.valid is not None:
            missing = ~picture.valid[place.top : place.bottom, place.left : place.right]
            labels[missing], values[missing] = IGNORE, np.nan
        yield Part(place, labels, values)


def margins(probs: np.ndarray) -> np.ndarray:
    """The lead of the likeliest group over the second, as stored: float [n,m,K] -> uint8 [n,m]; 1 for one group."""
    if probs.shape[-1] == 1:
        return stored(probs[..., 0])
    best = np.partition(probs, -2, axis=-1)
    return stored(best[..., -1] - best[..., -2])


def stored(values: np.ndarray) -> np.ndarray:
    """Shares of 0 to 1 as uint8 of 0 to LEVELS, and NaN as IGNORE."""
    return np.where(np.isnan(values), IGNORE, np.rint(np.nan_to_num(values) * LEVELS)).astype(np.uint8)
