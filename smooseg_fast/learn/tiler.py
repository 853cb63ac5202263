"""The tile of an image of a run: its picture, and labels from its cached features, without the backbone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import FIT
from ..datasets.cutting import Cutting
from ..datasets.images import FIVE_RATIO
from ..datasets.reading import Picture
from ..features.store import FeatureStore
from ..segment.model import Head, project
from ..segment.refine import Plane, Refiner, refined_bands
from ..segment.segmenter import Segmenter
from ..show.report_tiles import LABEL_SIDE, Atlas, Encoded, Looking, encoded, labelled, resized
from .setting import Setting

MOST_CELLS = 96  # rows and columns of cells of a tile


@dataclass(frozen=True)
class Mosaic:
    """The cells of an image that its squares cover: from which row of the store each comes, and which patch of it.

    Attributes:
        rows, patches: int [h,w]; -1 where no square lies.
        box: (top, left, bottom, right) of the cells, as shares of the image's height and width; may reach beyond 1.
    """

    rows: np.ndarray
    patches: np.ndarray
    box: tuple[float, float, float, float]


def mosaic(places: dict[int, tuple[int, int]], grid: tuple[int, int], patch: int, size: tuple[float, float]) -> Mosaic:
    """Lay the squares of an image side by side: a cell belongs to the square whose middle is nearest.

    Args:
        places: (top, left) of the square of every row of the store, at the squares' scale.
        grid: patches of a square. patch: its pixels. size: (height, width) of the image at that scale.
    """
    starts = np.array(list(places.values()))
    first, last = starts.min(0), starts.max(0) + np.array(grid) * patch
    cell = patch * max(1, -(-int((last - first).max()) // (patch * MOST_CELLS)))
    shape = [-(-int(side) // cell) for side in last - first]
    centres = [
        start + np.minimum((np.arange(n) + 0.5) * cell, end - start - 0.5) for start, end, n in zip(first, last, shape)
    ]
    rows, patches, best = np.full(shape, -1), np.full(shape, -1), np.full(shape, np.inf)
    for row, place in places.items():
        inside = [(centre - start) // patch for centre, start in zip(centres, place)]
        far = [np.abs(centre - start - n * patch / 2) for centre, start, n in zip(centres, place, grid)]
        distance = far[0][:, None] + far[1]
        here = [(part >= 0) & (part < n) for part, n in zip(inside, grid)]
        nearer = here[0][:, None] & here[1] & (distance < best)
        number = (inside[0][:, None] * grid[1] + inside[1]).astype(int)
        rows[nearer], patches[nearer], best[nearer] = row, number[nearer], distance[nearer]
    ends = [start + n * cell for start, n in zip(first, shape)]
    box = (first[0] / size[0], first[1] / size[1], ends[0] / size[0], ends[1] / size[1])
    return Mosaic(rows, patches, box)


@dataclass(frozen=True)
class Prepared:
    """An image before it is labelled.

    Attributes:
        cells: those that its squares cover.
        picture: what they show, at most LABEL_SIDE pixels a side, and the same for people.
        seen: how much of the cells' box lies on the image, in each direction.
        whole: whether they cover all of the image.
    """

    name: str
    cells: Mosaic
    picture: Picture
    encoded: Encoded
    seen: tuple[float, float]
    whole: bool


def cutting_of(setting: Setting) -> Cutting:
    """How the training squares were cut."""
    config = setting.config
    return Cutting(size=config.sides[0], crops=config.crops, resample=config.resample, scale=config.scale)


class Tiler:
    """Makes the tiles of the images of a store for one segmenter, in any thread. cutting: how its squares were cut."""

    def __init__(self, store: FeatureStore, cutting: Cutting, segmenter: Segmenter):
        self.store, self.cutting, self.segmenter, self.atlas = store, cutting, segmenter, Atlas.of(segmenter)
        self.device = segmenter.backbone.device
        fine = segmenter.checkpoint.fine
        self.fine: Head | None = None if fine is None else fine.head.to(self.device).eval()
        self.rows: dict[str, list[int]] = defaultdict(list)
        for row, name in enumerate(store.names):
            self.rows[name].append(row)

    def prepared(self, name: str, picture: Picture, most_bytes: int) -> Prepared:
        """The part of an image that its squares cover."""
        places = {row: self.store.crops[row] for row in self.rows[name]}
        patch = self.cutting.size // self.store.grid[0]
        cells = mosaic(places, self.store.grid, patch, self.size_of(picture))
        part, seen = cropped(picture, cells.box)
        whole = part.pixels.shape == picture.pixels.shape
        return Prepared(name, cells, reduced(part), encoded(part.pixels, most_bytes), seen, whole)

    @torch.no_grad()
    def tile(self, image: Prepared, most_bytes: int) -> dict[str, Any]:
        """The tile of an image."""
        store, rows, cells, small = self.store, self.rows[image.name], image.cells, image.picture
        features, numbers = store.rows(rows).to(self.device), np.searchsorted(rows, cells.rows)  # -1 becomes 0
        valid = cells.rows >= 0
        if (shown := store.valid(rows)) is not None:
            valid &= shown.numpy()[numbers, np.maximum(cells.patches, 0)]
        index = torch.from_numpy(numbers), torch.from_numpy(np.maximum(cells.patches, 0))

        def codes_of(head: Head) -> Tensor:
            return project(head, features).float()[index]

        grouping, codes = self.segmenter.grouping, {id(self.segmenter.head): codes_of(self.segmenter.head)}
        if self.fine is not None and id(self.fine) not in codes:
            codes[id(self.fine)] = codes_of(self.fine)
        looking = Looking([grouping], self.fine, valid)
        looking.see(codes)
        shape = small.pixels.shape[:2]
        plane = Plane(valid.shape, (shape[0] / image.seen[0], shape[1] / image.seen[1]), shape)
        refine = self.segmenter.refinement(None)
        refiner = Refiner("guided" if refine == "none" else refine, grouping, plane)
        scores = [grouping.scores(codes[id(self.segmenter.head)])]
        labels = np.concatenate([*refined_bands(scores, refiner, small, None if valid.all() else valid)])
        labels = self.segmenter.names.table[labels]
        look = looking.look(0, len(valid), image.seen)
        return labelled(image.name, image.encoded, labels, look, self.atlas, most_bytes)

    def size_of(self, picture: Picture) -> tuple[float, float]:
        """(height, width) of a picture at the scale of its squares."""
        cutting, (height, width) = self.cutting, picture.pixels.shape[:2]
        if cutting.scale == (FIT,):
            short = cutting.size / (FIVE_RATIO if cutting.crops == "five" else 1)
            return height * short / min(height, width), width * short / min(height, width)
        return cutting.scaled(picture.pixels).size


def cropped(picture: Picture, box: tuple[float, float, float, float]) -> tuple[Picture, tuple[float, float]]:
    """The part of a picture in a box of shares of its sides, and how much of the box lies on it in each direction."""
    spans, seen = [], []
    for first, last, side in zip(box[:2], box[2:], picture.pixels.shape):
        start, end = max(0, round(first * side)), min(side, max(round(first * side) + 1, round(last * side)))
        spans.append(slice(start, end))
        seen.append(min(1.0, (end - start) / max(1e-9, (last - first) * side)))
    rows, columns = spans
    valid = None if picture.valid is None else picture.valid[rows, columns]
    return Picture(picture.pixels[rows, columns], valid), (seen[0], seen[1])


def reduced(picture: Picture) -> Picture:
    """A picture with a long side of at most LABEL_SIDE pixels."""
    step = max(1, max(picture.pixels.shape[:2]) // (4 * LABEL_SIDE))
    pixels = np.ascontiguousarray(picture.pixels[::step, ::step])
    valid = None if picture.valid is None else np.ascontiguousarray(picture.valid[::step, ::step])
    factor = LABEL_SIDE / max(pixels.shape[:2])
    if factor >= 1:
        return Picture(pixels, valid)
    size = max(1, round(factor * pixels.shape[1])), max(1, round(factor * pixels.shape[0]))
    small = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BOX, reducing_gap=2.0))
    if valid is not None:
        valid = resized(valid.view(np.uint8), small.shape[:2]).astype(bool)
    return Picture(small, valid)
