"""Codes of an image of any size: at the training scale, in overlapping tiles if it is large, padded and never
stretched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..datasets.images import Resample, resize_short_side

TILE = 640  # pixels of a tile's side; larger images are cut
OVERLAP = 0.25  # least share of a tile's side


class CodeMap(NamedTuple):
    codes: Tensor  # [h,w,Z]
    size: tuple[int, int]  # (H, W) pixels under the h x w patches: the image's own and padding


def code_map(
    image: np.ndarray,
    features: Callable[[Tensor], Tensor],
    patch: int,
    *,
    short_side: int,
    resample: Resample,
    mirror: bool,
    tile: int = TILE,
) -> CodeMap:
    """Compute the codes of an image uint8 [H,W,3].

    Resizes the short side to `short_side` pixels, and pads both sides to whole patches with mirrored content.

    Args:
        features: takes uint8 [B,3,S,T] (sides multiples of `patch`), gives codes [B,S/patch,T/patch,Z].
        mirror: average the codes with those of the mirrored image.
        tile: pixels of a tile's side; larger images are cut.
    """
    resized = resize_short_side(image, short_side, resample)
    height, width = resized.shape[:2]
    h, w = -(-height // patch), -(-width // patch)
    padded = np.pad(resized, ((0, h * patch - height), (0, w * patch - width), (0, 0)), mode="symmetric")
    side = max(1, tile // patch)

    def codes_at(top: int, rows: int, left: int, columns: int) -> Tensor:
        piece = padded[top * patch : (top + rows) * patch, left * patch : (left + columns) * patch]
        pixels = torch.from_numpy(np.ascontiguousarray(piece)).permute(2, 0, 1)[None]
        codes = features(pixels)[0].float()
        return (codes + features(pixels.flip(-1))[0].flip(1).float()) / 2 if mirror else codes

    tiles = [(*vertical, *horizontal) for vertical in spans(h, side) for horizontal in spans(w, side)]
    covered = (round(h * patch * image.shape[0] / height), round(w * patch * image.shape[1] / width))
    size = (max(image.shape[0], covered[0]), max(image.shape[1], covered[1]))
    return CodeMap(codes_at(*tiles[0]) if len(tiles) == 1 else _blended(codes_at, tiles, h, w), size)


def _blended(
    codes_at: Callable[[int, int, int, int], Tensor], tiles: list[tuple[int, int, int, int]], h: int, w: int
) -> Tensor:
    """Average the codes of overlapping tiles (top, rows, left, columns) -> [h,w,Z]."""
    pieces = ((tile, codes_at(*tile)) for tile in tiles)
    first = next(pieces)
    total, weight = first[1].new_zeros(h, w, first[1].shape[-1]), first[1].new_zeros(h, w, 1)
    for (top, rows, left, columns), codes in itertools.chain([first], pieces):
        # patches at the border of a tile see least around them, so they count least where tiles overlap
        ramp = (tent(rows)[:, None] * tent(columns)[None, :])[..., None].to(codes)
        total[top : top + rows, left : left + columns] += codes * ramp
        weight[top : top + rows, left : left + columns] += ramp
    return total / weight


def spans(length: int, side: int) -> list[tuple[int, int]]:
    """Return (start, length) of evenly spaced pieces of at most `side` that cover 0..length, overlapping by OVERLAP."""
    if length <= side:
        return [(0, length)]
    stride = max(1, int(side * (1 - OVERLAP)))
    count = -(-(length - side) // stride) + 1
    return [(round(i * (length - side) / (count - 1)), side) for i in range(count)]


def tent(n: int) -> Tensor:
    """Return weights [n] that rise from the ends to the middle, never 0."""
    return torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).float()
