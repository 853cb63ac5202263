"""Labels of a picture of any size, from overlapping tiles, band by band, so that memory grows with its width alone.

Tiles are cut out of the picture at its scale, real where it goes on and mirrored where it ends. Their codes are blended
under tents. Each finished band of patches is scored against the prototypes, upsampled and labelled, and forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smooseg_kernels.rows import unit_rows

TILE = 640  # pixels of a tile's side; larger pictures are cut
OVERLAP = 0.25  # least share of a tile's side
STRIP_ELEMENTS = 1 << 22  # upsampled scores at a time
FAINT = 1e-3  # of the codes of patches without data, so that pixels next to them are labelled by the others


Item = TypeVar("Item")


class Start(NamedTuple):
    """Where labelling begins: `pixel`, a row of the picture, whose label depends on no row of cells above `cell`."""

    pixel: int = 0
    cell: int = 0


TOP = Start()


class Tile(NamedTuple):
    """A rectangle of patches: its first row and column, and their numbers."""

    top: int
    left: int
    rows: int
    columns: int


def code_bands(
    grid: tuple[int, int], side: int, codes_of: Callable[[Tile], Tensor], step: int = 1, first: int = 0
) -> Iterator[Tensor]:
    """Blend the codes of tiles of at most `side` patches -> bands [n,w,Z] that make up [h,w,Z] from top to bottom.

    Args:
        grid: (h, w) patches of the picture.
        codes_of: gives the codes [rows,columns,Z] of a tile, which begins at multiples of `step`.
        first: the row of patches, from `band_starts`, where the first band begins. Bands are the same to the last bit
            wherever they begin.
    """
    (h, w), total = grid, torch.empty(0)
    tops = spans(h, side, step)
    for (top, rows), following in zip(tops, [*(start for start, _ in tops[1:]), h]):
        if top + rows <= first:
            continue
        for left, columns in spans(w, side, step):
            codes = F.pad(codes_of(Tile(top, left, rows, columns)), (0, 1), value=1.0)  # a channel for the weights' sum
            if len(total) < rows:  # `total` begins at the tile's first row
                fresh = codes.new_zeros(rows - len(total), w, codes.shape[-1])
                total = torch.cat([total, fresh]) if len(total) else fresh
            # patches at the border of a tile see least around them, so they count least where tiles overlap
            ramp = (tent(rows, h)[:, None] * tent(columns, w))[..., None].to(codes)
            total[:, left : left + columns] += codes * ramp
        if top >= first:
            yield total[: following - top, :, :-1] / total[: following - top, :, -1:]
        total = total[following - top :].clone()  # a view would keep the rows that are done


def band_starts(rows: int, side: int, step: int = 1) -> list[int]:
    """The rows of patches where the bands of `code_bands` begin."""
    return [start for start, _ in spans(rows, side, step)]


def faded(codes: Tensor, valid: Tensor) -> Tensor:
    """Codes or scores [...,Z] for upsampling, all but without those of patches that show no data; valid bool [...].

    A label depends on the directions of upsampled codes alone, so a pixel is labelled by its patches with data; FAINT
    leaves the others a say where there are none.
    """
    return codes * torch.where(valid, 1.0, FAINT).to(codes)[..., None]


def label_bands(
    bands: Iterable[Tensor],
    prototypes: Tensor,
    rows: int,
    size: tuple[int, int],
    shape: tuple[int, int],
    start: Start = TOP,
) -> Iterator[Tensor]:
    """Label the pixels of upsampled codes by their nearest prototype -> bands uint8 [n,W], n to suit the memory.

    As `smooseg_kernels.assign` does with a grid, but for codes that come band by band.

    Args:
        bands: codes [n,w,Z] from top to bottom, `rows` of them in all, from `start.cell` on.
        prototypes: [K,Z], K at most 256.
        size: pixels (height, width) under all the patches.
        shape: (H, W), the pixels to label, which begin at the same corner; at most `size`.
        start: the first row of pixels to label.
    """
    H, W = shape
    directions = unit_rows(prototypes.float())
    # bilinear interpolation is separable: two taps for the rows here, the library for the columns
    y = ((torch.arange(H, dtype=torch.float32) + 0.5) * (rows / size[0]) - 0.5).clamp(min=0.0)
    above = y.long().clamp(max=rows - 1)
    below, share = (above + 1).clamp(max=rows - 1), (y - above)[:, None].to(prototypes.device)
    done, first = start  # pixels that are labelled, and the row that scores [K,n,w] begin with
    scores = torch.empty(0)
    for band in bands:
        fresh = (band @ directions.mT).permute(2, 0, 1)
        scores = torch.cat([scores, fresh], 1) if scores.numel() else fresh
        # pixels whose lower tap has come
        ready = int(torch.searchsorted(below, first + scores.shape[1]))
        step = max(1, STRIP_ELEMENTS // (len(scores) * size[1]))
        for top in range(done, ready, step):
            part = slice(top, min(top + step, ready))
            upper, lower = (scores[:, (tap[part] - first).to(scores.device)] for tap in (above, below))
            lines = torch.lerp(upper, lower, share[part])
            fine = F.interpolate(lines[None], size=(lines.shape[1], size[1]), mode="bilinear", align_corners=False)
            yield fine[0, :, :, :W].argmax(0).to(torch.uint8)
        done = max(done, ready)
        if done < H:
            kept = max(first, min(int(above[done]), first + scores.shape[1]))
            scores, first = scores[:, kept - first :], kept


def spans(length: int, side: int, step: int = 1) -> list[tuple[int, int]]:
    """Return (start, length) of evenly spaced pieces of at most `side` that cover 0..length, overlapping by OVERLAP.

    Starts are multiples of `step`, if `length` is one.
    """
    if length <= side:
        return [(0, length)]
    side = max(1, side // step) * step
    stride = max(1, int(side * (1 - OVERLAP)) // step) * step
    count = -(-(length - side) // stride) + 1
    return [(round(i * (length - side) / (count - 1) / step) * step, side) for i in range(count)]


def tent(n: int, length: int) -> Tensor:
    """Return weights [n] that rise from the ends to the middle, never 0; a piece of the whole length has equal ones."""
    return torch.ones(n) if n == length else torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).float()


def shared(items: Iterator[Item], count: int) -> list[Iterator[Item]]:
    """The items, for each of so many readers. As `itertools.tee`, which keeps up to 57 items that all have read."""
    queues: list[deque[Item]] = [deque() for _ in range(count)]

    def read(queue: deque[Item]) -> Iterator[Item]:
        while queue or feed():
            yield queue.popleft()

    def feed() -> bool:
        for item in items:
            for queue in queues:
                queue.append(item)
            return True
        return False

    return [read(queue) for queue in queues]


def all_faded(bands: Iterable[Tensor], valid: Tensor, first: int = 0) -> Iterator[Tensor]:
    """Bands [n,w,Z] that make up [h,w,Z] from row `first` on, `faded` where valid bool [h,w] is not."""
    for band in bands:
        yield faded(band, valid[first : first + len(band)].to(band.device))
        first += len(band)
