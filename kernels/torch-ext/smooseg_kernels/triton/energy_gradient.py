"""The gradient of the energies to the codes (or to the probs), from one more read of the features.

An image's sums act on each of its patches alone: dE/dc_p = -w_p / B (pull^T f_p + constant). The gradient goes on
through the unit probs, the softmax and the cosine to the code, all recomputed from the code in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import (
    LIFT,
    LN2,
    inverse_norms,
    invert,
    load_prepared,
    load_repeated,
    product,
    read_sharpness,
    repeated_rows,
    soft_labels,
    unit_parts,
)
from .student_gradient import scale_student_gradient


@triton.jit
def load_rows_apart(ptr, start, P, stride, width: tl.constexpr, BLOCK_P: tl.constexpr, WIDTH: tl.constexpr):
    """Loads rows as [BLOCK_P,WIDTH // 8,8]: [BLOCK_P,WIDTH] the compiler would copy to shared memory and wait for."""
    row, group = repeated_rows(start, P, BLOCK_P), tl.arange(0, WIDTH // 8)
    column = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    tile_ptr = ptr + tl.cast(start, tl.int64) * stride + (row[:, None, None] * stride + column)
    if width % WIDTH == 0:
        block = tl.load(tile_ptr)
    else:
        block = tl.load(tile_ptr, mask=column < width, other=0.0)
    return block


@triton.jit
def load_pull(ptr, first, stride_h, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, HEADS: tl.constexpr):
    """Loads [BLOCK_D,HEADS * BLOCK_K], the pulls of several heads next to each other."""
    d, column = tl.arange(0, BLOCK_D), tl.arange(0, HEADS * BLOCK_K)
    tile_ptr = ptr + first * BLOCK_K + (d[:, None] * BLOCK_K + column[None, :] % BLOCK_K)
    if HEADS > 1:
        tile_ptr += (column // BLOCK_K).to(tl.int64)[None, :] * stride_h
    if D % BLOCK_D == 0:
        pull = tl.load(tile_ptr)
    else:
        pull = tl.load(tile_ptr, mask=(first + d < D)[:, None], other=0.0)
    return pull


@triton.jit
def by_head(columns, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, HEADS: tl.constexpr):
    """Cuts [BLOCK_P,HEADS * BLOCK_K] into the parts of 2 or 4 heads. Threads keep what they hold."""
    if HEADS == 4:
        pairs = tl.permute(tl.reshape(columns, (BLOCK_P, 2, 2, BLOCK_K)), (0, 3, 1, 2))
        even, odd = tl.split(pairs)
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        parts = (first, second, third, fourth)
    else:
        parts = tl.split(tl.permute(tl.reshape(columns, (BLOCK_P, 2, BLOCK_K)), (0, 2, 1)))
    return parts


@triton.jit
def code_gradient(
    codes, high, low, pulled, inverse, constant, factor, sharpness,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes d_c = pulled / |f| + constant through unit probs and cosines: [BLOCK_P,BLOCK_Z], times `factor`."""
    # one number of a row, as it moves between threads: all that follows takes the lengths from it
    k, scale = tl.arange(0, BLOCK_K), inverse_norms(codes) * sharpness
    toward = product(codes, high, low, PRECISION)
    _, e, e_inverse = soft_labels(toward, scale, k, sharpness, K, BOUNDED)
    d_c = pulled * inverse[:, None] + constant[None, :]
    # with c = e / |e|, d_logit = c (d_c - c sum(c d_c)); factors of a row wait for one product
    d_logit = d_c - e * (tl.sum(e * d_c, 1) * (e_inverse * e_inverse))[:, None]
    factor *= LN2  # the logits' own factor 1 / temperature is sharpness * ln 2
    if tl.float16 == high.dtype:  # the factor may be below its range
        d_logit *= e * e_inverse[:, None]
    else:
        d_logit *= e * (e_inverse * scale * factor)[:, None]
    along = tl.sum(d_logit * toward, 1) * (scale * scale) * (1.0 / (sharpness * sharpness))
    back = tl.dot(d_logit.to(high.dtype), high, input_precision=PRECISION)
    d_codes = back - along[:, None] * codes.to(tl.float32)
    if tl.float16 == high.dtype:
        d_codes *= (scale * factor)[:, None]
    return d_codes


@triton.jit
def prob_gradient(probs, pulled, inverse, constant, factor):
    """Takes d_c = pulled / |f| + constant through probs' own normalisation: [BLOCK_P,BLOCK_K], times `factor`."""
    prob_inverse = inverse_norms(probs)
    c = probs * prob_inverse[:, None]
    d_c = pulled * inverse[:, None] + constant[None, :]
    return (d_c - c * tl.sum(c * d_c, 1)[:, None]) * (prob_inverse * factor)[:, None]


@triton.jit
def energy_gradient_kernel(
    # in
    features_ptr,  # [B,P,D]
    rows_ptr,  # codes [H,B,P,Z], or probs [H,B,P,K] without FROM_CODES
    prototypes_ptr,  # teacher [H,K,Z]; with PREPARED unit rows [H,2,2 * BLOCK_K,BLOCK_Z], see load_prepared
    weight_ptr,  # [B,P] fp32
    norms_ptr,  # [B,P] fp32
    totals_ptr,  # [B] fp32
    pull_ptr,  # [H,B,D,BLOCK_K]
    constant_ptr,  # [H,B,BLOCK_K] fp32
    upstream_ptr,  # [H] fp32: the factor of pull and constant
    d_total_ptr,  # [H] fp32
    d_data_ptr,  # [H] fp32
    unit_d_student_ptr,  # [H,K,Z] fp32
    # out
    d_rows_ptr,  # like rows, contiguous
    d_student_ptr,  # [H,K,Z]
    # sizes
    B, P, sharpness,
    stride_fb, stride_fp, stride_rh, stride_rb, stride_rp, stride_upstream, stride_total, stride_data,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    HEADS: tl.constexpr,  # of a program, which share its features: 1, 2 or 4
    # switches
    FROM_CODES: tl.constexpr, PREPARED: tl.constexpr, BOUNDED: tl.constexpr, BY_POINTER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, ROWS_GRADIENT: tl.constexpr,
    STUDENT_GRADIENT: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_DATA: tl.constexpr,
    FEATURE: tl.constexpr,  # the types in which the matrix unit reads features and codes
    CODE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiplies a tile of features by a head's pull and takes the product back to the head's rows."""
    # heads of one tile run next to each other and find its features in the cache; a second axis ends at 65,535
    GROUPS: tl.constexpr = H // HEADS
    tile, b = tl.program_id(0) // GROUPS, tl.program_id(1).to(tl.int64)
    first_head = (tl.program_id(0) % GROUPS).to(tl.int64) * HEADS
    WIDTH: tl.constexpr = Z if FROM_CODES else K
    BLOCK_WIDTH: tl.constexpr = BLOCK_Z if FROM_CODES else BLOCK_K
    if ROWS_GRADIENT:
        sharpness = read_sharpness(sharpness, BY_POINTER)
        start = tile * BLOCK_P
        row = repeated_rows(start, P, BLOCK_P)  # a row that repeats another stores the same
        features_ptr += b * stride_fb
        # these loads overlap with the product's
        inverse = invert(tl.load(norms_ptr + b * P + start + row))
        total = tl.load(totals_ptr + b)
        share = tl.where(total > 0, (-1.0 / LIFT) / (tl.maximum(total, 1e-30) * B), 0.0)
        rows_of_heads, constants, factors = (), (), ()
        for i in tl.static_range(HEADS):
            constant_of_head = constant_ptr + ((first_head + i) * B + b) * BLOCK_K
            constants = constants + (tl.load(constant_of_head + tl.arange(0, BLOCK_K)),)
            factors = factors + (share * tl.load(upstream_ptr + (first_head + i) * stride_upstream),)
            head_ptr = rows_ptr + (first_head + i) * stride_rh + b * stride_rb
            rows_of_heads = rows_of_heads + (
                load_rows_apart(head_ptr, start, P, stride_rp, WIDTH, BLOCK_P=BLOCK_P, WIDTH=BLOCK_WIDTH),
            )
        pull_ptr += (first_head * B + b) * D * BLOCK_K
        pulled = tl.zeros((BLOCK_P, HEADS * BLOCK_K), tl.float32)
        for first in range(0, D, BLOCK_D):
            f = load_repeated(features_ptr, start, P, stride_fp, first, D, BLOCK=BLOCK_P, WIDTH=BLOCK_D).to(FEATURE)
            pull = load_pull(
                pull_ptr, first, B * D * BLOCK_K, D=D, BLOCK_D=BLOCK_D, BLOCK_K=BLOCK_K, HEADS=HEADS
            ).to(FEATURE)  # fmt: skip
            pulled = tl.dot(f, pull, pulled, input_precision=PRECISION)
        pulled_of_heads = ()
        if HEADS > 1:
            pulled_of_heads += by_head(pulled, BLOCK_P, BLOCK_K, HEADS)
        else:
            pulled_of_heads += (pulled,)
        column = tl.arange(0, BLOCK_WIDTH)
        for i in tl.static_range(HEADS):
            h = first_head + i
            constant, factor = constants[i], factors[i]
            if HAS_WEIGHT:
                factor *= tl.load(weight_ptr + b * P + start + row)
            rows = tl.reshape(rows_of_heads[i], (BLOCK_P, BLOCK_WIDTH))
            if FROM_CODES:
                if PREPARED:
                    parts = load_prepared(prototypes_ptr + h * 4 * BLOCK_K * BLOCK_Z, CODE, BLOCK_K, BLOCK_K, BLOCK_Z)
                else:
                    parts = unit_parts(prototypes_ptr + h * K * Z, CODE, K, Z, BLOCK_K, BLOCK_Z)
                d_row = code_gradient(
                    rows.to(CODE), parts[0], parts[1], pulled_of_heads[i], inverse, constant, factor=factor,
                    sharpness=sharpness, K=K, BLOCK_K=BLOCK_K, BOUNDED=BOUNDED, PRECISION=PRECISION,
                )  # fmt: skip
            else:
                d_row = prob_gradient(rows.to(tl.float32), pulled_of_heads[i], inverse, constant, factor)
            out_ptr = d_rows_ptr + ((h * B + b) * P + start) * WIDTH + row[:, None] * WIDTH + column[None, :]
            tl.store(out_ptr, d_row.to(d_rows_ptr.dtype.element_ty), mask=(column < WIDTH)[None, :])

    if STUDENT_GRADIENT:  # noqa: SIM102 - one condition for the compiler, one for the program
        if (tile == 0) & (b == 0):
            for i in tl.static_range(HEADS):
                scale_student_gradient(
                    d_student_ptr, unit_d_student_ptr, d_total_ptr, d_data_ptr, first_head + i, stride_total,
                    stride_data=stride_data, K=K, Z=Z, BLOCK_K=BLOCK_K, BLOCK_Z=BLOCK_Z, HAS_TOTAL=HAS_TOTAL,
                    HAS_DATA=HAS_DATA,
                )  # fmt: skip
