"""The student's gradient: sums over the parts of the patches, then through the prototypes' own normalisation."""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import LIFT, store_prototype_gradient


@triton.jit
def student_gradient(
    # out
    out_ptr,  # [K,Z] fp32: row k is written
    # in
    student_sums_ptr,  # [B,PARTS,K,Z]: LIFT sum_p w_p (gradient to the cosine) code_p / |code_p|
    totals_ptr,  # [B] fp32
    student_ptr,  # [K,Z]
    # sizes
    k, B, K: tl.constexpr, Z: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Writes one prototype's gradient for an upstream gradient of 1: images count by their weight."""
    weight = tl.zeros((), tl.float32) + B
    if HAS_WEIGHT:
        i, acc = tl.arange(0, 512), tl.zeros((512,), tl.float32)
        for start in range(0, B, 512):
            acc += tl.load(totals_ptr + start + i, mask=start + i < B, other=0.0)
        weight = tl.maximum(tl.sum(acc, 0), 1e-38)
    store_prototype_gradient(
        out_ptr=out_ptr, partial_ptr=student_sums_ptr, share_ptr=totals_ptr, prototypes_ptr=student_ptr,
        k=k, parts=B * PARTS, total_share=weight * LIFT, PARTS_PER_SHARE=PARTS, K=K, Z=Z, BLOCK_Z=BLOCK_Z,
        BLOCK_N=BLOCK_N, HAS_SHARE=HAS_WEIGHT,
    )  # fmt: skip


@triton.jit
def scale_student_gradient(
    d_student_ptr, unit_ptr, d_total_ptr, d_data_ptr, h, stride_total, stride_data,
    K: tl.constexpr, Z: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    HAS_TOTAL: tl.constexpr, HAS_DATA: tl.constexpr,
):  # fmt: skip
    """Writes a head's [K,Z]: the gradient for an upstream gradient of 1, times what arrives at total and data."""
    arriving = tl.zeros((), tl.float32)
    if HAS_TOTAL:
        arriving += tl.load(d_total_ptr + h * stride_total)
    if HAS_DATA:
        arriving += tl.load(d_data_ptr + h * stride_data)
    k, z = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Z)
    inside = (k < K)[:, None] & (z < Z)[None, :]
    offset = h * K * Z + k[:, None] * Z + z[None, :]
    unit = tl.load(unit_ptr + offset, mask=inside, other=0.0)
    tl.store(d_student_ptr + offset, (arriving * unit).to(d_student_ptr.dtype.element_ty), mask=inside)
