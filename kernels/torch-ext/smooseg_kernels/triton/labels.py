"""Functions for the kernels that take codes to probs and to the data term, and back to gradients.

With c = e / |e| and e = exp(cosine / temperature) the softmax's own denominator cancels, so unit probs need no division
by it, and their gradient is short: dl_k = c_k dc_k - c_k^2 sum_j c_j dc_j for logits l. Logarithms are to the base 2,
which the hardware raises to a power in one instruction.

A warp owns 16 rows of a matrix product. Where probs are made, a block has at least 16 rows a warp, or warps compute
copies of each other's rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import rows

SHORTEST = tl.constexpr(rows.SHORTEST)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# weights that add up to 1 over an image are small: a power of two lifts them exactly, out of fp16's subnormal range
LIFT = tl.constexpr(64.0)
FAR = tl.constexpr(-16384.0)  # a logarithm whose power is 0, and that 0 times is 0


@triton.jit
def invert(norms):
    """Returns 1 / norms, and 0 where a norm is below 1e-10: that row has cosine 0 and gradient 0."""
    # a reciprocal square root is one instruction, a division ten
    bounded = tl.maximum(norms, SHORTEST)
    return tl.where(norms < SHORTEST, 0.0, tl.rsqrt(bounded * bounded))


@triton.jit
def load_rows(ptr, start, count, stride, width: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Loads rows start .. start + BLOCK of a matrix with adjacent columns: [BLOCK,WIDTH], zero beyond the matrix."""
    return load_tile(ptr, start, count, stride, 0, width=width, BLOCK=BLOCK, WIDTH=WIDTH)


@triton.jit
def load_tile(ptr, start, count, stride, first, width: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Loads rows start .. start + BLOCK and columns first .. first + WIDTH: [BLOCK,WIDTH], zero beyond the matrix.

    `first` is a multiple of WIDTH.
    """
    row, column = tl.arange(0, BLOCK), first + tl.arange(0, WIDTH)
    inside = (start + row < count)[:, None]
    if width % WIDTH != 0:
        inside = inside & (column < width)[None, :]
    # int64 once for the tile, so that offsets hold past 2^31 elements while those within the tile stay short
    tile_ptr = ptr + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    return tl.load(tile_ptr, mask=inside, other=0.0)


@triton.jit
def repeated_rows(start, count, BLOCK: tl.constexpr):
    """Returns rows 0 .. BLOCK from `start` on; those beyond the matrix repeat its last one, so that loads need no mask.

    A masked load of 16 bits takes two more instructions a number.
    """
    return tl.minimum(tl.arange(0, BLOCK), count - 1 - start)


@triton.jit
def load_repeated(ptr, start, count, stride, first, width: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Loads what `load_tile` does, but the last row in place of those beyond the matrix.

    The base moves with `first`, so a loop over columns computes the offsets from it once.
    """
    row, column = repeated_rows(start, count, BLOCK), tl.arange(0, WIDTH)
    tile_ptr = ptr + (tl.cast(start, tl.int64) * stride + first) + (row[:, None] * stride + column[None, :])
    if width % WIDTH == 0:
        tile = tl.load(tile_ptr)
    else:
        tile = tl.load(tile_ptr, mask=(first + column < width)[None, :], other=0.0)
    return tile


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
    """Returns 1 / |row| [N] of a tile [N,Z], and 0 for a row shorter than 1e-10."""
    wide = tile.to(tl.float32)
    squares = tl.sum(wide * wide, 1)
    shortest: tl.constexpr = SHORTEST * SHORTEST
    return tl.where(squares < shortest, 0.0, tl.rsqrt(tl.maximum(squares, shortest)))


@triton.jit
def unit_parts(
    ptr, OPERAND: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr
):
    """Loads prototypes [K,Z] of any length as unit rows in two parts, [BLOCK_K,BLOCK_Z] each."""
    return split(load_unit_prototypes(ptr, K, Z, BLOCK_K, BLOCK_Z)[0], OPERAND)


@triton.jit
def both_unit_parts(
    teacher_ptr, student_ptr,
    OPERAND: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """Loads two lots of prototypes [K,Z] as unit rows in two parts, [2 * BLOCK_K,BLOCK_Z] each, the teacher's first."""
    row, z = tl.arange(0, 2 * BLOCK_K), tl.arange(0, BLOCK_Z)
    k = row % BLOCK_K
    inside = (k < K)[:, None] & (z < Z)[None, :]
    tile = k[:, None] * Z + z[None, :]
    teacher = tl.load(teacher_ptr + tile, mask=inside & (row < BLOCK_K)[:, None], other=0.0).to(tl.float32)
    student = tl.load(student_ptr + tile, mask=inside & (row >= BLOCK_K)[:, None], other=0.0).to(tl.float32)
    prototypes = teacher + student
    return split(prototypes * inverse_norms(prototypes)[:, None], OPERAND)


@triton.jit
def load_prepared(ptr, OPERAND: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr):
    """Loads the first rows of both parts of prepared prototypes, [2,2 * BLOCK_K,BLOCK_Z]: BLOCK_K are the teacher's."""
    row, z = tl.arange(0, ROWS), tl.arange(0, BLOCK_Z)
    part_ptr = ptr + row[:, None] * BLOCK_Z + z[None, :]
    return tl.load(part_ptr).to(OPERAND), tl.load(part_ptr + 2 * BLOCK_K * BLOCK_Z).to(OPERAND)


@triton.jit
def product(codes, high, low, PRECISION: tl.constexpr):
    """Multiplies codes [N,Z] by unit prototypes [BLOCK_K,Z] in two parts: |code| times the cosines, [N,BLOCK_K]."""
    toward = tl.dot(codes, tl.trans(high), input_precision=PRECISION)
    if high.dtype != tl.float32:
        toward = tl.dot(codes, tl.trans(low), toward)
    return toward


@triton.jit
def halves(rows, BLOCK_K: tl.constexpr):
    """Splits [2 * BLOCK_K,Z] into its first and its last rows."""
    return tl.split(tl.permute(tl.reshape(rows, (2, BLOCK_K, rows.shape[1])), (1, 2, 0)))


@triton.jit
def both_products(codes, high, low, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """Multiplies codes by the teacher's and the student's prototypes in one product: two [BLOCK_P,BLOCK_K].

    The halves lie in different registers of the same threads, so nothing moves.
    """
    # three products of tf32 need more registers than a program has for both; one instruction has 256 columns at most,
    # and with a second one along them Triton 3.6 read out of bounds on a card
    if high.dtype == tl.float32 or BLOCK_K > 128:
        teacher_high, student_high = halves(high, BLOCK_K)
        teacher_low, student_low = halves(low, BLOCK_K)
        toward_teacher = product(codes, teacher_high, teacher_low, PRECISION)
        toward_student = product(codes, student_high, student_low, PRECISION)
    else:
        both = product(codes, high, low, PRECISION)
        toward_teacher, toward_student = tl.split(tl.permute(tl.reshape(both, (BLOCK_P, 2, BLOCK_K)), (0, 2, 1)))
    return toward_teacher, toward_student


@triton.jit
def column_bias(k, value, K: tl.constexpr):
    """Returns what makes products logarithms when added to them: columns beyond K vanish in the same instruction."""
    return tl.where(k < K, value, FAR)


@triton.jit
def read_sharpness(sharpness, BY_POINTER: tl.constexpr):
    """Returns log2(e) / temperature; with BY_POINTER a pointer to the temperature comes in its place."""
    if BY_POINTER:
        sharpness = LOG2E / tl.load(sharpness)
    return sharpness


@triton.jit
def soft_labels(toward, scale, k, sharpness, K: tl.constexpr, BOUNDED: tl.constexpr):
    """Takes products with the teacher [N,BLOCK_K] to log2 e and e [N,BLOCK_K], and 1 / |e| [N].

    sharpness is log2(e) / temperature, and scale [N] sharpness / |code|. A cosine is at most 1, so with BOUNDED
    sharpness itself bounds the logits.
    """
    if BOUNDED:
        x = toward * scale[:, None] + column_bias(k, -sharpness, K)[None, :]
    else:
        x = tl.where((k < K)[None, :], toward * scale[:, None], float("-inf"))
        x -= tl.max(x, 1)[:, None]
    e = tl.exp2(x)
    return x, e, tl.rsqrt(tl.sum(e * e, 1))


@triton.jit
def likeliest(x, k, BLOCK_K: tl.constexpr):
    """Returns the column of each row's largest logit [N], the lowest of several."""
    return tl.min(tl.where(x == tl.max(x, 1)[:, None], k[None, :], BLOCK_K), 1)


@triton.jit
def logarithm(x):
    """Returns log2 x of normal numbers to 2e-7 of its size, with a third of the instructions of the library's."""
    # a float's bits are its logarithm to 0.043, and r = x / 2^guess is so near 1 that four terms of log2 r do
    guess = x.to(tl.int32, bitcast=True).to(tl.float32) * (1.0 / 8388608.0) - 126.957
    t = x * tl.exp2(-guess) - 1.0
    return guess + t * (LOG2E + t * (-LOG2E / 2 + t * (LOG2E / 3 - t * (LOG2E / 4))))


@triton.jit
def data_term(toward_student, label, scale, k, sharpness, K: tl.constexpr):
    """Returns the cross-entropy [N] and its gradient to the student's cosines [N,BLOCK_K]; scale as for `soft_labels`.

    The student's cosines need no shift.
    """
    chosen = tl.where(k[None, :] == label[:, None], 1.0, 0.0)
    # the same factor of a row as the teacher's, which moves between threads once
    y = toward_student * scale[:, None] * (LOG2E / sharpness) + column_bias(k, 0.0, K)[None, :]
    e = tl.exp2(y)
    total = logarithm(tl.sum(e, 1))
    loss = (total - tl.sum(chosen * y, 1)) * LN2
    return loss, e * tl.exp2(-total)[:, None] - chosen


@triton.jit
def codes_backward(d_cosine, cosine, codes, inverse, high, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Goes through cos(code, prototype): (sum_k d_k t_k - (sum_k d_k cos_k) code / |code|) / |code|, [N,Z] fp32."""
    toward = tl.dot(d_cosine.to(OPERAND), high, input_precision=PRECISION)
    along = tl.sum(d_cosine * cosine, 1) * inverse
    return (toward - along[:, None] * codes.to(tl.float32)) * inverse[:, None]


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
