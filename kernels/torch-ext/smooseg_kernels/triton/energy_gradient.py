"""The gradient of the energies to the codes (or to the probs), from one more read of the features.

An image's sums act on each of its patches alone: dE/dc_p = -w_p / B (pull^T f_p + prob pull). The gradient goes on
through the unit probs, the softmax and the cosine to the code, all recomputed from the code in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .image_moments import LIFT
from .labels import (
    codes_backward,
    cosines,
    inverse_norms,
    invert,
    load_rows,
    load_unit_prototypes,
    split,
    unit_probs,
    unit_probs_backward,
)
from .pair_sums import count_pairs, largest_upstream, upstream


@triton.jit
def energy_gradient_kernel(
    # in
    features_ptr,  # [B,P,D]
    rows_ptr,  # codes [H,B,P,Z], or probs [H,B,P,K] without FROM_CODES
    teacher_ptr,  # [H,K,Z]
    weight_ptr,  # [B,P] fp32
    norms_ptr,  # [B,P] fp32
    totals_ptr,  # [B] fp32
    partners_ptr,  # [rows,B] int64
    thresholds_ptr,  # [H,T] fp32
    mean_ptr,  # [T] fp32
    pull_ptr,  # [H,B,D,BLOCK_K]
    prob_pull_ptr,  # [H,B,T,BLOCK_K] fp32
    drift_ptr,  # [H,B,SLICES,BLOCK_K] fp32
    unit_d_student_ptr,  # [H,K,Z] fp32
    d_total_ptr,  # [H] fp32
    d_energy_ptr,  # [H,T] fp32
    d_distance_ptr,  # [H,T] fp32
    d_data_ptr,  # [H] fp32
    # out
    d_rows_ptr,  # like rows, contiguous
    d_student_ptr,  # [H,K,Z]
    # sizes
    B, P, head_blocks, temperature,
    stride_fb, stride_fp, stride_rh, stride_rb, stride_rp, stride_th, stride_tt, stride_total, stride_data,
    D: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, T: tl.constexpr, ENTRIES: tl.constexpr, SLICES: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    # switches
    FROM_CODES: tl.constexpr, RELATIVE: tl.constexpr, CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROWS_GRADIENT: tl.constexpr, STUDENT_GRADIENT: tl.constexpr,
    HAS_TOTAL: tl.constexpr, HAS_ENERGY: tl.constexpr, HAS_DISTANCE: tl.constexpr, HAS_DATA: tl.constexpr,
    UNIT: tl.constexpr,  # pull is for upstream gradients of 1; the total's is applied here
    FEATURE: tl.constexpr,  # the types in which the matrix unit reads features and codes
    CODE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # heads of one tile run next to each other and find its features in the cache; a second axis ends at 65,535
    head, tile = tl.program_id(0) % head_blocks * HEADS, tl.program_id(0) // head_blocks
    b = tl.program_id(1).to(tl.int64)
    row, k = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    WIDTH: tl.constexpr = Z if FROM_CODES else K
    column = tl.arange(0, BLOCK_Z if FROM_CODES else BLOCK_K)
    if ROWS_GRADIENT:
        start = tile * BLOCK_P
        inside = start + row < P
        pulls = (tl.zeros((BLOCK_P, BLOCK_K), tl.float32),) * HEADS
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            feature_inside, pull_inside = inside[:, None], (k < BLOCK_K)[None, :]
            if D % BLOCK_D != 0:
                feature_inside, pull_inside = feature_inside & (d < D)[None, :], pull_inside & (d < D)[:, None]
            first_ptr = features_ptr + b * stride_fb + start.to(tl.int64) * stride_fp
            tile_ptr = first_ptr + row[:, None] * stride_fp + d[None, :]
            features = tl.load(tile_ptr, mask=feature_inside, other=0.0).to(FEATURE)
            new_pulls = ()
            for j in tl.static_range(HEADS):
                image_ptr = pull_ptr + ((head + j).to(tl.int64) * B + b) * D * BLOCK_K
                pull = tl.load(image_ptr + d[:, None] * BLOCK_K + k[None, :], mask=pull_inside, other=0.0).to(FEATURE)
                new_pulls = new_pulls + (tl.dot(features, pull, pulls[j], input_precision=PRECISION),)
            pulls = new_pulls
        inverse = invert(tl.load(norms_ptr + b * P + start + row, mask=inside, other=0.0))
        total = tl.load(totals_ptr + b)
        weight = tl.zeros((BLOCK_P,), tl.float32) + tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
        if HAS_WEIGHT:
            weight *= tl.load(weight_ptr + b * P + start + row, mask=inside, other=0.0)
        for j in tl.static_range(HEADS):
            h = (head + j).to(tl.int64)
            largest = tl.zeros((), tl.float32)
            if UNIT:
                largest += tl.load(d_total_ptr + h * stride_total)
            else:
                largest += largest_upstream(
                    d_total_ptr, d_energy_ptr, d_distance_ptr, h, stride_total, T=T,
                    HAS_TOTAL=HAS_TOTAL, HAS_ENERGY=HAS_ENERGY, HAS_DISTANCE=HAS_DISTANCE,
                )  # fmt: skip
            constant = tl.zeros((BLOCK_K,), tl.float32)
            for i in tl.static_range(SLICES):
                constant -= tl.load(drift_ptr + ((h * B + b) * SLICES + i) * BLOCK_K + k)
            for t in tl.static_range(T):
                # energy t moves with the distance by M - b, or by -b without centring
                threshold = tl.load(thresholds_ptr + h * stride_th + t * stride_tt)
                mean = tl.load(mean_ptr + t)
                if RELATIVE:
                    threshold += mean
                slope = -threshold
                if CENTER:
                    slope += mean
                if not UNIT:
                    arriving = upstream(
                        d_total_ptr, d_energy_ptr, h, t, stride_total, T=T, HAS_TOTAL=HAS_TOTAL, HAS_ENERGY=HAS_ENERGY
                    )
                    slope *= arriving / largest
                    if HAS_DISTANCE:
                        slope += tl.load(d_distance_ptr + h * T + t) / largest
                share = B / tl.maximum(count_pairs(totals_ptr, partners_ptr, B, ENTRIES[t], BLOCK_B), 1.0)
                constant += share * slope * tl.load(prob_pull_ptr + ((h * B + b) * T + t) * BLOCK_K + k)
            d_c = pulls[j] * inverse[:, None] + constant[None, :]
            factor = weight * (-largest / (B * LIFT))

            head_ptr = rows_ptr + h * stride_rh + b * stride_rb
            if FROM_CODES:
                unit = load_unit_prototypes(teacher_ptr + h * K * Z, K, Z, BLOCK_K, BLOCK_Z)[0]
                high, low = split(unit, CODE)
                codes = load_rows(head_ptr, start, P, stride_rp, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z).to(CODE)
                code_inverse = inverse_norms(codes)
                cosine = cosines(codes, code_inverse, high, low, CODE, PRECISION)
                d_cosine = unit_probs_backward(unit_probs(cosine, k, temperature, K), d_c) / temperature
                d_row = (
                    codes_backward(d_cosine, cosine, codes, code_inverse, high, OPERAND=CODE, PRECISION=PRECISION)
                    * factor[:, None]
                )
            else:
                probs = load_rows(head_ptr, start, P, stride_rp, width=K, BLOCK=BLOCK_P, WIDTH=BLOCK_K).to(tl.float32)
                prob_inverse = inverse_norms(probs)
                c = probs * prob_inverse[:, None]
                d_row = (d_c - c * tl.sum(c * d_c, 1)[:, None]) * (prob_inverse * factor)[:, None]
            out_ptr = d_rows_ptr + ((h * B + b) * P + start) * WIDTH + row[:, None] * WIDTH + column[None, :]
            tl.store(out_ptr, d_row.to(d_rows_ptr.dtype.element_ty), mask=inside[:, None] & (column < WIDTH)[None, :])

    if STUDENT_GRADIENT:  # noqa: SIM102 - one condition for the compiler, one for the program
        if (tile == 0) & (b == 0):
            z = tl.arange(0, BLOCK_Z)
            for j in tl.static_range(HEADS):
                h = (head + j).to(tl.int64)
                g = upstream(d_total_ptr, d_data_ptr, h, 0, stride_total, T=1, HAS_TOTAL=HAS_TOTAL, HAS_ENERGY=False)
                if HAS_DATA:
                    g += tl.load(d_data_ptr + h * stride_data)
                offset = h * K * Z + k[:, None] * Z + z[None, :]
                inside_k = (k < K)[:, None] & (z < Z)[None, :]
                unit_gradient = tl.load(unit_d_student_ptr + offset, mask=inside_k, other=0.0)
                tl.store(d_student_ptr + offset, (g * unit_gradient).to(d_student_ptr.dtype.element_ty), mask=inside_k)
