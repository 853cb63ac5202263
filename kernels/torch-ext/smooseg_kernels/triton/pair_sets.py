"""Pair sets: numbers in ENTRIES, each SELF, ALL (every ordered pair of different images) or a row of the partners."""

from __future__ import annotations

import triton
import triton.language as tl

SELF, ALL = -1, -2
ITSELF, OTHERS = tl.constexpr(SELF), tl.constexpr(ALL)


@triton.jit
def load_partner(partners_ptr, image, B):
    """Loads a partner, clamped: a number out of range must not read out of bounds, a check would make a GPU wait."""
    j = tl.load(partners_ptr + image, mask=image < B, other=0)
    return tl.minimum(tl.maximum(j, 0), B - 1)


@triton.jit
def next_back(partners_ptr, n, after, B, BLOCK_B: tl.constexpr, IMAGE_BLOCKS: tl.constexpr):
    """Returns the first image beyond `after` whose partner is n, or B."""
    nearest = tl.zeros((BLOCK_B,), tl.int32) + B
    for block in range(IMAGE_BLOCKS):
        image = block * BLOCK_B + tl.arange(0, BLOCK_B)
        towards = (load_partner(partners_ptr, image, B) == n) & (image > after)
        nearest = tl.minimum(nearest, tl.where(towards, image, B))
    return tl.min(nearest, 0)


@triton.jit
def count_pairs(
    totals_ptr, partners_ptr, B, ENTRY: tl.constexpr, BLOCK_B: tl.constexpr, IMAGE_BLOCKS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Counts a pair set's image pairs in which both have weight (a float)."""
    images = tl.zeros((), tl.float32) + B
    if HAS_WEIGHT:
        present = tl.zeros((BLOCK_B,), tl.float32)
        for block in range(IMAGE_BLOCKS):
            image = block * BLOCK_B + tl.arange(0, BLOCK_B)
            both = tl.load(totals_ptr + image, mask=image < B, other=0.0) > 0
            if ENTRY >= 0:
                partner = load_partner(partners_ptr + ENTRY * B, image, B)
                both = both & (tl.load(totals_ptr + partner, mask=image < B, other=0.0) > 0)
            present += tl.where(both, 1.0, 0.0)
        images = tl.sum(present, 0)
    if ENTRY == OTHERS:
        images *= images - 1.0
    return images
