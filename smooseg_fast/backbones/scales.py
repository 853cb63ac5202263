"""Features of a square from its own pixels and those around it, at one scale or several."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def side_by_side(maps: Sequence[Tensor], ratios: Sequence[float], grid: tuple[int, int]) -> Tensor:
    """Join maps about one centre -> rows [B,P,n*D] of the `grid` (h, w) in their middle, P = h*w.

    maps: n of [B,h',w',D], with margins around what the grid covers. ratios: the scale of each as a share of the first,
    1.0 for that. Maps of smaller scales are interpolated bilinearly. Several maps count alike: each has rows of one
    length.
    """
    rows = [_middle(part, ratio, grid) for part, ratio in zip(maps, ratios)]
    if len(rows) == 1:
        return rows[0]
    length = math.sqrt(rows[0].shape[-1])
    return torch.cat([F.normalize(part.float(), dim=-1) * length for part in rows], -1)


def _middle(features: Tensor, ratio: float, grid: tuple[int, int]) -> Tensor:
    """[B,h',w',D] -> [B,h*w,D]."""
    if ratio == 1.0:
        top, left = ((there - here) // 2 for there, here in zip(features.shape[1:3], grid))
        return features[:, top : top + grid[0], left : left + grid[1]].flatten(1, 2)
    # a patch's offset from the centre in shares of the map's half height and width
    y, x = (
        (torch.arange(n, device=features.device) + 0.5 - n / 2) * (2 * ratio / there)
        for n, there in zip(grid, features.shape[1:3])
    )
    places = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1).float()
    maps = F.grid_sample(
        features.float().permute(0, 3, 1, 2),
        places.expand(len(features), -1, -1, -1),
        padding_mode="border",
        align_corners=False,
    )
    return maps.flatten(2).mT
