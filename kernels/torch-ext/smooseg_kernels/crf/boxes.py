"""Which blocks of points are too far apart to matter, and an order of the points that keeps blocks small."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import pad

# Gaussians below it count as 0 with any tolerance: e^-60 = 9e-27, and e^-600 in fp64. Their products with values would
# be denormal numbers, which a CPU computes slowly
SMALLEST = {torch.float32: math.exp(-60.0), torch.float64: math.exp(-600.0)}


@overload
def farthest(tolerance: float, dtype: torch.dtype) -> float: ...


@overload
def farthest(tolerance: float | Tensor, dtype: torch.dtype) -> float | Tensor: ...


def farthest(tolerance: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Returns the distance beyond which every Gaussian is below `tolerance`, a number or a tensor [] as that is."""
    if isinstance(tolerance, Tensor):
        return (-2.0 * tolerance.clamp(min=SMALLEST[dtype]).log()).sqrt()
    return math.sqrt(-2.0 * math.log(max(tolerance, SMALLEST[dtype])))


def bounding_boxes(coordinates: Tensor, block: int, sides: int) -> Tensor:
    """Takes coordinates [B,d,N] to the lowest and highest of each `block` neighbours, [B,blocks,2,sides].

    Sides from d on are 0.
    """
    d, N = coordinates.shape[1:]
    blocks = pad(coordinates, (0, -N % block), mode="replicate").unflatten(2, (-1, block))
    return pad(torch.stack((blocks.amin(3), blocks.amax(3)), 1), (0, 0, 0, sides - d)).permute(0, 3, 1, 2).contiguous()


def nearby_order(points: Tensor, leaf: int) -> Tensor:
    """Orders points [N,d] so that every run of `leaf` is close together: int64 [N], the leaves of a balanced k-d tree.

    Each level halves every group at the median of its widest coordinate.
    """
    N, d = points.shape
    levels = max(0, math.ceil(math.log2(N / leaf))) if leaf < N else 0
    size = -(-N // 2**levels) * 2**levels
    order = torch.arange(size, device=points.device)
    for level in range(levels):
        groups = points[order.clamp(max=N - 1)].view(2**level, -1, d)  # the last point fills the last groups
        widest = (groups.amax(1) - groups.amin(1)).argmax(1)
        along = groups.gather(2, widest[:, None, None].expand(-1, groups.shape[1], 1))[..., 0]
        order = order.view(2**level, -1).gather(1, along.argsort(dim=1, stable=True)).flatten()
    return order[order < N]
