"""Nearest prototypes of patches, or of the pixels of upsampled codes, with confusion counts, from scores at patch
resolution.

Upsampling is linear and a code's norm is common to all prototypes, so the K scores of a patch are interpolated. Between
two rows of patches the scores of a column of pixels are linear. A program takes the pixels of such a band, a block of
columns wide, one column for each thread, and reads four scores for all of a column's pixels and a prototype. Upsampled
codes or scores never exist in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .code_rows import settings_for
from .labels import load_rows, product, unit_parts
from .launch import (
    block_k,
    block_z,
    config,
    contiguous,
    family,
    launch,
    operand,
    operator,
    or_nothing,
    precision,
    with_rows_together,
)

# copies of the counts, in which programs take turns, so that few of them wait for each other; and their cells in all
MOST_COPIES, COPIED_CELLS = 64, 1 << 17
LARGEST_SIDE = 1 << 29  # pixels times patches along one side: several times that are still an int32


@triton.jit
def scores_kernel(
    # in
    codes_ptr,  # [B,P,Z]
    prototypes_ptr,  # [K,Z]
    truth_ptr,  # [B,P] integers
    # out
    scores_ptr,  # [B,K,PLANE] fp32, P of them used: code . unit prototype, without ASSIGN
    labels_ptr,  # [B,P] int64, with ASSIGN
    # in and out
    counts_ptr,  # [COPIES,K,CLASSES] integers, with CLASSES > 0
    # sizes
    P, stride_b, stride_p, K: tl.constexpr, Z: tl.constexpr, CLASSES: tl.constexpr, COPIES: tl.constexpr,
    PLANE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    ASSIGN: tl.constexpr, CODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_P
    row, k = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    high, low = unit_parts(prototypes_ptr, CODE, K, Z, BLOCK_K, BLOCK_Z)
    codes = load_rows(codes_ptr + b * stride_b, start, P, stride_p, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z).to(CODE)
    scores = product(codes, high, low, PRECISION)
    inside = start + row < P
    if ASSIGN:
        # argmax of NaN may name a padded column, which would be counted beyond the counts
        best = tl.minimum(tl.argmax(tl.where(k[None, :] < K, scores, float("-inf")), 1), K - 1)
        tl.store(labels_ptr + b * P + start + row, best.to(tl.int64), mask=inside)
        if CLASSES > 0:
            kind = load_class(truth_ptr + b * P + start + row, inside, CLASSES)
            count(counts_ptr + copy_offset(COPIES, K * CLASSES), best * CLASSES + kind, 1, kind >= 0)
    else:
        out_ptr = scores_ptr + b * K * PLANE + start + row[:, None] + k[None, :].to(tl.int64) * PLANE
        tl.store(out_ptr, scores, mask=inside[:, None] & (k < K)[None, :])


@triton.jit
def load_class(truth_ptr, inside, CLASSES: tl.constexpr):
    """Loads ground truth as int32, and -1 where it is outside 0 .. CLASSES - 1."""
    kind = tl.load(truth_ptr, mask=inside, other=0)
    if kind.dtype.primitive_bitwidth < 32:
        kind = kind.to(tl.int32)
    return tl.where(inside & (kind >= 0) & (kind < CLASSES), kind, -1).to(tl.int32)


@triton.jit
def copy_offset(COPIES: tl.constexpr, cells: tl.constexpr):
    """Returns the first cell of this program's copy of the counts. Programs that run together differ in their copy."""
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    return (program % COPIES) * cells


@triton.jit
def count(counts_ptr, cell, number, counted):
    """Adds numbers of pixels to cells; integer additions are exact in any order."""
    pixels = (tl.zeros(cell.shape, tl.int32) + number).to(counts_ptr.dtype.element_ty)
    tl.atomic_add(counts_ptr + cell, pixels, mask=counted, sem="relaxed")


@triton.jit
def first_pixel(band, patches, pixels):
    """Returns the first pixel whose centre is not before the centre of patch `band`, which may be -1 or `patches`."""
    return tl.minimum(tl.cdiv(tl.maximum((2 * band + 1) * pixels - patches, 0), 2 * patches), pixels)


@triton.jit
def upsampled_argmax_kernel(
    # in
    scores_ptr,  # [B,K,PLANE] fp32, h * w of them used
    truth_ptr,  # [B,H,W] integers
    # out
    labels_ptr,  # [B,H,W] int64
    # in and out
    counts_ptr,  # [COPIES,K,CLASSES] integers, with CLASSES > 0
    # sizes
    h, w, H, W,
    pieces,  # programs that share a band, ROWS pixel rows each
    K: tl.constexpr, CLASSES: tl.constexpr, COPIES: tl.constexpr, PLANE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
):  # fmt: skip
    # band -1 is above the first row of patches: both its rows are the first, as both rows of band h - 1 are the last
    b, band, piece = tl.program_id(2).to(tl.int64), tl.program_id(1) // pieces - 1, tl.program_id(1) % pieces
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    first = first_pixel(band, h, H) + piece * ROWS
    end = first_pixel(band + 1, h, H)
    pixels = (b * H + first) * W + x
    rows = tl.where(x < W, end - first, 0)  # the pixels of a column that are there
    # a pixel's place among the centres of patches in whole numbers, so that no rounding moves it to another band
    place = (2 * x + 1) * w + W
    right = place // (2 * W)
    share_x = (place - right * 2 * W).to(tl.float32) * (0.5 / W)
    left, right = tl.maximum(right - 1, 0), tl.minimum(right, w - 1)
    share_y = ((2 * first + 1) * h - (2 * band + 1) * H).to(tl.float32) * (0.5 / H)

    truth_ptr += pixels
    kinds, best, labels = (), (), ()
    for r in tl.static_range(ROWS):
        if CLASSES > 0:  # early, so that they come while scores are compared
            kinds = kinds + (load_class(truth_ptr, rows > r, CLASSES),)
            truth_ptr += W
        best = best + (tl.full((BLOCK_X,), float("-inf"), tl.float32),)
        labels = labels + (tl.zeros((BLOCK_X,), tl.int32),)

    upper_ptr = scores_ptr + b * K * PLANE + tl.maximum(band, 0) * w
    lower_ptr = scores_ptr + b * K * PLANE + tl.minimum(band + 1, h - 1) * w
    for k in tl.range(0, K, loop_unroll_factor=3):
        a, c = tl.load(upper_ptr + left), tl.load(lower_ptr + left)
        above = a + share_x * (tl.load(upper_ptr + right) - a)
        between = c + share_x * (tl.load(lower_ptr + right) - c) - above
        start, step = above + share_y * between, between * (h / H)
        new_best, new_labels = (), ()
        for r in tl.static_range(ROWS):
            score = start + r * step
            better = score > best[r]
            new_best = new_best + (tl.where(better, score, best[r]),)
            new_labels = new_labels + (tl.where(better, k, labels[r]),)
        best, labels = new_best, new_labels
        upper_ptr += PLANE
        lower_ptr += PLANE

    labels_ptr += pixels
    for r in tl.static_range(ROWS):
        tl.store(labels_ptr, labels[r].to(tl.int64), mask=rows > r)
        labels_ptr += W
    if CLASSES > 0:
        counts_ptr += copy_offset(COPIES, K * CLASSES)
        cells = ()
        for r in tl.static_range(ROWS):
            cells = cells + (tl.where(kinds[r] >= 0, labels[r] * CLASSES + kinds[r], -1),)
        # neighbours in a column mostly share their cell: one addition for both
        for r in tl.static_range(0, ROWS - 1, 2):
            differ = cells[r] != cells[r + 1]
            count(counts_ptr, cells[r], tl.where(differ, 1, 2), cells[r] >= 0)
            count(counts_ptr, cells[r + 1], 1, differ & (cells[r + 1] >= 0))
        if ROWS % 2 == 1:
            count(counts_ptr, cells[ROWS - 1], 1, cells[ROWS - 1] >= 0)


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
    if grid is not None and size is not None and max(grid[0] * size[0], grid[1] * size[1]) > LARGEST_SIDE:
        raise ValueError(
            f"grid {grid} and size {size} are too large: patches times pixels of a side exceed {LARGEST_SIDE}"
        )
    (B, P, Z), K = codes.shape, prototypes.shape[0]
    labels, counts = empty_assignment(codes, prototypes, size, classes)
    codes, prototypes, truth = with_rows_together(codes), prototypes.contiguous(), contiguous(truth)
    scores, plane = labels, triton.next_power_of_2(P)  # few sizes of planes, few programs to compile
    if size is not None:
        scores = codes.new_empty(B, K, plane, dtype=torch.float32)
    settings, copies = settings_for(codes, K), empty_copies(labels, counts)
    with torch.cuda.device_of(codes):
        copies.zero_()
        launch(
            scores_kernel, (triton.cdiv(P, settings["BLOCK_P"]), B), settings=settings,
            codes_ptr=codes, prototypes_ptr=prototypes, truth_ptr=or_nothing(truth, labels),
            scores_ptr=scores, labels_ptr=labels, counts_ptr=copies,
            P=P, stride_b=codes.stride(0), stride_p=codes.stride(1), K=K, Z=Z, CLASSES=classes, COPIES=len(copies),
            PLANE=plane, BLOCK_K=block_k(K), BLOCK_Z=block_z(Z),
            ASSIGN=size is None, CODE=operand(codes.dtype), PRECISION=precision(codes.device),
        )  # fmt: skip
        if grid is not None and size is not None:
            (h, w), (H, W) = grid, size
            settings = config("upsample", codes)
            pieces, settings["ROWS"] = shared_rows(h, H, settings["ROWS"])
            # a pixel for each thread: with fewer, threads would repeat each other's
            settings["BLOCK_X"] = settings["num_warps"] * (64 if family(codes.device) == "gfx942" else 32)
            launch(
                upsampled_argmax_kernel, (triton.cdiv(W, settings["BLOCK_X"]), (h + 1) * pieces, B), settings=settings,
                scores_ptr=scores, truth_ptr=or_nothing(truth, labels), labels_ptr=labels, counts_ptr=copies,
                h=h, w=w, H=H, W=W, pieces=pieces, K=K, CLASSES=classes, COPIES=len(copies), PLANE=plane,
            )  # fmt: skip
        return labels, copies.sum(0) if classes else counts


def empty_copies(labels: Tensor, counts: Tensor) -> Tensor:
    """Returns room for copies [copies,K,classes] of the counts, a power of two of them, fewer of many cells."""
    number = min(MOST_COPIES, 1 << (max(1, COPIED_CELLS // max(1, counts.numel())).bit_length() - 1))
    short = labels.numel() < 2**31  # all pixels could be in one cell
    return counts.new_empty(number, *counts.shape, dtype=torch.int32 if short else torch.int64)


def shared_rows(patches: int, pixels: int, most: int) -> tuple[int, int]:
    """Returns how many programs share a band, and the pixel rows of each, at most `most`."""
    band = -(-pixels // patches)
    programs = -(-band // most)
    return programs, -(-band // programs)


def empty_assignment(codes: Tensor, prototypes: Tensor, size: list[int] | None, classes: int) -> tuple[Tensor, Tensor]:
    shape = (codes.shape[0], *(codes.shape[1:2] if size is None else size))
    return (
        torch.empty(shape, dtype=torch.int64, device=codes.device),
        torch.empty(prototypes.shape[0], classes, dtype=torch.int64, device=codes.device),
    )


@assign.register_fake
def _(codes, prototypes, grid, size, truth, classes):
    return empty_assignment(codes, prototypes, size, classes)
