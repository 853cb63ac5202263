"""The data term of label rows that are too wide for one program: the student's cross-entropy, in a launch of its own.

`label_rows_kernel` leaves the teacher's likeliest group of each row, so no product is computed twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .label_rows import image_weight, load_weight, store_student_sums, student_tile
from .labels import inverse_norms, load_prepared, load_rows, product, read_sharpness, unit_parts


@triton.jit
def student_rows_kernel(
    # in
    rows_ptr,  # codes [H,B,P,Z]
    student_ptr,  # [H,K,Z]
    prepared_ptr,  # [H,2,2 * BLOCK_K,BLOCK_Z]: with PREPARED, unit rows of teacher and student in two parts
    labels_ptr,  # [H,B,P] int16
    weight_ptr,  # [B,P] fp32
    # out
    entropy_ptr,  # [H,B,PARTS] fp32: LIFT times a part of the weighted mean of the cross-entropy
    student_sums_ptr,  # [H,B,PARTS,K,Z]: the same of (gradient to the cosine) code / |code|
    # sizes
    B, P, sharpness, stride_rh, stride_rb, stride_rp, K: tl.constexpr, Z: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    PREPARED: tl.constexpr, BY_POINTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, STUDENT_GRADIENT: tl.constexpr,
    CODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A head's codes of a part of an image: tiles s, s + PARTS, ..."""
    s, b, h = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    sharpness = read_sharpness(sharpness, BY_POINTER)
    rows_ptr += h * stride_rh + b * stride_rb
    labels_ptr += (h * B + b) * P
    weight_ptr += b * P
    _, relative, lift = image_weight(weight_ptr, P, HAS_WEIGHT)
    if PREPARED:
        high, low = load_prepared(prepared_ptr + (h * 4 + 1) * BLOCK_K * BLOCK_Z, CODE, BLOCK_K, BLOCK_K, BLOCK_Z)
    else:
        high, low = unit_parts(student_ptr + h * K * Z, CODE, K, Z, BLOCK_K, BLOCK_Z)
    entropy, student_sums = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_Z, BLOCK_K), tl.float32)
    for tile in range(s, tl.cdiv(P, BLOCK_P), PARTS):
        start = tile * BLOCK_P
        row = start + tl.arange(0, BLOCK_P)
        label = tl.load(labels_ptr + row, mask=row < P, other=0).to(tl.int32)
        codes = load_rows(rows_ptr, start, P, stride_rp, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z).to(CODE)
        entropy, student_sums = student_tile(
            codes, product(codes, high, low, PRECISION), label, inverse_norms(codes) * sharpness,
            load_weight(weight_ptr, relative, start, P, BLOCK_P, HAS_WEIGHT), entropy, student_sums=student_sums,
            sharpness=sharpness, K=K, BLOCK_K=BLOCK_K, HAS_WEIGHT=HAS_WEIGHT, STUDENT_GRADIENT=STUDENT_GRADIENT,
            CODE=CODE, PRECISION=PRECISION,
        )  # fmt: skip
    part = (h * B + b) * PARTS + s
    store_student_sums(
        entropy_ptr + part, student_sums_ptr + part * K * Z, entropy, student_sums * (1.0 / sharpness), lift=lift,
        K=K, Z=Z, BLOCK_K=BLOCK_K, BLOCK_Z=BLOCK_Z, STUDENT_GRADIENT=STUDENT_GRADIENT,
    )  # fmt: skip
