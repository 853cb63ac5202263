"""The Gaussian sum in PyTorch (`impl="torch"`): tiles of bounded size, in any memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ..operators import either, operator
from .boxes import bounding_boxes, farthest
from .gradients import register_gradients

CPU_PAIRS, GPU_PAIRS = 1 << 18, 1 << 24  # pairs in one tile; on a CPU it stays in the cache
BLOCK = 64  # points that are taken or passed over together


# on a GPU it reads back which blocks are near, which no CUDA graph can hold
@operator("gaussian_sums_tiled", torch.Tag.cudagraph_unsafe)
def gaussian_sums(
    points: Tensor, values: Tensor, tolerance: float | None, tolerance_tensor: Tensor | None = None
) -> Tensor:
    """Takes points [B,N,d] and values [B,N,K] of one dtype, fp32 or fp64, to sums [B,N,K].

    Squared distances are sums of squared differences. A difference is rounded once, so the exponent of a pair is off by
    about 2^-22 of itself, at most 4e-6 where the Gaussian is above 1e-7. The expansion |p_i|^2 + |p_j|^2 - 2 p_i . p_j
    would be off by 2^-23 |p|^2: 1e-3 for colours over a sigma of 3, whose points are up to 147 long.
    """
    B, N, d = points.shape
    rows = max(BLOCK, (CPU_PAIRS if points.device.type == "cpu" else GPU_PAIRS) // N // BLOCK * BLOCK)
    coordinates = points.mT.contiguous()  # [B,d,N]
    boxes = bounding_boxes(coordinates, BLOCK, d)
    reach = farthest(either(tolerance, tolerance_tensor), points.dtype)
    sums = values.new_empty(values.shape)
    for b in range(B):
        low, high = boxes[b, :, 0], boxes[b, :, 1]
        for start in range(0, N, rows):
            part, blocks = slice(start, start + rows), slice(start // BLOCK, (start + rows) // BLOCK)
            lowest, highest = low[blocks].amin(0), high[blocks].amax(0)
            gap = torch.maximum(low - highest, lowest - high).clamp_(min=0.0)
            near = (gap.norm(dim=1) < reach).repeat_interleave(BLOCK)[:N].nonzero()[:, 0]
            if len(near) == N:
                sums[b, part] = gaussians(coordinates[b, :, part], coordinates[b]) @ values[b]
            else:
                sums[b, part] = gaussians(coordinates[b, :, part], coordinates[b, :, near]) @ values[b, near]
    return sums


def gaussians(mine: Tensor, theirs: Tensor) -> Tensor:
    """Takes coordinates [d,M] and [d,N] to exp(-|p_i - p_j|^2 / 2), [M,N]."""
    squared = (mine[0, :, None] - theirs[0]).square_()
    for x_i, x_j in zip(mine[1:], theirs[1:]):
        step = x_i[:, None] - x_j
        squared.addcmul_(step, step)
    cut = -0.5 * farthest(0.0, squared.dtype) ** 2
    return threshold(squared.mul_(-0.5), cut, -torch.inf, inplace=True).exp_()


@gaussian_sums.register_fake
def _(points, values, tolerance, tolerance_tensor=None):
    return values.new_empty(values.shape)


register_gradients(gaussian_sums)
