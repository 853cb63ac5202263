"""Codes of an image of any size: at the training scale, in overlapping tiles if it is large, never stretched."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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

    Resizes the short side to `short_side` pixels, and pads both sides to whole patches with mirrored content. Images
    above `tile` pixels a side are cut. `features` takes uint8 [B,3,S,T] (sides multiples of `patch`) and gives codes
    [B,S/patch,T/patch,Z]; with `mirror` they are averaged with those of the mirrored image.
    """
    resized = resize_short_side(image, short_side, resample)
    height, width = resized.shape[:2]
    h, w = -(-height // patch), -(-width // patch)
    padded = np.pad(resized, ((0, h * patch - height), (0, w * patch - width), (0, 0)), mode="symmetric")
    total, side = torch.empty(0), max(1, tile // patch)
    for (top, rows), (left, columns) in product(spans(h, side), spans(w, side)):
        piece = padded[top * patch : (top + rows) * patch, left * patch : (left + columns) * patch]
        pixels = torch.from_numpy(np.ascontiguousarray(piece)).permute(2, 0, 1)[None]
        codes = features(pixels)[0].float()
        if mirror:
            codes = (codes + features(pixels.flip(-1))[0].flip(1).float()) / 2
        codes = F.pad(codes, (0, 1), value=1.0)  # a last channel for the sum of the weights
        total = total if len(total) else codes.new_zeros(h, w, codes.shape[-1])
        # patches at the border of a tile see least around them, so they count least where tiles overlap
        ramp = (tent(rows, h)[:, None] * tent(columns, w))[..., None].to(codes)
        total[top : top + rows, left : left + columns] += codes * ramp
    size = (round(h * patch * image.shape[0] / height), round(w * patch * image.shape[1] / width))
    return CodeMap(total[..., :-1] / total[..., -1:], (max(image.shape[0], size[0]), max(image.shape[1], size[1])))


def spans(length: int, side: int) -> list[tuple[int, int]]:
    """Return (start, length) of evenly spaced pieces of at most `side` that cover 0..length, overlapping by OVERLAP."""
    if length <= side:
        return [(0, length)]
    stride = max(1, int(side * (1 - OVERLAP)))
    count = -(-(length - side) // stride) + 1
    return [(round(i * (length - side) / (count - 1)), side) for i in range(count)]


def tent(n: int, length: int) -> Tensor:
    """Return weights [n] that rise from the ends to the middle, never 0; a piece of the whole length has equal ones."""
    return torch.ones(n) if n == length else torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).float()
