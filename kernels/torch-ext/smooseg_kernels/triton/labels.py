"""Functions for the kernels that take codes to probs and to the data term: cosines to unit prototypes, and the
gradients.

With c = e / |e| and e = exp(cosine / temperature) the softmax's own denominator cancels, so unit probs need no division
by it, and their gradient is short: dl_k = c_k dc_k - c_k^2 sum_j c_j dc_j for logits l.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import rows

SHORTEST = tl.constexpr(rows.SHORTEST)


@triton.jit
def invert(norms):
    """Returns 1 / norms, and 0 where a norm is below 1e-10: that row has cosine 0 and gradient 0."""
    short = norms < SHORTEST
    return tl.where(short, 0.0, 1.0 / tl.where(short, 1.0, norms))


@triton.jit
def load_rows(ptr, start, count, stride, width: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Loads rows start .. start + BLOCK of a matrix with adjacent columns: [BLOCK,WIDTH], zero beyond the matrix."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (start + row < count)[:, None]
    if width != WIDTH:
        inside = inside & (column < width)[None, :]
    # int64 once for the tile, so that offsets hold past 2^31 elements while those within the tile stay short
    tile_ptr = ptr + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    return tl.load(tile_ptr, mask=inside, other=0.0)


@triton.jit
def load_unit_prototypes(ptr, K: tl.constexpr, Z: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr):
    """Loads [K,Z] of any length as unit rows [BLOCK_K, BLOCK_Z] fp32, and 1 / length [BLOCK_K]."""
    prototypes = load_rows(ptr, 0, K, Z, width=Z, BLOCK=BLOCK_K, WIDTH=BLOCK_Z).to(tl.float32)
    inverse = invert(tl.sqrt(tl.sum(prototypes * prototypes, 1)))
    return prototypes * inverse[:, None], inverse


@triton.jit
def split(unit, OPERAND: tl.constexpr):
    """Splits fp32 into a sum of two operands of the matrix unit: at least 16 bits of mantissa instead of 8."""
    high = unit.to(OPERAND)
    return high, (unit - high.to(tl.float32)).to(OPERAND)


@triton.jit
def inverse_norms(tile):
    wide = tile.to(tl.float32)
    return invert(tl.sqrt(tl.sum(wide * wide, 1)))


@triton.jit
def cosines(codes, inverse, high, low, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Takes codes [N,Z] and unit prototypes [K,Z] in two parts to [N,K]. The norms divide the smaller product."""
    products = tl.dot(codes, tl.trans(high), input_precision=PRECISION)
    if tl.float32 != OPERAND:
        products = tl.dot(codes, tl.trans(low), products)
    return products * inverse[:, None]


@triton.jit
def unit_probs(cosine, column, temperature, K: tl.constexpr):
    """Returns softmax(cosine / temperature) scaled to length 1, [N, BLOCK_K], zero beyond K."""
    logits = tl.where(column[None, :] < K, cosine / temperature, float("-inf"))
    e = tl.exp(logits - tl.max(logits, 1)[:, None])
    return e * (1.0 / tl.sqrt(tl.sum(e * e, 1)))[:, None]


@triton.jit
def unit_probs_backward(c, d_c):
    """Returns the gradient of the logits."""
    return c * d_c - c * c * tl.sum(c * d_c, 1)[:, None]


@triton.jit
def codes_backward(d_cosine, cosine, codes, inverse, high, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Goes through cos(code, prototype): (sum_k d_k t_k - (sum_k d_k cos_k) code / |code|) / |code|, [N,Z] fp32."""
    toward = tl.dot(d_cosine.to(OPERAND), high, input_precision=PRECISION)
    along = tl.sum(d_cosine * cosine, 1) * inverse
    return (toward - along[:, None] * codes.to(tl.float32)) * inverse[:, None]


@triton.jit
def cross_entropy(toward_student, toward_teacher, column, K: tl.constexpr):
    """Returns the loss [N] against the teacher's nearest prototype, and its gradient to the student's cosines [N,K].

    A cosine cannot exceed 1, so the softmax needs no shift by the maximum. Ties go to the lowest index.
    """
    inside = column[None, :] < K
    label = tl.argmax(tl.where(inside, toward_teacher, float("-inf")), 1)
    e = tl.where(inside, tl.exp(toward_student), 0.0)
    denominator = tl.sum(e, 1)
    chosen = column[None, :] == label[:, None]
    loss = tl.log(denominator) - tl.sum(tl.where(chosen, toward_student, 0.0), 1)
    return loss, e / denominator[:, None] - tl.where(chosen, 1.0, 0.0)


@triton.jit
def store_prototype_gradient(
    # out
    out_ptr,  # [K,Z]: row k is written
    # in
    partial_ptr,  # [parts,K,Z]: sum_p d_pk code_p / |code_p| of one part
    share_ptr,  # [parts // PARTS_PER_SHARE] fp32: the weight of a part's sums
    prototypes_ptr,  # [K,Z]
    # sizes
    k, parts, total_share, PARTS_PER_SHARE: tl.constexpr, K: tl.constexpr, Z: tl.constexpr,
    BLOCK_Z: tl.constexpr, BLOCK_N: tl.constexpr,
    # switches
    HAS_SHARE: tl.constexpr,
):  # fmt: skip
    """Adds up the parts in a fixed order and goes through the prototype's own normalisation."""
    z, part = tl.arange(0, BLOCK_Z), tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_Z), tl.float32)
    for start in range(0, parts, BLOCK_N):
        i = start + part
        inside = (i < parts)[:, None] & (z < Z)[None, :]
        part_ptr = partial_ptr + (i[:, None].to(tl.int64) * K + k) * Z + z[None, :]
        partial = tl.load(part_ptr, mask=inside, other=0.0).to(tl.float32)
        if HAS_SHARE:
            partial *= tl.load(share_ptr + i // PARTS_PER_SHARE, mask=i < parts, other=0.0)[:, None]
        acc += partial
    gradient = tl.sum(acc, 0) / total_share
    prototype = tl.load(prototypes_ptr + k * Z + z, mask=z < Z, other=0.0).to(tl.float32)
    inverse = invert(tl.sqrt(tl.sum(prototype * prototype, 0)))
    unit = prototype * inverse
    gradient = (gradient - tl.sum(gradient * unit, 0) * unit) * inverse
    tl.store(out_ptr + k * Z + z, gradient.to(out_ptr.dtype.element_ty), mask=z < Z)
