"""The lengths of feature rows, |m f_p|, for blocks of heads that share them and programs without whole rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_norms_kernel(
    # in
    features_ptr,  # [B,P,D]
    scale_ptr,  # [B,D] fp32
    # out
    norms_ptr,  # [B,P] fp32
    # sizes
    P, stride_fb, stride_fp, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    # switches
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    b, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_P
    row, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    squares = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    tile_ptr = features_ptr + b * stride_fb + start.to(tl.int64) * stride_fp + row[:, None] * stride_fp
    for first in range(0, D, BLOCK_D):
        channel = first + d
        f = tl.load(
            tile_ptr + channel[None, :], mask=(start + row < P)[:, None] & (channel < D)[None, :], other=0.0
        ).to(tl.float32)
        if HAS_SCALE:
            f *= tl.load(scale_ptr + b * D + channel, mask=channel < D, other=0.0)[None, :]
        squares += f * f
    tl.store(norms_ptr + b * P + start + row, tl.sqrt(tl.sum(squares, 1)), mask=start + row < P)
