"""Tiles of the page `report.html`: a small picture of each image with its labels, as one line of JSON of bounded size.

A tile holds the fine group of every pixel where there is a tree, so that the page shows any number of groups by a
lookup table. Where the groups of a mask are unions of fine ones, each pixel has the fine group that most patches near
it have among those of its group in the mask: merged again, they are that very mask.
"""

from __future__ import annotations

import base64
import io
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin, WebPImagePlugin  # noqa: F401 - or the first tile loads all of Pillow's formats
from torch import Tensor

from ..datasets import IGNORE
from ..segment.grouping import Grouping
from ..segment.model import Head
from ..segment.segmenter import Segmenter
from ..segment.tree import Tree
from ..segment.views import Views
from ..system.outfolder import Journal
from .looks import Keeper, Look, Looking

TILES = "tiles.jsonl"  # next to the page: a line about all tiles, then one for each
FORMAT = 1
MOST_TILES = 10_000  # of a page
FEW_BYTES, MANY_BYTES = 2_500_000, 22_000_000  # of the tiles of a page of up to 100 images, and of any page
LEAST_BYTES, LARGE_BYTES = 25_000, 120_000  # of a tile while MANY_BYTES allow it, and of one of a few
MOST_CELLS = 2048  # rows and columns of cells that a look keeps; of more, every n-th
LABEL_SIDE = 320  # pixels of the long side of a label map, at most
QUALITY, METHOD, LEVEL = 65, 0, 5  # of WebP, and of deflate
LABELS = 0.2  # share of a tile's bytes that its labels may take, before base64
PIXEL_BYTES = 0.12  # of a photo in WebP, about; the first guess at a tile's side
JPEG_BYTES, JPEG_QUALITY = 0.17, 78  # of a photo in JPEG, about
PARTS = 10_000  # shares are whole numbers of so many
PARTS_OF_CELL = 15  # into which weights divide a side of a cell: four weights sum to 225, in 8 bits


Encoded = tuple[bytes, tuple[int, int]]  # a picture as WebP or JPEG, and its (width, height)


@dataclass(frozen=True)
class Atlas:
    """Tells what the numbers in the label maps of all tiles mean.

    Attributes:
        groups: the number of groups of the masks, before merging.
        fine: the number of fine groups; 0 without a tree.
        masked: the number in the mask of every fine group, int [K0], where the groups of a mask are unions of fine
            ones; None where the mask comes from a trained head, or from one without a tree.
        merge: the lists of groups that are merged in the masks.
    """

    groups: int
    fine: int
    masked: np.ndarray | None
    merge: list[list[int]]

    @classmethod
    def of(cls, segmenter: Segmenter) -> Atlas:
        fine, groups, names = segmenter.checkpoint.fine, segmenter.grouping.groups, segmenter.names
        masked = None if groups is None or fine is None else names.table[groups].astype(int)
        return cls(len(segmenter.grouping), 0 if fine is None else len(fine.tree), masked, names.merge)

    @property
    def planes(self) -> int:
        """Label maps of a tile: the mask's or the fine one; or both, where the mask is not a union of fine groups."""
        return 2 if self.fine and self.masked is None else 1

    def header(self) -> dict[str, Any]:
        """The first line of a file of tiles."""
        facts = {"groups": self.groups, "fine": self.fine, "planes": self.planes, "merge": self.merge}
        return {"format": FORMAT, **facts}


class Watched(Segmenter):
    """A segmenter that keeps a `Look` of the last image that it labelled, for each of several numbers of groups."""

    def __init__(self, segmenter: Segmenter, groupings: Sequence[Grouping]):
        super().__init__(segmenter.checkpoint, segmenter.backbone, segmenter.upsampler)
        self.path, self.groupings = segmenter.path, groupings
        fine = segmenter.checkpoint.fine
        self.fine = None if fine is None else fine.head.to(segmenter.backbone.device).eval()
        self._looks: dict[int, Callable[[], Look]] = {}
        self.kept: Keeper | None = None  # remembers the bands of an image whose labelling may be resumed

    def at(self, groups: int | None = None, *, cut: float | None = None, share: float | None = None) -> Watched:
        other = Watched(super().at(groups, cut=cut, share=share), self.groupings)
        other._looks, other.kept = self._looks, self.kept
        return other

    def look(self, groups: int) -> Look | None:
        """The look at this number of groups of the image that was labelled last; None when it was taken before."""
        look = self._looks.pop(groups, None)
        return None if look is None else look()

    def code_bands(
        self, views: Views, heads: Sequence[Head], mirror: bool, first: int = 0
    ) -> Iterator[tuple[Tensor, ...]]:
        needed = [grouping.head for grouping in self.groupings] + ([] if self.fine is None else [self.fine])
        together = list({id(head): head for head in (*heads, *needed)}.values())
        places = {id(head): place for place, head in enumerate(together)}
        looking = Looking(self.groupings, self.fine, views.patches, step=-(-max(views.grid) // MOST_CELLS))
        if self.kept is not None:
            looking.bands = [band for band in self.kept.bands() if band.row < first]
        all_seen = sum(band.rows for band in looking.bands) == first
        seen = views.shape[0] / views.size[0], views.shape[1] / views.size[1]
        self._looks.clear()
        # not at the end of the bands: who takes them may leave out the last rows, which lie beyond the image
        looks = {len(one): partial(looking.look, n, views.grid[0], seen) for n, one in enumerate(self.groupings)}
        self._looks |= looks if all_seen else {}

        def watched(band: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen_band = looking.see({key: band[place] for key, place in places.items()})
            if self.kept is not None:
                self.kept.see(seen_band)
            return band[: len(heads)]

        return map(watched, super().code_bands(views, together, mirror, first))


def allowance(count: int) -> int:
    """The bytes that each of so many tiles may take."""
    count = max(1, min(count, MOST_TILES))
    return int(min(LARGE_BYTES, max(FEW_BYTES / count, min(LEAST_BYTES, MANY_BYTES / count))))


def tile_of(
    name: str, pixels: np.ndarray, labels: np.ndarray, look: Look | None, atlas: Atlas, most_bytes: int
) -> dict[str, Any]:
    """The tile of an image uint8 [h,w,3] with a mask `labels` uint8, alike or smaller, ready for JSON."""
    return labelled(name, encoded(pixels, most_bytes), labels, look, atlas, most_bytes)


def labelled(
    name: str, picture: Encoded, labels: np.ndarray, look: Look | None, atlas: Atlas, most_bytes: int
) -> dict[str, Any]:
    """The same of a picture that is encoded already."""
    content, size = picture
    side = min(1.0, LABEL_SIDE / max(size))
    shape = max(1, round(size[1] * side)), max(1, round(size[0] * side))
    planes = planes_of(resized(labels, shape), look, atlas)
    while len(packed := zlib.compress(planes.tobytes(), LEVEL)) > most_bytes * LABELS and max(shape) > 32:
        shape = max(1, shape[0] * 3 // 4), max(1, shape[1] * 3 // 4)
        planes = np.stack([resized(plane, shape) for plane in planes])
    return {
        "name": name,
        "size": list(size),
        "picture": base64.b64encode(content).decode(),
        "shape": list(shape),
        "labels": base64.b64encode(packed).decode(),
        "own": parts_of(planes[0]) if atlas.planes == 2 else None,
        "parts": parts_of(planes[-1]),
        "certainty": None if look is None or look.certainty is None else round(look.certainty, 4),
    }


def resized(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Labels uint8 [h,w] at another shape, by nearest neighbour."""
    return np.asarray(Image.fromarray(labels).resize(shape[::-1], Image.Resampling.NEAREST))


def encoded(pixels: np.ndarray, most_bytes: int) -> Encoded:
    """A picture, as large as fits into two thirds of so many bytes of base64 -> it and its (width, height). JPEG, which
    takes a third of the time, where it has room at its own size; else WebP."""
    room, picture = most_bytes * 2 / 3 * 3 / 4, Image.fromarray(pixels)
    height, width = pixels.shape[:2]
    if JPEG_BYTES * height * width < room:
        target = io.BytesIO()
        picture.save(target, "JPEG", quality=JPEG_QUALITY)
        if len(target.getvalue()) <= room:
            return target.getvalue(), picture.size
    scale = min(1.0, math.sqrt(room / (PIXEL_BYTES * height * width)))
    while True:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        target = io.BytesIO()
        small = picture if size == picture.size else picture.resize(size, Image.Resampling.BOX, reducing_gap=2.0)
        small.save(target, "WEBP", quality=QUALITY, method=METHOD)
        content = target.getvalue()
        if len(content) <= room or max(size) <= 32:
            return content, size
        scale *= min(0.9, 0.95 * math.sqrt(room / len(content)))


def planes_of(mask: np.ndarray, look: Look | None, atlas: Atlas) -> np.ndarray:
    """The label maps uint8 [planes,h,w] of a tile, from its mask uint8 [h,w]."""
    if not atlas.fine:
        return mask[None]
    fine, seen = (None, (1.0, 1.0)) if look is None else (look.fine, look.seen)
    if atlas.masked is not None:
        return fine_at(mask, fine, atlas.masked, seen)[None]
    everywhere = np.where(mask == IGNORE, IGNORE, 0).astype(np.uint8)
    return np.stack([mask, fine_at(everywhere, fine, np.zeros(atlas.fine, int), seen)])


def fine_at(mask: np.ndarray, fine: np.ndarray | None, groups: np.ndarray, seen: tuple[float, float]) -> np.ndarray:
    """The fine group of every pixel of a mask uint8 [h,w], one of those that make up its group: that of the four cells
    about it, weighed bilinearly; without one of the kind among them, the first one of its group.

    Args:
        fine: fine groups of the cells, uint8 [a,b], or None.
        groups: of every fine group, int [K0].
        seen: the share of the cells' rows and columns that lie on the image.
    """
    first, group_of = np.zeros(256, np.uint8), np.full(256, IGNORE, np.uint8)
    first[groups[::-1]], group_of[: len(groups)] = np.arange(len(groups) - 1, -1, -1), groups
    labels = first[mask]
    if fine is not None:
        best = heaviest(fine, mask, group_of[fine], seen)
        np.copyto(labels, best.astype(np.uint8), where=best > IGNORE)
    labels[mask == IGNORE] = IGNORE
    return labels


def heaviest(fine: np.ndarray, mask: np.ndarray, groups: np.ndarray, seen: tuple[float, float]) -> np.ndarray:
    """For each pixel of a mask uint8 [h,w], the fine group to which the four cells about it give most weight among
    those of its group in the mask, uint16 [h,w]: 256 * weight + fine group; at most 255 where no cell has one.

    groups: that of every cell's fine group, uint8 [a,b], like `fine`.
    """
    (above, below, y), (left, right, x) = (
        bilinear(side, cells, part) for side, cells, part in zip(mask.shape, fine.shape, seen)
    )
    corners = [(rows, columns) for rows in (above, below) for columns in (left, right)]
    tables = [fine.take(columns, 1).take(rows, 0) for rows, columns in corners]
    weights = [row[:, None] * column for row in (PARTS_OF_CELL - y, y) for column in (PARTS_OF_CELL - x, x)]
    sums, best = [weight.copy() for weight in weights], np.zeros(mask.shape, np.uint16)
    for one in range(4):
        for other in range(one):
            equal = tables[one] == tables[other]
            sums[one] += weights[other] * equal
            sums[other] += weights[one] * equal
    for (rows, columns), table, weight in zip(corners, tables, sums):
        legal = groups.take(columns, 1).take(rows, 0) == mask
        np.maximum(best, ((weight * legal).astype(np.uint16) << 8) | table, out=best)
    return best


def bilinear(pixels: int, cells: int, seen: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pixel of a side, the cells before and after it, and the weight of the second, uint8, 0 to PARTS_OF_CELL.
    seen: the share of the side's cells that lie on the image; a cell beyond it has no say."""
    place = ((np.arange(pixels) + 0.5) * cells * seen / pixels - 0.5).clip(0)
    last = max(0, min(cells, round(cells * seen + 0.499)) - 1)
    before = place.astype(int).clip(max=last)
    weight = np.rint(PARTS_OF_CELL * (place - before).clip(max=1)).astype(np.uint8)
    return before, (before + 1).clip(max=last), weight


def parts_of(labels: np.ndarray) -> list[int]:
    """The label and its share in PARTS of the pixels that show data, for each label, one after the other."""
    counts = np.bincount(labels.ravel(), minlength=256)[:IGNORE]
    total = max(1, counts.sum())
    return [number for k in np.flatnonzero(counts) for number in (int(k), round(PARTS * int(counts[k]) / total))]


def tree_lookup(tree: Tree, least_share: float) -> tuple[list[int], list[tuple[int, float]]]:
    """(the group of every fine group at the finest cut; for each group from the second on, the group that it leaves and
    the height).

    The group at N groups: go from a group to the one that it leaves, until its number is below N.
    """
    most = len(tree.splits(least_share)) + 1
    before, parents = tree.cut(1, least_share=least_share), []
    for number, merge in enumerate(tree.splits(least_share), 1):
        after = tree.cut(number + 1, least_share=least_share)
        parents.append((int(before[after == number][0]), float(tree.heights[merge])))
        before = after
    return tree.cut(most, least_share=least_share).tolist(), parents


def read_tiles(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(the header of a file of tiles, and the last tile of each name); nothing where there is no file, or one of
    another format. Damaged lines are left out."""
    records = Journal(path).read()
    header: dict[str, Any] = next((record for record in reversed(records) if "format" in record), {})
    if header.get("format") != FORMAT:
        return {}, {}
    return header, {record["name"]: record for record in records if is_tile(record, header)}


def is_tile(tile: Any, header: Mapping[str, Any]) -> bool:
    """Whether a line of the file is a tile that the page can show."""
    if not isinstance(tile, dict) or not all(isinstance(tile.get(k), str) for k in ("name", "picture", "labels")):
        return False
    numbers = [tile.get("shape"), tile.get("size"), tile.get("parts")]
    numbers += [tile.get("own")] if header.get("planes") == 2 else []
    if not all(isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in numbers):
        return False
    return len(tile["shape"]) == len(tile["size"]) == 2 and isinstance(tile.get("certainty"), int | float | None)


def fitted(tiles: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tiles with their pictures shrunk where those of this many images may not take as much."""
    most = allowance(len(tiles))
    room = most * 2 / 3
    return [tile if len(tile["picture"]) <= 1.05 * room else shrunk(tile, most) for tile in tiles]


def shrunk(tile: dict[str, Any], most_bytes: int) -> dict[str, Any]:
    """A tile with a smaller picture; one whose picture cannot be read stays."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(tile["picture"])), formats=["WEBP", "JPEG"]) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError):
        return tile
    return tile | {"picture": base64.b64encode(encoded(pixels, most_bytes)[0]).decode()}


class TileFile:
    """The tiles of a folder: a journal of a header and a line for each image, the last of a name counts.

    Args:
        most_bytes: of a new tile.
        watched: keeps the `Look` of an image; None where labels come from elsewhere.
    """

    def __init__(self, path: Path, atlas: Atlas, most_bytes: int, watched: Watched | None = None):
        self.path, self.atlas, self.most_bytes, self.watched = path, atlas, most_bytes, watched
        self._journal = Journal(path)
        self.known: set[str] = set()

    def open(self, first: bool, names: Collection[str]) -> None:
        """Begin with the tiles of these images that are there, if they are of the same kind; the `first` process
        rewrites the file before others add to it."""
        header, tiles = read_tiles(self.path)
        same = header | {"merge": self.atlas.merge} == self.atlas.header()  # what is merged since, the page merges
        kept = [tiles[name] for name in names if name in tiles] if same else []
        self.known = {tile["name"] for tile in kept}
        if first:
            self._journal.rewrite([self.atlas.header(), *kept])

    def look(self) -> Look | None:
        """The look of the image that was labelled last, until the next one is."""
        return None if self.watched is None else self.watched.look(self.atlas.groups)

    def add(self, name: str, pixels: np.ndarray, labels: np.ndarray, look: Look | None) -> None:
        """Append the tile of an image uint8 [h,w,3] with a mask uint8 [h,w], both perhaps reduced, unless its labels
        come from a mask of before and its tile is there. WriteError when the disk is full."""
        if look is not None or name not in self.known:
            self._journal.append(tile_of(name, pixels, labels, look, self.atlas, self.most_bytes))
            self.known.add(name)
