"""The page of a run: its training images as tiles, labelled from their cached features, without the backbone."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import FIT
from ..datasets.cutting import Cutting
from ..datasets.images import FIVE_RATIO, ImageError
from ..datasets.reading import Picture
from ..errors import UserError
from ..features.sample import evenly_spaced
from ..segment.checkpoint import read_checkpoint
from ..segment.model import Head, project
from ..segment.refine import Plane, Refiner, refined_bands
from ..segment.segmenter import Segmenter
from ..show.report import PAGE, run_page, write_page
from ..show.report_tiles import MOST_TILES, TILES, Atlas, Looking, allowance, read_tiles, tile_of
from ..system.files import regular, write_atomic
from .runfolder import CHECKPOINT, REPORT
from .setting import Setting

SHARE_OF_TIME, LEAST_IMAGES = 0.08, 12  # of the run so far that tiles may take, and images that are shown in any case
MOST_CELLS = 96  # rows and columns of cells of a tile
LABELLED = 512  # pixels of the long side at which an image is labelled


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


class Tiler:
    """Makes the tiles of the training images of a run for one segmenter."""

    def __init__(self, setting: Setting, segmenter: Segmenter):
        self.setting, self.segmenter, self.atlas = setting, segmenter, Atlas.of(segmenter)
        fine = segmenter.checkpoint.fine
        self.fine: Head | None = None if fine is None else fine.head.to(setting.device).eval()
        self.rows: dict[str, list[int]] = defaultdict(list)
        for row, name in enumerate(setting.store.names):
            self.rows[name].append(row)

    @torch.no_grad()
    def tile(self, name: str, picture: Picture, most_bytes: int) -> dict[str, Any]:
        """The tile of an image: the part of it that its squares cover."""
        store, config = self.setting.store, self.setting.config
        rows = self.rows[name]
        patch = config.sides[0] // store.grid[0]
        cells = mosaic({row: store.crops[row] for row in rows}, store.grid, patch, self.size_of(picture))
        features, places = store.rows(rows).to(self.setting.device), {row: n for n, row in enumerate(rows)}
        numbers = np.vectorize(lambda row: places.get(row, 0))(cells.rows)
        valid = cells.rows >= 0
        if (shown := store.valid(rows)) is not None:
            valid &= shown.numpy()[numbers, np.maximum(cells.patches, 0)]
        index = torch.from_numpy(numbers), torch.from_numpy(np.maximum(cells.patches, 0))

        def codes_of(head: Head) -> Tensor:
            return project(head, features).float()[index]

        grouping, codes = self.segmenter.grouping, {id(self.segmenter.head): codes_of(self.segmenter.head)}
        if self.fine is not None:
            codes[id(self.fine)] = codes_of(self.fine)
        looking = Looking([grouping], self.fine, valid)
        looking.see(codes)
        part, seen = cropped(picture, cells.box)
        small = reduced(part)
        plane = Plane(
            valid.shape, (small.pixels.shape[0] / seen[0], small.pixels.shape[1] / seen[1]), small.pixels.shape[:2]
        )
        refine = self.segmenter.refinement(None)
        refiner = Refiner("guided" if refine == "none" else refine, grouping, plane)
        scores = [grouping.scores(codes[id(self.segmenter.head)])]
        labels = np.concatenate([*refined_bands(scores, refiner, small, None if valid.all() else valid)])
        labels = self.segmenter.names.table[labels]
        look = looking.look(0, len(valid), seen)
        return tile_of(name, part.pixels, labels, look, self.atlas, most_bytes)

    def size_of(self, picture: Picture) -> tuple[float, float]:
        """(height, width) of a picture at the scale of its squares."""
        config, (height, width) = self.setting.config, picture.pixels.shape[:2]
        if config.scale == (FIT,):
            short = config.sides[0] / (FIVE_RATIO if config.crops == "five" else 1)
            return height * short / min(height, width), width * short / min(height, width)
        cutting = Cutting(size=config.sides[0], crops=config.crops, resample=config.resample, scale=config.scale)
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
    """A picture with a long side of at most LABELLED pixels."""
    step = max(1, -(-max(picture.pixels.shape[:2]) // LABELLED))
    valid = None if picture.valid is None else picture.valid[::step, ::step]
    return Picture(np.ascontiguousarray(picture.pixels[::step, ::step]), valid)


def tiles_of(setting: Setting, segmenter: Segmenter) -> Iterator[dict[str, Any]]:
    """Tiles of the training images, in the order of `spread`, until they took SHARE_OF_TIME of the run."""
    tiler, started = Tiler(setting, segmenter), time.perf_counter()
    until = started + SHARE_OF_TIME * (started - setting.started)
    names, numbers = list(tiler.rows), {name: number for number, name in enumerate(setting.dataset.names)}
    count = min(len(names), MOST_TILES)
    chosen = [names[place] for place in evenly_spaced(len(names), count).tolist()]
    made = 0
    for place in spread(count):
        if made >= LEAST_IMAGES and time.perf_counter() > until:
            return
        try:
            yield tiler.tile(chosen[place], setting.dataset.picture(numbers[chosen[place]]), allowance(count))
            made += 1
        except ImageError:  # gone since its features were taken
            continue


def spread(count: int) -> list[int]:
    """0 to count - 1, so that those up to any one are spread over all: by the bits of the number, last one first."""
    bits = max(1, (count - 1).bit_length())
    order = [int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits)]
    return [number for number in order if number < count]


def write_run_page(setting: Setting, segmenter: Segmenter, report: dict[str, Any]) -> Path:
    """Write the tiles and the page of a run into its folder."""
    assert setting.folder is not None
    started = time.perf_counter()
    by_name = {tile["name"]: tile for tile in tiles_of(setting, segmenter)}
    tiles = [by_name[name] for name in dict.fromkeys(setting.store.names) if name in by_name]
    times = [
        ["the run up to this page", round(started - setting.started, 2)],
        ["this page", round(time.perf_counter() - started, 2)],
    ]
    header = Atlas.of(segmenter).header() | {"images": len(set(setting.store.names)), "times": times}
    out = setting.folder.path
    write_atomic(out / TILES, "".join(json.dumps(line) + "\n" for line in (header, *tiles)))
    return write_page(out / PAGE, run_page(out, segmenter.checkpoint, header, report), tiles)


def write_page_of_run(folder: Path, out: Path) -> None:
    """Write the page of a finished run from its checkpoint, its report and the tiles that training left. UserError
    where they are not there."""
    try:
        report = json.loads(regular(folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--run {folder}: holds no finished run; give the --out folder of training") from error
    header, tiles = read_tiles(folder / TILES)
    if not header or not isinstance(report, dict):
        advice = "run the same smooseg train again, which writes it"
        raise UserError(f"--run {folder}: holds no {TILES} that can be read; remove {PAGE} and {advice}")
    write_page(out, run_page(folder, read_checkpoint(folder / CHECKPOINT), header, report), list(tiles.values()))


def refresh_page(folder: Path) -> list[str]:
    """Write the page of a run again after its names or its number of groups changed -> its name, where training left
    the tiles for it."""
    if not (folder / TILES).exists():
        return []
    write_page_of_run(folder, folder / PAGE)
    return [str(folder / PAGE)]
