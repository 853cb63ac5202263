"""The moments of every image, sum_p w_p f_p c_p^T [D,K] and sum_p w_p f_p [D], of unit features and label rows.

One batched product of the features with the label rows of all heads next to each other. Column K of a head's rows is 1:
its product is sum_p w_p f_p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .label_rows import image_weight
from .labels import load_tile
from .row_norms import load_operand, load_scale


@triton.jit
def row_products_kernel(
    # in
    features_ptr,  # [B,P,D]
    sides_ptr,  # [B,P,N]: label rows from `label_rows_kernel`, N = H * BLOCK_K
    scale_ptr,  # [B,D] fp32
    weight_ptr,  # [B,P] fp32
    norms_ptr,  # [B,P] fp32, with UNIT_FEATURES
    # out
    sums_ptr,  # [S,B,D,N]: LIFT times a split of the weighted mean of f c^T / |f|, with scaled features
    # sizes
    B, P, per_split, stride_fb, stride_fp, D: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    # switches
    HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    UNIT_FEATURES: tl.constexpr,  # normalise the features themselves: 1 / |f| could leave fp16's range
    FEATURE: tl.constexpr,  # the type in which the matrix unit reads both
    PRECISION: tl.constexpr,
):  # fmt: skip
    """An image and a split of its patches, a slice of D and a block of columns. Blocks of one slice run together."""
    first, slice_ = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_D
    b, split = (tl.program_id(2) % B).to(tl.int64), (tl.program_id(2) // B).to(tl.int64)
    column, d = first + tl.arange(0, BLOCK_N), slice_ + tl.arange(0, BLOCK_D)
    features_ptr += b * stride_fb
    scale_ptr += b * D
    sides_ptr += b * P * N
    acc = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    last = tl.minimum(P, (split + 1) * per_split).to(tl.int32)
    for start in range((split * per_split).to(tl.int32), last, BLOCK_P):
        f = load_operand(
            features_ptr, scale_ptr, norms_ptr + b * P, start, last, stride_fp, first=slice_, D=D,
            BLOCK_P=BLOCK_P, BLOCK_D=BLOCK_D, HAS_SCALE=HAS_SCALE, UNIT_FEATURES=UNIT_FEATURES, FEATURE=FEATURE,
        )  # fmt: skip
        side = load_tile(sides_ptr, start, last, N, first, width=N, BLOCK=BLOCK_P, WIDTH=BLOCK_N).to(FEATURE)
        acc = tl.dot(tl.trans(f), side, acc, input_precision=PRECISION)
    acc *= image_weight(weight_ptr + b * P, P, HAS_WEIGHT)[2]
    if HAS_SCALE and not UNIT_FEATURES:
        acc *= load_scale(scale_ptr, slice_, D, BLOCK_D)[:, None]
    out_ptr = sums_ptr + ((split * B + b) * D + d)[:, None] * N + column[None, :]
    tl.store(out_ptr, acc.to(sums_ptr.dtype.element_ty), mask=(d < D)[:, None] & (column < N)[None, :])
