"""Blocks of query-key pairs: logits and masks of every pair in registers, from which row sums and gradient rows leave.

One program holds a block of rows of one side ("mine") and walks over all rows of the other side of the same image.
Queries are mine for the sums and their own gradient, keys for theirs, so each row has one writer. Codes come as unit
rows; features come as they are, with 1 / length next to them. Logarithms are to the base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import LN2, LOG2E, load_rows, load_tile
from .pair_tiles import streamed_products

FAR = tl.constexpr(-1e30)  # below any logit, and finite: differences of it are no NaN
# gradients reach the matrix unit times this and over the largest that arrives: shares of a row leave fp16's subnormals
LIFT = tl.constexpr(4096.0)


@triton.jit
def load_side(
    # in
    labels_ptr,  # [P] integers
    inverse_ptr,  # [P] fp32: 1 / |f|
    threshold_ptr,  # [P] fp32
    negative_ptr,  # [P] fp32, of queries with BAND
    # sizes
    start, P, BLOCK: tl.constexpr,
    # switches
    QUERY: tl.constexpr, BY_LABELS: tl.constexpr, HAS_THRESHOLD: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Returns what decides the pairs of some rows, [BLOCK] each: place, label, 1 / |f|, thresholds, and who takes part.

    A query without a label has -1, a key -2, so that they do not match.
    """
    place = start + tl.arange(0, BLOCK)
    inside = place < P
    inverse, threshold, negative = (tl.zeros((BLOCK,), tl.float32),) * 3
    label = tl.zeros((BLOCK,), tl.int32)
    if BY_LABELS:
        label = tl.load(labels_ptr + place, mask=inside, other=-1).to(tl.int32)
        if QUERY:
            label = tl.maximum(label, -1)
        else:
            inside = inside & (label >= 0)
            label = tl.where(inside, label, -2)
    else:
        inverse = tl.load(inverse_ptr + place, mask=inside, other=0.0)
        if HAS_THRESHOLD:
            threshold = tl.load(threshold_ptr + place, mask=inside, other=0.0)
        if QUERY and BAND:
            negative = tl.load(negative_ptr + place, mask=inside, other=0.0)
    return place, label, inverse, threshold, negative, inside


@triton.jit
def pair_masks(
    query, key, products,
    BY_LABELS: tl.constexpr, HAS_THRESHOLD_J: tl.constexpr, BAND: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
):  # fmt: skip
    """Returns the positives and the candidates of a block; `query` and `key` are of `load_side`, as rows or columns."""
    candidate = key[5]
    if BY_LABELS:
        related = query[1] == key[1]
    else:
        closeness = products * query[2] * key[2]
        related = closeness > query[3]
        if HAS_THRESHOLD_J:
            related = related | (closeness > key[3])
        if BAND:
            candidate = candidate & (related | (closeness < query[4]))
    if EXCLUDE_SELF:
        candidate = candidate & (query[0] != key[0])
    return related & candidate, candidate


@triton.jit
def down(side):
    return side[0][:, None], side[1][:, None], side[2][:, None], side[3][:, None], side[4][:, None], side[5][:, None]


@triton.jit
def across(side):
    return side[0][None, :], side[1][None, :], side[2][None, :], side[3][None, :], side[4][None, :], side[5][None, :]


@triton.jit
def load_tiles(
    ptr, start, P, stride, D: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    FEATURE: tl.constexpr,
):  # fmt: skip
    """Loads feature rows that stay on chip, as TILES operands [BLOCK,BLOCK_D]."""
    tiles = ()
    for i in tl.static_range(TILES):
        tile = load_tile(ptr, start, P, stride, i * BLOCK_D, width=D, BLOCK=BLOCK, WIDTH=BLOCK_D)
        tiles = tiles + (tile.to(FEATURE),)
    return tiles


@triton.jit
def feature_products(
    mine, mine_ptr, other_ptr, start, first, P, Q, stride_m, stride_o,
    D: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FEATURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns inner products [BLOCK_M,BLOCK_N] of features; `mine` are tiles on chip, or none."""
    if TILES > 0:
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(TILES):
            theirs = load_tile(other_ptr, first, Q, stride_o, i * BLOCK_D, width=D, BLOCK=BLOCK_N, WIDTH=BLOCK_D)
            products = tl.dot(mine[i], tl.trans(theirs.to(FEATURE)), products, input_precision=PRECISION)
    else:
        products = streamed_products(
            mine_ptr=mine_ptr, other_ptr=other_ptr, mine_start=start, other_start=first, P=P, Q=Q,
            stride_m=stride_m, stride_o=stride_o, width=D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK_D,
            OPERAND=FEATURE, PRECISION=PRECISION,
        )  # fmt: skip
    return products


@triton.jit
def code_products(
    mine, theirs, mine_ptr, other_ptr, start, first, P, Q,
    ZP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    WHOLE: tl.constexpr, CODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns cosines [BLOCK_M,BLOCK_N] of codes; with WHOLE from operands on chip, else streamed."""
    if WHOLE:
        products = tl.dot(mine, tl.trans(theirs), input_precision=PRECISION)
    else:
        products = streamed_products(
            mine_ptr=mine_ptr, other_ptr=other_ptr, mine_start=start, other_start=first, P=P, Q=Q,
            stride_m=ZP, stride_o=ZP, width=ZP, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK_W,
            OPERAND=CODE, PRECISION=PRECISION,
        )  # fmt: skip
    return products


@triton.jit
def grown(largest, total, x):
    """Adds a block's 2^x [BLOCK_M,BLOCK_N] to running sums 2^largest * total [BLOCK_M]."""
    higher = tl.maximum(largest, tl.max(x, 1))
    return higher, total * tl.exp2(largest - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)


@triton.jit
def contrast_sums_kernel(
    # in
    features_i_ptr,  # [B,N,D]
    inverse_i_ptr,  # [B,N] fp32: 1 / |f|
    codes_i_ptr,  # [B,N,ZP] unit rows
    labels_i_ptr,  # [B,N] integers
    features_j_ptr,  # [B,M,D]
    inverse_j_ptr,  # [B,M] fp32
    codes_j_ptr,  # [B,M,ZP]
    labels_j_ptr,  # [B,M]
    threshold_ptr,  # [B,N] fp32
    threshold_j_ptr,  # [B,M] fp32
    negative_ptr,  # [B,N] fp32
    temperature_ptr,  # [] fp32
    # out
    log_sum_ptr,  # [B,N] fp32
    positive_ptr,  # [B,N] fp32
    count_ptr,  # [B,N] int64
    # sizes
    N, M, stride_ib, stride_ip, stride_jb, stride_jp, D: tl.constexpr, ZP: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    WHOLE: tl.constexpr,  # codes fit on chip in one tile of BLOCK_Z; else they are streamed
    BY_LABELS: tl.constexpr, HAS_THRESHOLD_J: tl.constexpr, BAND: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    INSIDE: tl.constexpr,
    FEATURE: tl.constexpr,  # the types in which the matrix unit reads features and codes
    CODE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    b, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_M
    features_i_ptr += b * stride_ib
    features_j_ptr += b * stride_jb
    codes_i_ptr += b * N * ZP
    codes_j_ptr += b * M * ZP
    temperature = tl.load(temperature_ptr)
    scale = LOG2E / temperature
    query = down(load_side(
        labels_i_ptr + b * N, inverse_i_ptr + b * N, threshold_ptr + b * N, negative_ptr + b * N, start, N,
        BLOCK=BLOCK_M, QUERY=True, BY_LABELS=BY_LABELS, HAS_THRESHOLD=True, BAND=BAND,
    ))  # fmt: skip
    mine = load_tiles(
        features_i_ptr, start, N, stride_ip, D=D, TILES=TILES, BLOCK=BLOCK_M, BLOCK_D=BLOCK_D, FEATURE=FEATURE
    )
    mine_codes = 0
    if WHOLE:
        mine_codes = load_rows(codes_i_ptr, start, N, ZP, width=ZP, BLOCK=BLOCK_M, WIDTH=BLOCK_Z)
    largest, total = tl.full((BLOCK_M,), FAR, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    largest_positive, positive = largest, total
    count = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, M, BLOCK_N):
        key = across(load_side(
            labels_j_ptr + b * M, inverse_j_ptr + b * M, threshold_j_ptr + b * M, negative_ptr, first, M,
            BLOCK=BLOCK_N, QUERY=False, BY_LABELS=BY_LABELS, HAS_THRESHOLD=HAS_THRESHOLD_J, BAND=BAND,
        ))  # fmt: skip
        products = 0.0
        if not BY_LABELS:
            products = feature_products(
                mine, features_i_ptr, other_ptr=features_j_ptr, start=start, first=first, P=N, Q=M,
                stride_m=stride_ip, stride_o=stride_jp, D=D, TILES=TILES,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, FEATURE=FEATURE, PRECISION=PRECISION,
            )  # fmt: skip
        other_codes = 0
        if WHOLE:
            other_codes = load_rows(codes_j_ptr, first, M, ZP, width=ZP, BLOCK=BLOCK_N, WIDTH=BLOCK_Z)
        cosine = code_products(
            mine_codes, other_codes, mine_ptr=codes_i_ptr, other_ptr=codes_j_ptr, start=start, first=first,
            P=N, Q=M, ZP=ZP,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK_Z, WHOLE=WHOLE, CODE=CODE, PRECISION=PRECISION,
        )  # fmt: skip
        related, candidate = pair_masks(
            query, key, products, BY_LABELS=BY_LABELS, HAS_THRESHOLD_J=HAS_THRESHOLD_J, BAND=BAND,
            EXCLUDE_SELF=EXCLUDE_SELF,
        )  # fmt: skip
        x = cosine * scale
        count += tl.sum(related.to(tl.int32), 1)
        if INSIDE:
            largest_positive, positive = grown(largest_positive, positive, tl.where(related, x, float("-inf")))
        else:
            positive += tl.sum(tl.where(related, cosine, 0.0), 1)
        largest, total = grown(largest, total, tl.where(candidate, x, float("-inf")))
    row = b * N + start + tl.arange(0, BLOCK_M)
    inside = start + tl.arange(0, BLOCK_M) < N
    tl.store(log_sum_ptr + row, tl.where(total == 0.0, 0.0, (largest + tl.log2(total)) * LN2), mask=inside)
    if INSIDE:
        positive = tl.where(count == 0, 0.0, (largest_positive + tl.log2(positive / tl.maximum(count, 1))) * LN2)
    else:
        positive = positive / (temperature * tl.maximum(count, 1))
    tl.store(positive_ptr + row, positive, mask=inside)
    tl.store(count_ptr + row, count.to(tl.int64), mask=inside)


@triton.jit
def load_upstream(
    log_sum_ptr, positive_ptr, count_ptr, d_log_sum_ptr, d_positive_ptr, start, N, factor, BLOCK: tl.constexpr,
    INSIDE: tl.constexpr,
):  # fmt: skip
    """Returns for some queries, [BLOCK] each: log2 of both sums, and the gradients that arrive at them, times factor.

    The gradient to the mean over the positives comes over their number.
    """
    place = start + tl.arange(0, BLOCK)
    inside = place < N
    total = tl.load(log_sum_ptr + place, mask=inside, other=0.0) * LOG2E
    d_total = tl.load(d_log_sum_ptr + place, mask=inside, other=0.0) * factor
    d_positive = tl.load(d_positive_ptr + place, mask=inside, other=0.0) * factor
    count = tl.maximum(tl.load(count_ptr + place, mask=inside, other=1), 1).to(tl.float32)
    positive = tl.zeros((BLOCK,), tl.float32)
    if INSIDE:
        positive = tl.load(positive_ptr + place, mask=inside, other=0.0) * LOG2E + tl.log2(count)
    else:
        d_positive = d_positive / count
    return total, positive, d_total, d_positive


@triton.jit
def contrast_gradient_kernel(
    # in
    mine_features_ptr,  # [B,P,D]
    mine_inverse_ptr,  # [B,P] fp32
    mine_codes_ptr,  # [B,P,ZP]
    mine_labels_ptr,  # [B,P]
    mine_threshold_ptr,  # [B,P] fp32: threshold or threshold_j
    other_features_ptr,  # [B,Q,D]
    other_inverse_ptr,  # [B,Q] fp32
    other_codes_ptr,  # [B,Q,ZP]
    other_labels_ptr,  # [B,Q]
    other_threshold_ptr,  # [B,Q] fp32
    negative_ptr,  # [B,N] fp32, of the queries like all that follow
    temperature_ptr,  # [] fp32
    log_sum_ptr,  # [B,N] fp32
    positive_ptr,  # [B,N] fp32
    count_ptr,  # [B,N] int64
    d_log_sum_ptr,  # [B,N] fp32
    d_positive_ptr,  # [B,N] fp32
    largest_ptr,  # [] fp32: the largest magnitude of the two
    # out
    gradient_ptr,  # [B,P,ZP] fp32 toward the unit codes
    # sizes
    P, Q, stride_mb, stride_mp, stride_ob, stride_op, D: tl.constexpr, ZP: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Z: tl.constexpr,  # columns of the gradient that a program holds
    # switches
    FROM_I: tl.constexpr,  # mine are the queries
    WHOLE: tl.constexpr, BY_LABELS: tl.constexpr, HAS_THRESHOLD_J: tl.constexpr, BAND: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, INSIDE: tl.constexpr, FEATURE: tl.constexpr, CODE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    b, start, column = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_M, tl.program_id(2) * BLOCK_Z
    mine_features_ptr += b * stride_mb
    other_features_ptr += b * stride_ob
    mine_codes_ptr += b * P * ZP
    other_codes_ptr += b * Q * ZP
    queries = P if FROM_I else Q
    log_sum_ptr += b * queries
    positive_ptr += b * queries
    count_ptr += b * queries
    d_log_sum_ptr += b * queries
    d_positive_ptr += b * queries
    negative_ptr += b * queries
    temperature = tl.load(temperature_ptr)
    scale = LOG2E / temperature
    largest = tl.maximum(tl.load(largest_ptr), 1e-30)
    me = down(load_side(
        mine_labels_ptr + b * P, mine_inverse_ptr + b * P, mine_threshold_ptr + b * P, negative_ptr, start, P,
        BLOCK=BLOCK_M, QUERY=FROM_I, BY_LABELS=BY_LABELS, HAS_THRESHOLD=FROM_I or HAS_THRESHOLD_J, BAND=BAND,
    ))  # fmt: skip
    if FROM_I:
        total, positive, d_total, d_positive = load_upstream(
            log_sum_ptr, positive_ptr, count_ptr=count_ptr, d_log_sum_ptr=d_log_sum_ptr,
            d_positive_ptr=d_positive_ptr, start=start, N=P, factor=LIFT / largest,
            BLOCK=BLOCK_M, INSIDE=INSIDE,
        )  # fmt: skip
        total, positive, d_total, d_positive = total[:, None], positive[:, None], d_total[:, None], d_positive[:, None]
    mine = load_tiles(
        mine_features_ptr, start, P, stride_mp, D=D, TILES=TILES, BLOCK=BLOCK_M, BLOCK_D=BLOCK_D, FEATURE=FEATURE
    )
    mine_codes = 0
    if WHOLE:
        mine_codes = load_rows(mine_codes_ptr, start, P, ZP, width=ZP, BLOCK=BLOCK_M, WIDTH=BLOCK_Z)
    gradient = tl.zeros((BLOCK_M, BLOCK_Z), tl.float32)
    for first in range(0, Q, BLOCK_N):
        it = across(load_side(
            other_labels_ptr + b * Q, other_inverse_ptr + b * Q, other_threshold_ptr + b * Q, negative_ptr, first, Q,
            BLOCK=BLOCK_N, QUERY=not FROM_I, BY_LABELS=BY_LABELS, HAS_THRESHOLD=HAS_THRESHOLD_J or not FROM_I,
            BAND=BAND,
        ))  # fmt: skip
        products = 0.0
        if not BY_LABELS:
            products = feature_products(
                mine, mine_features_ptr, other_ptr=other_features_ptr, start=start, first=first, P=P, Q=Q,
                stride_m=stride_mp, stride_o=stride_op, D=D, TILES=TILES,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, FEATURE=FEATURE, PRECISION=PRECISION,
            )  # fmt: skip
        other_codes = load_tile(other_codes_ptr, first, Q, ZP, column, width=ZP, BLOCK=BLOCK_N, WIDTH=BLOCK_Z)
        cosine = code_products(
            mine_codes, other_codes, mine_ptr=mine_codes_ptr, other_ptr=other_codes_ptr, start=start,
            first=first, P=P, Q=Q, ZP=ZP,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK_Z, WHOLE=WHOLE, CODE=CODE, PRECISION=PRECISION,
        )  # fmt: skip
        if FROM_I:
            query, key = me, it
        else:
            query, key = it, me
            total, positive, d_total, d_positive = load_upstream(
                log_sum_ptr, positive_ptr, count_ptr=count_ptr, d_log_sum_ptr=d_log_sum_ptr,
                d_positive_ptr=d_positive_ptr, start=first, N=Q, factor=LIFT / largest,
                BLOCK=BLOCK_N, INSIDE=INSIDE,
            )  # fmt: skip
            total, positive = total[None, :], positive[None, :]
            d_total, d_positive = d_total[None, :], d_positive[None, :]
        related, candidate = pair_masks(
            query, key, products, BY_LABELS=BY_LABELS, HAS_THRESHOLD_J=HAS_THRESHOLD_J, BAND=BAND,
            EXCLUDE_SELF=EXCLUDE_SELF,
        )  # fmt: skip
        x = cosine * scale
        weight = tl.where(candidate, tl.exp2(x - total) * d_total, 0.0)
        if INSIDE:
            weight += tl.where(related, tl.exp2(x - positive) * d_positive, 0.0)
        else:
            weight += tl.where(related, d_positive, 0.0)
        gradient = tl.dot(weight.to(CODE), other_codes, gradient, input_precision=PRECISION)
    row, z = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_Z)
    out_ptr = gradient_ptr + (b * P + start) * ZP + row[:, None] * ZP + z[None, :]
    inside = (start + row < P)[:, None] & (z < ZP)[None, :]
    tl.store(out_ptr, gradient * (largest / (LIFT * temperature)), mask=inside)
