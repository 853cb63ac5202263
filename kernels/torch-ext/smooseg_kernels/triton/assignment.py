"""Nearest prototypes of patches, or of the pixels of upsampled codes, with confusion counts, from scores at patch
resolution.

Upsampling is linear and a code's norm is common to all prototypes, so the K scores of a patch are interpolated. Between
two rows of patches and two columns the scores are bilinear. A program takes the pixels of one such band, a block of
columns wide, and reads four scores for a whole column of pixels and a prototype. Upsampled codes or scores never exist
in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .code_rows import settings_for
from .labels import load_rows, load_unit_prototypes, split
from .launch import (
    block_k,
    block_z,
    config,
    contiguous,
    launch,
    operand,
    operator,
    or_nothing,
    precision,
    with_rows_together,
)

# more cells than this are counted pixel by pixel, because a program's own histogram would not pay
LARGEST_HISTOGRAM = 4096


@triton.jit
def scores_kernel(
    # in
    codes_ptr,  # [B,P,Z]
    prototypes_ptr,  # [K,Z]
    truth_ptr,  # [B,P] integers
    # out
    scores_ptr,  # [B,K,P] fp32: code . unit prototype, without ASSIGN
    labels_ptr,  # [B,P] int64, with ASSIGN
    # in and out
    counts_ptr,  # [K,CLASSES] int64
    # sizes
    P, stride_b, stride_p, K: tl.constexpr, Z: tl.constexpr, CLASSES: tl.constexpr, BINS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    ASSIGN: tl.constexpr, CODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_P
    row, k = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    high, low = split(load_unit_prototypes(prototypes_ptr, K, Z, BLOCK_K, BLOCK_Z)[0], CODE)
    codes = load_rows(codes_ptr + b * stride_b, start, P, stride_p, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z).to(CODE)
    scores = tl.dot(codes, tl.trans(high), input_precision=PRECISION)
    if tl.float32 != CODE:
        scores = tl.dot(codes, tl.trans(low), scores)
    inside = start + row < P
    if ASSIGN:
        # argmax of NaN may name a padded column, which would be counted beyond the counts
        best = tl.minimum(tl.argmax(tl.where(k[None, :] < K, scores, float("-inf")), 1), K - 1)
        tl.store(labels_ptr + b * P + start + row, best.to(tl.int64), mask=inside)
        if CLASSES > 0:
            truth = tl.load(truth_ptr + b * P + start + row, mask=inside, other=-1).to(tl.int64)
            count(counts_ptr, best, truth, inside, CLASSES, BINS)
    else:
        out_ptr = scores_ptr + b * K * P + start + row[:, None] + k[None, :].to(tl.int64) * P
        tl.store(out_ptr, scores, mask=inside[:, None] & (k < K)[None, :])


@triton.jit
def count(counts_ptr, labels, truth, inside, CLASSES: tl.constexpr, BINS: tl.constexpr):
    """Adds pixels to the counts by (prototype, class); integer additions are exact in any order."""
    valid = inside & (truth >= 0) & (truth < CLASSES)
    cell = labels.to(tl.int32) * CLASSES + tl.where(valid, truth, 0).to(tl.int32)
    if BINS > 0:
        histogram = tl.histogram(cell, BINS, mask=valid)
        bins = tl.arange(0, BINS)
        tl.atomic_add(counts_ptr + bins, histogram.to(tl.int64), mask=histogram > 0, sem="relaxed")
    else:
        tl.atomic_add(counts_ptr + cell, tl.full(cell.shape, 1, tl.int64), mask=valid, sem="relaxed")


@triton.jit
def source(pixel, ratio, size):
    """Places a pixel's centre among patch centres: the patch before, the patch after, and the share of the latter."""
    position = tl.maximum((pixel.to(tl.float32) + 0.5) * ratio - 0.5, 0.0)
    before = tl.minimum(position.to(tl.int32), size - 1)
    return before, tl.minimum(before + 1, size - 1), position - before.to(tl.float32)


@triton.jit
def upsampled_argmax_kernel(
    # in
    scores_ptr,  # [B,K,h*w] fp32
    truth_ptr,  # [B,H,W] integers
    # out
    labels_ptr,  # [B,H,W] int64
    # in and out
    counts_ptr,  # [K,CLASSES] int64
    # sizes
    h, w, H, W, ratio_y, ratio_x,
    pieces,  # programs that share a band, BLOCK_Y pixel rows each
    K: tl.constexpr, CLASSES: tl.constexpr, BINS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    b, band, piece = tl.program_id(2).to(tl.int64), tl.program_id(1) // pieces, tl.program_id(1) % pieces
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    # the first row of the band by its formula, one early: the test below decides, the same for every program
    first = tl.maximum(tl.ceil((band + 0.5) / ratio_y - 0.5).to(tl.int32) - 1, 0)
    if band == 0:
        first = 0
    y = first + piece * BLOCK_Y + tl.arange(0, BLOCK_Y)
    top, _, share_y = source(y, ratio_y, h)
    left, right, share_x = source(x, ratio_x, w)
    inside = ((top == band) & (y < H))[:, None] & (x < W)[None, :]
    upper = scores_ptr + b * K * h * w + band * w
    lower = scores_ptr + b * K * h * w + tl.minimum(band + 1, h - 1) * w
    best = tl.full((BLOCK_Y, BLOCK_X), float("-inf"), tl.float32)
    labels = tl.zeros((BLOCK_Y, BLOCK_X), tl.int32)
    # bands differ in height: a piece without rows of its band does nothing
    for k in range(0, tl.max((top == band).to(tl.int32), 0) * K):
        a = tl.load(upper + left)
        above = a + share_x * (tl.load(upper + right) - a)
        c = tl.load(lower + left)
        below = c + share_x * (tl.load(lower + right) - c)
        score = above[None, :] + share_y[:, None] * (below - above)[None, :]
        better = score > best
        best, labels = tl.where(better, score, best), tl.where(better, k, labels)
        upper += h * w
        lower += h * w
    pixel = b * H * W + y[:, None].to(tl.int64) * W + x[None, :]
    tl.store(labels_ptr + pixel, labels.to(tl.int64), mask=inside)
    if CLASSES > 0:
        truth = tl.load(truth_ptr + pixel, mask=inside, other=-1).to(tl.int64)
        size: tl.constexpr = BLOCK_Y * BLOCK_X
        labels, truth = tl.reshape(labels, (size,)), tl.reshape(truth, (size,))
        count(counts_ptr, labels, truth, tl.reshape(inside, (size,)), CLASSES, BINS)


@operator("assign")
def assign(
    codes: Tensor,
    prototypes: Tensor,
    grid: list[int] | None,
    size: list[int] | None,
    truth: Tensor | None,
    classes: int,
) -> tuple[Tensor, Tensor]:
    """Takes codes [B,P,Z] and prototypes [K,Z] to labels and to counts, int64 [K,classes].

    The labels are int64 [B,P], or [B,H,W] with grid (h,w) and size (H,W). Without ground truth `classes` is 0.
    """
    (B, P, Z), K = codes.shape, prototypes.shape[0]
    labels, counts = empty_assignment(codes, prototypes, size, classes)
    codes, prototypes, truth = with_rows_together(codes), prototypes.contiguous(), contiguous(truth)
    counts.zero_()
    cells = K * classes
    bins = triton.next_power_of_2(cells) if 0 < cells <= LARGEST_HISTOGRAM else 0
    scores = codes.new_empty(B, K, P, dtype=torch.float32) if size is not None else labels
    settings = settings_for(codes, K)
    with torch.cuda.device_of(codes):
        launch(
            scores_kernel, (triton.cdiv(P, settings["BLOCK_P"]), B), settings=settings,
            codes_ptr=codes, prototypes_ptr=prototypes, truth_ptr=or_nothing(truth, labels),
            scores_ptr=scores, labels_ptr=labels, counts_ptr=counts,
            P=P, stride_b=codes.stride(0), stride_p=codes.stride(1), K=K, Z=Z,
            CLASSES=classes if size is None else 0, BINS=bins if size is None else 0,
            BLOCK_K=block_k(K), BLOCK_Z=block_z(Z),
            ASSIGN=size is None, CODE=operand(codes.dtype), PRECISION=precision(codes.device),
        )  # fmt: skip
        if grid is not None and size is not None:
            (h, w), (H, W) = grid, size
            settings = config("upsample", codes)
            pieces = triton.cdiv(band_height(h, H), settings["BLOCK_Y"])
            launch(
                upsampled_argmax_kernel, (triton.cdiv(W, settings["BLOCK_X"]), h * pieces, B), settings=settings,
                scores_ptr=scores, truth_ptr=or_nothing(truth, labels), labels_ptr=labels, counts_ptr=counts,
                h=h, w=w, H=H, W=W, ratio_y=h / H, ratio_x=w / W, pieces=pieces, K=K, CLASSES=classes, BINS=bins,
            )  # fmt: skip
    return labels, counts


def band_height(patches: int, pixels: int) -> int:
    """Bounds the pixel rows of a band: the first is half as high again, and a band may start a row early."""
    return -(-3 * pixels // (2 * patches)) + 2


def empty_assignment(codes: Tensor, prototypes: Tensor, size: list[int] | None, classes: int) -> tuple[Tensor, Tensor]:
    shape = (codes.shape[0], *(codes.shape[1:2] if size is None else size))
    return (
        torch.empty(shape, dtype=torch.int64, device=codes.device),
        torch.empty(prototypes.shape[0], classes, dtype=torch.int64, device=codes.device),
    )


@assign.register_fake
def _(codes, prototypes, grid, size, truth, classes):
    return empty_assignment(codes, prototypes, size, classes)
