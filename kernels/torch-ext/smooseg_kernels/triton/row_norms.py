"""Features as rows of any length: norms |m f_p| and operands of the matrix unit. Prototypes, for programs to share."""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import both_unit_parts, invert, load_repeated, load_tile


@triton.jit
def feature_norms(
    features_ptr,  # [P,D] of one image
    scale_ptr,  # [D] fp32
    start, last, stride, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Returns the lengths of rows start .. start + BLOCK_P, [BLOCK_P]; that of the last one beyond it."""
    squares = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in tl.static_range(0, D, BLOCK_D):
        f = load_repeated(features_ptr, start, last, stride, first, D, BLOCK=BLOCK_P, WIDTH=BLOCK_D).to(tl.float32)
        if HAS_SCALE:
            f *= load_scale(scale_ptr, first, D, BLOCK_D)[None, :]
        squares += f * f
    return tl.sqrt(tl.sum(squares, 1))  # one sum across threads, not one for every block of channels


@triton.jit
def load_scale(scale_ptr, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = first + tl.arange(0, BLOCK_D)
    if D % BLOCK_D == 0:
        scale = tl.load(scale_ptr + channel)
    else:
        scale = tl.load(scale_ptr + channel, mask=channel < D, other=0.0)
    return scale


@triton.jit
def load_operand(
    features_ptr, scale_ptr, norms_ptr, start, last, stride, first,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SCALE: tl.constexpr, UNIT_FEATURES: tl.constexpr, FEATURE: tl.constexpr,
):  # fmt: skip
    """Loads features [BLOCK_P,BLOCK_D] of one image for the matrix unit: as they are, or unit with UNIT_FEATURES."""
    f = load_tile(features_ptr, start, last, stride, first, width=D, BLOCK=BLOCK_P, WIDTH=BLOCK_D)
    if UNIT_FEATURES:
        row = start + tl.arange(0, BLOCK_P)
        f = f.to(tl.float32) * invert(tl.load(norms_ptr + row, mask=row < last, other=0.0))[:, None]
        if HAS_SCALE:
            f *= load_scale(scale_ptr, first, D, BLOCK_D)[None, :]
    return f.to(FEATURE)


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
    norms = feature_norms(
        features_ptr + b * stride_fb, scale_ptr + b * D, start, P, stride_fp,
        D=D, BLOCK_P=BLOCK_P, BLOCK_D=BLOCK_D, HAS_SCALE=HAS_SCALE,
    )  # fmt: skip
    row = start + tl.arange(0, BLOCK_P)
    tl.store(norms_ptr + b * P + row, norms, mask=row < P)


@triton.jit
def prepare_kernel(
    # in
    student_ptr,  # [H,K,Z]
    teacher_ptr,  # [H,K,Z]
    # out
    prepared_ptr,  # [H,2,2 * BLOCK_K,BLOCK_Z]: unit rows of teacher and student, high and low part
    # sizes
    K: tl.constexpr, Z: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0).to(tl.int64)
    OPERAND: tl.constexpr = prepared_ptr.dtype.element_ty
    high, low = both_unit_parts(
        teacher_ptr + h * K * Z, student_ptr + h * K * Z, OPERAND, K, Z, BLOCK_K, BLOCK_Z=BLOCK_Z
    )
    tile = tl.arange(0, 2 * BLOCK_K)[:, None] * BLOCK_Z + tl.arange(0, BLOCK_Z)[None, :]
    out_ptr = prepared_ptr + h * 4 * BLOCK_K * BLOCK_Z + tile
    tl.store(out_ptr, high)
    tl.store(out_ptr + 2 * BLOCK_K * BLOCK_Z, low)
