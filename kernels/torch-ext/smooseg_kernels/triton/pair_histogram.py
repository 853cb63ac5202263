"""Counts of patch pairs by their codes' similarity: a launch of its own, which reads no features.

A program holds a block of rows of the i side and walks over all patches of the image that it meets. Its counts stay in
registers until it is done; the additions that join them are of integers, so their order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import unit_rows
from .launch import config, contiguous, launch, operator, or_nothing, precision
from .pair_tiles import met_image
from .similarity import counted_places, feature_block


@triton.jit
def pair_histogram_kernel(
    # in
    mine_ptr,  # [B,P,Z] fp32 unit codes of the i side
    other_ptr,  # [N,Q,Z] fp32 unit codes of the j side
    partner_ptr,  # [B] int64
    # in and out
    counts_ptr,  # [BINS] int64
    # sizes
    N, P, Q, low,
    scale,  # bins / (high - low)
    Z: tl.constexpr, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    # switches
    HAS_PARTNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, start_i = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_I
    mine_ptr += n * P * Z
    other_ptr += met_image(partner_ptr, n, N, HAS_PARTNER) * Q * Z
    counted = start_i + tl.arange(0, BLOCK_I) < P
    counts = tl.zeros((BLOCK_BINS,), tl.int64)
    for start in range(0, Q, BLOCK_J):
        cosines = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        for first in range(0, Z, BLOCK_D):
            c_i = feature_block(mine_ptr, start_i, first, P, Z, D=Z, BLOCK=BLOCK_I, BLOCK_D=BLOCK_D)
            c_j = feature_block(other_ptr, start, first, Q, Z, D=Z, BLOCK=BLOCK_J, BLOCK_D=BLOCK_D)
            cosines = tl.dot(c_i, tl.trans(c_j), cosines, input_precision=PRECISION)
        both = counted[:, None] & (start + tl.arange(0, BLOCK_J) < Q)[None, :]
        counts += counted_places(cosines, low, scale, both, BINS=BINS, BLOCK_BINS=BLOCK_BINS, SIZE=BLOCK_I * BLOCK_J)
    bins = tl.arange(0, BLOCK_BINS)
    tl.atomic_add(counts_ptr + bins, counts, mask=(bins < BINS) & (counts > 0), sem="relaxed")


@operator("pair_histogram")
def pair_histogram(
    codes_i: Tensor, codes_j: Tensor, partner: Tensor | None, bins: int, low: float, high: float
) -> Tensor:
    """Counts in int64 [bins] the pairs of codes_i [B,P,Z] with codes_j [N,Q,Z], rows of any length; no gradient."""
    mine, other = (unit_rows(codes.float()).contiguous() for codes in (codes_i, codes_j))
    (B, P, Z), (N, Q, _) = mine.shape, other.shape
    counts = torch.zeros(bins, dtype=torch.int64, device=mine.device)
    settings = config("similarity_histogram", mine)
    with torch.cuda.device_of(mine):
        launch(
            pair_histogram_kernel, (triton.cdiv(P, settings["BLOCK_I"]), B), settings=settings,
            # in
            mine_ptr=mine, other_ptr=other, partner_ptr=or_nothing(contiguous(partner), counts),
            # out
            counts_ptr=counts,
            # sizes
            N=N, P=P, Q=Q, low=low, scale=bins / (high - low), Z=Z, BINS=bins,
            BLOCK_BINS=max(16, triton.next_power_of_2(bins)),
            # switches
            HAS_PARTNER=partner is not None, PRECISION=precision(mine.device),
        )  # fmt: skip
    return counts


@pair_histogram.register_fake
def _(codes_i, codes_j, partner, bins, low, high):
    return torch.empty(bins, dtype=torch.int64, device=codes_i.device)
