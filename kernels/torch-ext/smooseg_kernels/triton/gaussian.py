"""Gaussian sums in Triton: a block of pairs lives in registers, from its distances to its product with the values.

A program holds a block of points i and walks over the blocks of points j. Per pair it takes 2 d - 1 fp32 operations for
the squared distance (the first difference needs no addition), one power of 2, as the points come scaled by
sqrt(log2(e) / 2), and the matrix unit's product with the values. A block of j whose bounding box lies so far off that
no Gaussian reaches `tolerance` is passed over.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..crf.boxes import bounding_boxes, farthest
from ..crf.gradients import register_gradients
from ..operators import either
from .launch import config, launch, operand, operand_dtype, operator, precision

WIDEST = 64  # columns of values that a program holds; wider values take several programs
BOX_SIDES = 8  # coordinates of a box's corner


@triton.jit
def gaussian_sums_kernel(
    # in
    points_ptr,  # [B,D,N] fp32, times sqrt(log2(e) / 2)
    boxes_ptr,  # [B,tiles,2,8] fp32: lowest and highest coordinates of the points of every block of j
    values_ptr,  # [B,N,KP], zero in the columns from K on
    # out
    sums_ptr,  # [B,N,K] fp32
    # sizes
    N, K,
    cut,  # squared distance of boxes from which on a block is passed over; with BY_POINTER a pointer to it
    KP: tl.constexpr, D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
    SIDES: tl.constexpr,
    # switches
    BY_POINTER: tl.constexpr,
    OPERAND: tl.constexpr,  # the type in which the matrix unit reads Gaussians and values
    PRECISION: tl.constexpr,
):  # fmt: skip
    b, first_column = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_K
    i, j, k = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_K)
    points_ptr += b * D * N
    values_ptr += b * N * KP + first_column
    if BY_POINTER:
        cut = tl.load(cut)
    tiles = tl.cdiv(N, BLOCK_J)
    boxes_ptr += b * tiles * 2 * SIDES
    side = tl.arange(0, SIDES)
    mine = ()
    low, high = tl.zeros((SIDES,), tl.float32), tl.zeros((SIDES,), tl.float32)
    for d in tl.static_range(D):
        # beyond the end the last point stands, which keeps the box as it is
        x_i = tl.load(points_ptr + d * N + tl.minimum(i, N - 1))
        low, high = tl.where(side == d, tl.min(x_i, 0), low), tl.where(side == d, tl.max(x_i, 0), high)
        mine = mine + (x_i,)
    acc = tl.zeros((BLOCK_I, BLOCK_K), tl.float32)
    for tile in range(0, tiles):
        their_low = tl.load(boxes_ptr + tile * 2 * SIDES + side)
        their_high = tl.load(boxes_ptr + tile * 2 * SIDES + SIDES + side)
        gap = tl.maximum(tl.maximum(their_low - high, low - their_high), 0.0)
        if tl.sum(gap * gap, 0) < cut:
            place = tile * BLOCK_J + j
            inside = place < N
            squared = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
            for d in tl.static_range(D):
                x_j = tl.load(points_ptr + d * N + place, mask=inside, other=0.0)
                step = mine[d][:, None] - x_j[None, :]
                squared = step * step if d == 0 else squared + step * step
            v_ptr = values_ptr + place.to(tl.int64)[:, None] * KP + k[None, :]
            # zeros there take the Gaussians beyond the end out
            v = tl.load(v_ptr, mask=inside[:, None], other=0.0).to(OPERAND)
            acc = tl.dot(tl.exp2(-squared).to(OPERAND), v, acc, input_precision=PRECISION)
    column = first_column + k
    out_ptr = sums_ptr + (b * N + i)[:, None] * K + column[None, :]
    tl.store(out_ptr, acc, mask=(i < N)[:, None] & (column < K)[None, :])


@operator("gaussian_sums")
def gaussian_sums(
    points: Tensor, values: Tensor, tolerance: float | None, tolerance_tensor: Tensor | None = None
) -> Tensor:
    """Takes points fp32 [B,N,d] and values [B,N,K] to sums fp32 [B,N,K]."""
    (B, N, d), K = points.shape, values.shape[2]
    settings = config("gaussian_sums", values)
    width = min(WIDEST, max(16, triton.next_power_of_2(K)))
    columns = -(-K // width) * width
    sums = torch.empty(B, N, K, dtype=torch.float32, device=points.device)
    padded = torch.nn.functional.pad(values, (0, columns - K)).to(operand_dtype(values.dtype)).contiguous()
    cut = 0.5 * math.log2(math.e) * farthest(either(tolerance, tolerance_tensor), torch.float32) ** 2
    scaled = (points * math.sqrt(0.5 * math.log2(math.e))).mT.contiguous()
    with torch.cuda.device_of(points):
        launch(
            gaussian_sums_kernel, (triton.cdiv(N, settings["BLOCK_I"]), B, columns // width), settings=settings,
            # in
            points_ptr=scaled, boxes_ptr=bounding_boxes(scaled, settings["BLOCK_J"], BOX_SIDES), values_ptr=padded,
            # out
            sums_ptr=sums,
            # sizes
            N=N, K=K, cut=cut, KP=columns, D=d,
            BLOCK_K=width, SIDES=BOX_SIDES,
            # switches
            BY_POINTER=tolerance is None, OPERAND=operand(values.dtype), PRECISION=precision(points.device),
        )  # fmt: skip
    return sums


@gaussian_sums.register_fake
def _(points, values, tolerance, tolerance_tensor=None):
    return torch.empty(values.shape, dtype=torch.float32, device=points.device)


register_gradients(gaussian_sums)
