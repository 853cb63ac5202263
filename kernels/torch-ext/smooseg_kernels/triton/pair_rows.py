"""Kernels linear in the patches, around the blocks of pairs: lengths, unit codes, means, gradients through lengths."""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import invert, load_rows
from .pair_tiles import met_image
from .pair_totals import add_up


@triton.jit
def unit_rows_kernel(
    # in
    rows_ptr,  # [B,P,W]
    # out
    inverse_ptr,  # [B,P] fp32: 1 / length, or 0
    sums_ptr,  # [B,S,W] fp32, with SUMS: the sum of a split's unit rows
    unit_ptr,  # [B,P,WP], with WRITE: the unit rows, zero beyond W
    # sizes
    P, stride_b, stride_p, W: tl.constexpr, WP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
    # switches
    SUMS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    s, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(0)
    per_split = tl.cdiv(tl.cdiv(P, BLOCK_P), splits) * BLOCK_P
    first, last = s * per_split, tl.minimum(P, (s + 1) * per_split)
    row, w = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_W)
    acc = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    for start in range(first, last, BLOCK_P):
        tile = load_rows(rows_ptr + b * stride_b, start, last, stride_p, width=W, BLOCK=BLOCK_P, WIDTH=BLOCK_W).to(
            tl.float32
        )
        inverse = invert(tl.sqrt(tl.sum(tile * tile, 1)))
        tile *= inverse[:, None]
        inside = start + row < last
        tl.store(inverse_ptr + b * P + start + row, inverse, mask=inside)
        if WRITE:
            out_ptr = unit_ptr + (b * P + start) * WP + row[:, None] * WP + w[None, :]
            tl.store(out_ptr, tile.to(unit_ptr.dtype.element_ty), mask=inside[:, None] & (w < WP)[None, :])
        if SUMS:
            acc += tile
    if SUMS:
        tl.store(sums_ptr + (b * splits + s) * W + w, tl.sum(acc, 0), mask=w < W)


@triton.jit
def added_splits(sums_ptr, image, w, W, SPLITS: tl.constexpr):
    """Adds up [SPLITS,W] of one image to [W]."""
    total = tl.zeros((w.shape[0],), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(sums_ptr + (image * SPLITS + s) * W + w, mask=w < W, other=0.0)
    return total


@triton.jit
def row_means_kernel(
    # in
    features_ptr,  # [B,P,D] of the i side
    feature_sums_ptr,  # [N,S,D] fp32: sums of unit features of the j side
    codes_i_sums_ptr,  # [B,SI,Z] fp32
    codes_j_sums_ptr,  # [N,SJ,Z] fp32
    partner_ptr,  # [B] int64
    # out
    inverse_ptr,  # [B,P] fp32: 1 / |f|
    row_means_ptr,  # [B,P] fp32, with MEANS: mean_j S_ij
    parts_ptr,  # [B,blocks] fp32, with MEANS: the sum of a block's row means
    similarity_ptr,  # [B] fp32: s_i . s_j, the sum of an image pair's code cosines
    # sizes
    N, P, Q, stride_b, stride_p, D: tl.constexpr, Z: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_I: tl.constexpr, SPLITS_J: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    HAS_PARTNER: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    block, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j, start = met_image(partner_ptr, n, N, HAS_PARTNER), tl.program_id(0) * BLOCK_P
    row, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    tile = load_rows(features_ptr + n * stride_b, start, P, stride_p, width=D, BLOCK=BLOCK_P, WIDTH=BLOCK_D).to(
        tl.float32
    )
    inverse = invert(tl.sqrt(tl.sum(tile * tile, 1)))
    inside = start + row < P
    tl.store(inverse_ptr + n * P + start + row, inverse, mask=inside)
    if MEANS:
        u = added_splits(feature_sums_ptr, j, d, D, SPLITS) / Q
        means = tl.sum(tile * u[None, :], 1) * inverse
        tl.store(row_means_ptr + n * P + start + row, means, mask=inside)
        tl.store(parts_ptr + n * tl.num_programs(0) + block, tl.sum(means, 0))
    if block == 0:
        z = tl.arange(0, BLOCK_Z)
        s_i, s_j = added_splits(codes_i_sums_ptr, n, z, Z, SPLITS_I), added_splits(codes_j_sums_ptr, j, z, Z, SPLITS_J)
        tl.store(similarity_ptr + n, tl.sum(s_i * s_j, 0))


@triton.jit
def finish_pairs_kernel(
    # in
    energy_parts_ptr,  # [parts] fp32
    similarity_parts_ptr,  # [B] fp32
    clamped_parts_ptr,  # [parts] fp32, with MEANS
    mean_parts_ptr,  # [mean_parts] fp32, with MEANS: they add up to the sum of all row means
    # out
    energy_ptr,  # [] fp32
    similarity_ptr,  # [] fp32
    clamped_ptr,  # [] fp32
    closeness_ptr,  # [] fp32
    # sizes
    parts, B, mean_parts,
    share,  # 1 / the number of pairs
    row_share,  # 1 / the number of rows
    # switches
    MEANS: tl.constexpr,
):  # fmt: skip
    tl.store(energy_ptr, -share * add_up(energy_parts_ptr, parts))
    tl.store(similarity_ptr, share * add_up(similarity_parts_ptr, B))
    if MEANS:
        tl.store(clamped_ptr, share * add_up(clamped_parts_ptr, parts))
        tl.store(closeness_ptr, row_share * add_up(mean_parts_ptr, mean_parts))


@triton.jit
def code_gradient_kernel(
    # in
    codes_ptr,  # [images,P,Z] of any length
    inverse_ptr,  # [images,P] fp32
    rows_ptr,  # [B,P,ZP] fp32: gradient rows toward the unit codes, of every image of the i side
    sums_ptr,  # [other images,S,Z] fp32: sums of the other side's unit codes
    partner_ptr,  # [B] int64
    d_energy_ptr,  # [] fp32, with UNIT
    d_similarity_ptr,  # [] fp32
    # out
    d_codes_ptr,  # [images,P,Z]
    # sizes
    B, N, P,
    share,  # 1 / the number of pairs
    stride_b, stride_p, Z: tl.constexpr, ZP: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    FROM_I: tl.constexpr, HAS_PARTNER: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_SIMILARITY: tl.constexpr,
    UNIT: tl.constexpr,  # the rows are gradients for an upstream gradient of 1
):  # fmt: skip
    """Adds up the gradient rows of all images that met this one, in a fixed order, and goes through the lengths."""
    image, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_P
    row, z, images = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_Z), tl.arange(0, BLOCK_B)
    toward, mean = tl.zeros((BLOCK_P, BLOCK_Z), tl.float32), tl.zeros((BLOCK_Z,), tl.float32)
    if FROM_I or not HAS_PARTNER:
        if HAS_ROWS:
            toward += load_rows(rows_ptr + image * P * ZP, start, P, ZP, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z)
        if HAS_SIMILARITY:
            mean += added_splits(sums_ptr, met_image(partner_ptr, image, N, HAS_PARTNER), z, Z, SPLITS)
    else:
        met = tl.load(partner_ptr + images, mask=images < B, other=0)
        met = tl.where(images < B, tl.minimum(tl.maximum(met, 0), N - 1), -1) == image
        n = tl.min(tl.where(met, images, B), 0)
        while n < B:
            if HAS_ROWS:
                toward += load_rows(
                    rows_ptr + n.to(tl.int64) * P * ZP, start, P, ZP, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z
                )
            if HAS_SIMILARITY:
                mean += added_splits(sums_ptr, n.to(tl.int64), z, Z, SPLITS)
            n = tl.min(tl.where(met & (images > n), images, B), 0)
    gradient = tl.zeros((BLOCK_P, BLOCK_Z), tl.float32)
    if HAS_ROWS:
        if UNIT:
            toward *= tl.load(d_energy_ptr)
        gradient -= toward * share
    if HAS_SIMILARITY:
        gradient += (mean * (tl.load(d_similarity_ptr) * share))[None, :]
    inside = start + row < P
    inverse = tl.load(inverse_ptr + image * P + start + row, mask=inside, other=0.0)
    codes = load_rows(codes_ptr + image * stride_b, start, P, stride_p, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z)
    unit = codes.to(tl.float32) * inverse[:, None]
    gradient = (gradient - tl.sum(gradient * unit, 1)[:, None] * unit) * inverse[:, None]
    out_ptr = d_codes_ptr + (image * P + start) * Z + row[:, None] * Z + z[None, :]
    tl.store(out_ptr, gradient.to(d_codes_ptr.dtype.element_ty), mask=inside[:, None] & (z < Z)[None, :])
