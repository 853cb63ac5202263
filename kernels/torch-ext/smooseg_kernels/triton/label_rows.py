"""Unit label rows, ready for the product with the features, and their sums over patches.

The energies' moments take two launches, because registers hold either a softmax or a matrix product's sums: label rows
in 16 bits next to the features' norms, then one product for all heads (row_products.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import (
    LIFT,
    both_products,
    both_unit_parts,
    data_term,
    inverse_norms,
    invert,
    likeliest,
    load_prepared,
    load_rows,
    product,
    read_sharpness,
    soft_labels,
    unit_parts,
)
from .row_norms import feature_norms


@triton.jit
def image_weight(
    weight_ptr,  # [P] fp32 of one image
    P, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Adds up an image's patch weights: their total, a power of two that brings the largest near 1, and the lift.

    The lift takes sums with the weights so scaled to LIFT times the weighted mean; 0 for an image without weight. A
    power of two, because a common factor rounded to 16 bits would shift every sum alike.
    """
    total, relative = tl.zeros((), tl.float32) + P, tl.full((), 1.0, tl.float32)
    if HAS_WEIGHT:
        i = tl.arange(0, 1024)
        acc, largest = tl.zeros((1024,), tl.float32), tl.zeros((1024,), tl.float32)
        for start in range(0, P, 1024):
            weight = tl.load(weight_ptr + start + i, mask=start + i < P, other=0.0)
            acc, largest = acc + weight, tl.maximum(largest, weight)
        total = tl.sum(acc, 0)
        relative = tl.exp2(-tl.floor(tl.log2(tl.maximum(tl.max(largest, 0), 1e-30))))
    return total, relative, tl.where(total > 0, LIFT / tl.maximum(total * relative, 1e-30), 0.0)


@triton.jit
def load_weight(weight_ptr, relative, start, last, BLOCK_P: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """Loads the scaled weights of rows start .. start + BLOCK_P: [BLOCK_P], 0 from row `last` on."""
    row = start + tl.arange(0, BLOCK_P)
    weight = tl.where(row < last, 1.0, 0.0)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row, mask=row < last, other=0.0) * relative
    return weight


@triton.jit
def student_tile(
    # in
    codes,  # [BLOCK_P,BLOCK_Z], 0 from the last row on
    toward_student,  # [BLOCK_P,BLOCK_K]: their products with the student's unit prototypes
    label,  # [BLOCK_P]
    code_scale,  # [BLOCK_P]: sharpness / |code|
    weight,  # [BLOCK_P], 0 from the last row on
    # sums so far
    entropy,  # [BLOCK_P]: weight times the cross-entropy
    student_sums,  # [BLOCK_Z,BLOCK_K]: sharpness sum_p weight (gradient to the cosine) code_p / |code_p|
    sharpness, K: tl.constexpr, BLOCK_K: tl.constexpr,
    # switches
    HAS_WEIGHT: tl.constexpr, STUDENT_GRADIENT: tl.constexpr, CODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the data term's sums with this tile's."""
    loss, d_cosine = data_term(toward_student, label, code_scale, tl.arange(0, BLOCK_K), sharpness, K)
    entropy += loss * weight
    if STUDENT_GRADIENT:
        if HAS_WEIGHT:  # else codes beyond the last are 0
            d_cosine *= weight[:, None]
        if tl.float16 == CODE:  # 1 / length of short codes is beyond its range
            codes = (codes.to(tl.float32) * code_scale[:, None]).to(CODE)
        else:  # codes go to the matrix unit as they came, and their length divides the other factor
            d_cosine *= code_scale[:, None]
        student_sums = tl.dot(tl.trans(codes), d_cosine.to(CODE), student_sums, input_precision=PRECISION)
    return entropy, student_sums


@triton.jit
def label_tile(
    # in
    rows_ptr,  # [P,Z] codes of one image and head, or [P,K] probs without FROM_CODES
    high, low,  # [2 * BLOCK_K,BLOCK_Z], or with APART [BLOCK_K,BLOCK_Z]: unit prototypes in two parts
    weight,  # [BLOCK_P], 0 from row `last` on
    inverse,  # [BLOCK_P]: what divides the rows next to the weight, 1 / |f|
    # out
    labels_ptr,  # [P] int16, with APART
    # sums so far
    label_sums,  # [BLOCK_P,BLOCK_K]: weight c
    entropy, student_sums,  # of `student_tile`
    # sizes
    start, last, stride, sharpness,
    K: tl.constexpr, Z: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    FROM_CODES: tl.constexpr, APART: tl.constexpr, BOUNDED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    STUDENT_GRADIENT: tl.constexpr, CODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns weight inverse c [BLOCK_P,BLOCK_K], with weight inverse in column K, and the sums with this tile's."""
    k = tl.arange(0, BLOCK_K)
    if FROM_CODES:
        codes = load_rows(rows_ptr, start, last, stride, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z).to(CODE)
        code_inverse = inverse_norms(codes)
        if APART:
            toward_teacher = product(codes, high, low, PRECISION)
        else:
            toward_teacher, toward_student = both_products(codes, high, low, BLOCK_P, BLOCK_K, PRECISION)
        code_scale = code_inverse * sharpness
        x, e, e_inverse = soft_labels(toward_teacher, code_scale, k, sharpness, K, BOUNDED)
        label = likeliest(x, k, BLOCK_K)
        if APART:
            row = start + tl.arange(0, BLOCK_P)
            tl.store(labels_ptr + row, label.to(tl.int16), mask=row < last)
        else:
            entropy, student_sums = student_tile(
                codes, toward_student, label, code_scale, weight, entropy, student_sums=student_sums,
                sharpness=sharpness, K=K, BLOCK_K=BLOCK_K, HAS_WEIGHT=HAS_WEIGHT, STUDENT_GRADIENT=STUDENT_GRADIENT,
                CODE=CODE, PRECISION=PRECISION,
            )  # fmt: skip
    else:
        e = load_rows(rows_ptr, start, last, stride, width=K, BLOCK=BLOCK_P, WIDTH=BLOCK_K).to(tl.float32)
        e_inverse = inverse_norms(e)
    scale = weight * e_inverse
    label_sums += e * scale[:, None]
    side = tl.where((k == K)[None, :], (weight * inverse)[:, None], e * (scale * inverse)[:, None])
    return side, label_sums, entropy, student_sums


@triton.jit
def store_student_sums(
    # out
    entropy_ptr,  # [] fp32
    student_sums_ptr,  # [K,Z]
    # in
    entropy, student_sums, lift,
    K: tl.constexpr, Z: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr, STUDENT_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Stores the data term's sums of a program's tiles, lifted."""
    k, z = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Z)
    tl.store(entropy_ptr, tl.sum(entropy, 0) * lift)
    if STUDENT_GRADIENT:
        out_ptr = student_sums_ptr + k[None, :] * Z + z[:, None]
        out = (student_sums * lift).to(student_sums_ptr.dtype.element_ty)
        tl.store(out_ptr, out, mask=(k < K)[None, :] & (z < Z)[:, None])


@triton.jit
def label_rows_kernel(
    # in
    features_ptr,  # [B,P,D], with NORMS
    rows_ptr,  # codes [H,B,P,Z], or probs [H,B,P,K] of any length without FROM_CODES
    student_ptr,  # [H,K,Z]
    teacher_ptr,  # [H,K,Z]
    prepared_ptr,  # [H,2,2 * BLOCK_K,BLOCK_Z]: with PREPARED, both as unit rows in two parts
    scale_ptr,  # [B,D] fp32
    weight_ptr,  # [B,P] fp32
    # in; with NORMS out
    norms_ptr,  # [B,P] fp32
    # out
    sides_ptr,  # [B,P,H*BLOCK_K]: scaled weight times unit label rows over |f|; column K of a head has 1 in their place
    label_sums_ptr,  # [H,B,PARTS,BLOCK_K] fp32: LIFT times a part of the weighted mean of unit label rows
    entropy_ptr,  # [H,B,PARTS] fp32: the same of the cross-entropy
    student_sums_ptr,  # [H,B,PARTS,K,Z]: the same of (gradient to the cosine) code / |code|
    labels_ptr,  # [H,B,P] int16, with APART: the teacher's likeliest group
    totals_ptr,  # [B] fp32: the sum of the image's patch weights
    arrivals_ptr,  # [H] int32: zero, for a later launch
    # sizes
    B, P, H, sharpness, stride_fb, stride_fp, stride_rh, stride_rb, stride_rp,
    D: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    FROM_CODES: tl.constexpr, PREPARED: tl.constexpr,
    APART: tl.constexpr,  # leave the data term to `student_rows_kernel`
    BOUNDED: tl.constexpr, BY_POINTER: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    STUDENT_GRADIENT: tl.constexpr,
    NORMS: tl.constexpr,  # measure the features here
    UNIT_FEATURES: tl.constexpr,  # a later launch normalises the features themselves
    CODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A head's label rows of a part of an image: tiles s, s + PARTS, ... Its prototypes stay on the chip."""
    s, b, h = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, k = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    sharpness = read_sharpness(sharpness, BY_POINTER)
    norms_ptr += b * P
    weight_ptr += b * P
    total, relative, lift = image_weight(weight_ptr, P, HAS_WEIGHT)
    high, low = 0.0, 0.0
    if FROM_CODES and PREPARED:
        prepared_ptr += h * 4 * BLOCK_K * BLOCK_Z
        high, low = load_prepared(prepared_ptr, CODE, BLOCK_K if APART else 2 * BLOCK_K, BLOCK_K, BLOCK_Z)
    elif FROM_CODES and APART:
        high, low = unit_parts(teacher_ptr + h * K * Z, CODE, K, Z, BLOCK_K, BLOCK_Z)
    elif FROM_CODES:
        high, low = both_unit_parts(
            teacher_ptr + h * K * Z, student_ptr + h * K * Z, CODE, K, Z, BLOCK_K, BLOCK_Z=BLOCK_Z
        )
    label_sums, student_sums = tl.zeros((BLOCK_P, BLOCK_K), tl.float32), tl.zeros((BLOCK_Z, BLOCK_K), tl.float32)
    entropy = tl.zeros((BLOCK_P,), tl.float32)
    for tile in range(s, tl.cdiv(P, BLOCK_P), PARTS):
        start = tile * BLOCK_P
        inside = start + row < P
        if NORMS:
            norms = feature_norms(
                features_ptr + b * stride_fb, scale_ptr + b * D, start, P, stride_fp,
                D=D, BLOCK_P=BLOCK_P, BLOCK_D=BLOCK_D, HAS_SCALE=HAS_SCALE,
            )  # fmt: skip
            tl.store(norms_ptr + start + row, norms, mask=inside)
        elif not UNIT_FEATURES:
            norms = tl.load(norms_ptr + start + row, mask=inside, other=0.0)
        inverse = tl.full((BLOCK_P,), 1.0, tl.float32)
        if not UNIT_FEATURES:
            inverse = invert(norms)
        side, label_sums, entropy, student_sums = label_tile(
            rows_ptr + h * stride_rh + b * stride_rb, high, low,
            load_weight(weight_ptr, relative, start, P, BLOCK_P, HAS_WEIGHT), inverse,
            labels_ptr=labels_ptr + (h * B + b) * P, label_sums=label_sums, entropy=entropy, student_sums=student_sums,
            start=start, last=P, stride=stride_rp, sharpness=sharpness,
            K=K, Z=Z, BLOCK_P=BLOCK_P, BLOCK_K=BLOCK_K, BLOCK_Z=BLOCK_Z,
            FROM_CODES=FROM_CODES, APART=APART, BOUNDED=BOUNDED, HAS_WEIGHT=HAS_WEIGHT,
            STUDENT_GRADIENT=STUDENT_GRADIENT, CODE=CODE, PRECISION=PRECISION,
        )  # fmt: skip
        out_ptr = sides_ptr + ((b * P + start) * H + h) * BLOCK_K + row[:, None] * (H * BLOCK_K) + k[None, :]
        tl.store(out_ptr, side.to(sides_ptr.dtype.element_ty), mask=inside[:, None])
    part = (h * B + b) * PARTS + s
    tl.store(label_sums_ptr + part * BLOCK_K + k, tl.sum(label_sums, 0) * lift)
    if FROM_CODES and not APART:
        store_student_sums(
            entropy_ptr + part, student_sums_ptr + part * K * Z, entropy, student_sums * (1.0 / sharpness), lift=lift,
            K=K, Z=Z, BLOCK_K=BLOCK_K, BLOCK_Z=BLOCK_Z, STUDENT_GRADIENT=STUDENT_GRADIENT,
        )  # fmt: skip
    if s == 0:
        if h == 0:
            tl.store(totals_ptr + b, total)
        if b == 0:
            tl.store(arrivals_ptr + h, 0)
