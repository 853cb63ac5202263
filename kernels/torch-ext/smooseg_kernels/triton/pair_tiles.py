"""Blocks of patch pairs: both similarities of every pair in registers, from which row sums and gradient rows leave.

One program holds a block of rows of one image ("mine") and walks over all patches of the image that it meets ("other").
The i side is mine in the forward pass and the j side in the backward pass, so each gradient row has one writer. Codes
come as unit rows; features come as they are, with 1 / length next to them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import load_rows
from .pair_totals import add_up


@triton.jit
def met_image(partner_ptr, n, N, HAS_PARTNER: tl.constexpr):
    """Returns the partner, clamped: a number out of range must not read out of bounds; a check would be a wait."""
    j = n
    if HAS_PARTNER:
        j = tl.minimum(tl.maximum(tl.load(partner_ptr + n), 0), N - 1)
    return j


@triton.jit
def no_gradient(BLOCK_M: tl.constexpr, width: tl.constexpr):
    """Returns zeros [BLOCK_M,width]. Triton 3.6 takes an entry of a tuple as a size of a call alone, not of a shape."""
    return tl.zeros((BLOCK_M, width), tl.float32)


@triton.jit
def streamed_products(
    # in
    mine_ptr, other_ptr,
    # sizes
    mine_start, other_start, P, Q, stride_m, stride_o, width: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    # switches
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns [BLOCK_M, BLOCK_N] inner products of rows that are too wide to stay on chip."""
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row, other, w = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)
    mine_ptr += tl.cast(mine_start, tl.int64) * stride_m
    other_ptr += tl.cast(other_start, tl.int64) * stride_o
    for first in range(0, width, BLOCK_W):
        inside = (first + w < width)[None, :]
        a_ptr = mine_ptr + row[:, None] * stride_m + first + w[None, :]
        a = tl.load(a_ptr, mask=(mine_start + row < P)[:, None] & inside, other=0.0)
        b_ptr = other_ptr + other[:, None] * stride_o + first + w[None, :]
        b = tl.load(b_ptr, mask=(other_start + other < Q)[:, None] & inside, other=0.0)
        products = tl.dot(a.to(OPERAND), tl.trans(b.to(OPERAND)), products, input_precision=PRECISION)
    return products


@triton.jit
def pair_tiles_kernel(
    # in
    mine_features_ptr,  # [B or N,P,D]
    mine_inverse_ptr,  # [B or N,P] fp32: 1 / |f|
    mine_codes_ptr,  # [B or N,P,ZP] unit rows
    other_features_ptr,  # [N or B,Q,D]
    other_inverse_ptr,  # [N or B,Q] fp32
    other_codes_ptr,  # [N or B,Q,ZP]
    partner_ptr,  # [B] int64
    row_means_ptr,  # [B,P_i] fp32: mean_j S_ij
    mean_parts_ptr,  # [parts] fp32: they add up to the sum of all row means
    threshold_ptr,  # [] fp32
    # out
    energy_ptr,  # [B,blocks] fp32, with ENERGY: the sum of V clamp(c.c') over a block of rows
    clamped_ptr,  # [B,blocks] fp32, with CLAMPED: the sum of clamp(c.c')
    gradient_ptr,  # [B,P,ZP] fp32, with GRADIENT: sum of V c' over the other side where the clamp passes it
    # sizes
    N, P, Q, parts,
    row_mean_count,  # the number of row means
    low, high, first_column, stride_mb, stride_mp, stride_ob, stride_op, D: tl.constexpr, ZP: tl.constexpr,
    STARTS: tl.constexpr,  # the code columns from first_column on whose gradient is asked for,
    WIDTHS: tl.constexpr,  # in pieces whose widths are powers of two
    PIECES: tl.constexpr,
    TILES: tl.constexpr,  # feature tiles of my rows that stay on chip; 0: both sides are streamed
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    ALL_PIECES: tl.constexpr,  # the pieces are all columns; else codes are streamed
    FROM_I: tl.constexpr,  # mine is the i side
    HAS_PARTNER: tl.constexpr, CENTER: tl.constexpr, HINGE: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    ZERO_MOVES: tl.constexpr,  # the clamp changes a cosine of 0
    ENERGY: tl.constexpr, CLAMPED: tl.constexpr, GRADIENT: tl.constexpr,
    FEATURE: tl.constexpr,  # the types in which the matrix unit reads features and codes
    CODE: tl.constexpr,
    PRECISION: tl.constexpr,
    # options
    weight_ptr=None,  # [B,Q] fp32, with HAS_WEIGHT: factors of V
    GIVEN: tl.constexpr = False,  # row_means are -bias, thresholds [B] its largest magnitude or 1; energies are [B,P]
    HAS_WEIGHT: tl.constexpr = False,
    SIMILARITY_ALONE: tl.constexpr = False,  # V is 1
    d_energy_ptr=None,  # [] fp32, with D_ENERGY
    d_clamped_ptr=None,  # [] fp32, with D_CLAMPED
    UPSTREAM: tl.constexpr = False,  # the gradient is of d_energy V c' - d_clamped c'
    D_ENERGY: tl.constexpr = False, D_CLAMPED: tl.constexpr = False,
):  # fmt: skip
    n, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_M
    j = met_image(partner_ptr, n, N, HAS_PARTNER)
    if FROM_I:
        me, it = n, j
    else:
        me, it = j, n
    mine_features_ptr += me * stride_mb
    other_features_ptr += it * stride_ob
    mine_codes_ptr += me * P * ZP
    other_codes_ptr += it * Q * ZP
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = start + row < P

    if GIVEN:
        shift, largest = 0.0, tl.load(threshold_ptr + n)
    else:
        shift = -tl.load(threshold_ptr)
        if CENTER:
            shift += add_up(mean_parts_ptr, parts) / row_mean_count
        # forces stay within a 16-bit range for any threshold
        largest = tl.maximum(1.0, tl.abs(shift))
    if SIMILARITY_ALONE:
        largest = 1.0
    size, d_energy, d_clamped = largest, 1.0, 0.0
    if UPSTREAM:
        d_energy = 0.0
        if D_ENERGY:
            d_energy += tl.load(d_energy_ptr)
        if D_CLAMPED:
            d_clamped += tl.load(d_clamped_ptr)
        size = tl.maximum(tl.maximum(tl.abs(d_energy) * largest, tl.abs(d_clamped)), 1e-30)
        d_energy, d_clamped = d_energy * largest / size, d_clamped / size
    mine_scale = tl.load(mine_inverse_ptr + me * P + start + row, mask=inside, other=0.0) / largest
    mine_bias = tl.zeros((BLOCK_M,), tl.float32)
    if FROM_I:
        mine_bias += shift
        if CENTER:
            mine_bias -= tl.load(row_means_ptr + n * P + start + row, mask=inside, other=0.0)
        mine_bias = tl.where(inside, mine_bias / largest, 0.0)

    mine, mine_codes, gradients = (), (), ()
    for i in tl.static_range(TILES):
        tile = load_rows(
            mine_features_ptr + i * BLOCK_D, start, P, stride_mp, width=D - i * BLOCK_D, BLOCK=BLOCK_M, WIDTH=BLOCK_D
        )
        mine = mine + (tile.to(FEATURE),)
    for i in tl.static_range(PIECES):
        if ALL_PIECES:
            mine_piece = load_rows(
                mine_codes_ptr + STARTS[i], start, P, ZP, width=WIDTHS[i], BLOCK=BLOCK_M, WIDTH=WIDTHS[i]
            )
            mine_codes = mine_codes + (mine_piece,)
        gradients = gradients + (no_gradient(BLOCK_M, WIDTHS[i]),)
    energy, similarity = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)

    for first in range(0, Q, BLOCK_N):
        here = first + column < Q
        if SIMILARITY_ALONE:
            closeness = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        elif TILES > 0:
            closeness = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i in tl.static_range(TILES):
                theirs = load_rows(
                    other_features_ptr + i * BLOCK_D,
                    first,
                    Q,
                    stride_op,
                    width=D - i * BLOCK_D,
                    BLOCK=BLOCK_N,
                    WIDTH=BLOCK_D,
                ).to(FEATURE)
                closeness = tl.dot(mine[i], tl.trans(theirs), closeness, input_precision=PRECISION)
        else:
            closeness = streamed_products(
                mine_ptr=mine_features_ptr, other_ptr=other_features_ptr, mine_start=start, other_start=first, P=P, Q=Q,
                stride_m=stride_mp, stride_o=stride_op, width=D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK_D,
                OPERAND=FEATURE, PRECISION=PRECISION,
            )  # fmt: skip
        other_codes = ()
        if ALL_PIECES:
            likeness = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i in tl.static_range(PIECES):
                other_piece = load_rows(
                    other_codes_ptr + STARTS[i], first, Q, ZP, width=WIDTHS[i], BLOCK=BLOCK_N, WIDTH=WIDTHS[i]
                )
                other_codes = other_codes + (other_piece,)
                likeness = tl.dot(mine_codes[i], tl.trans(other_codes[i]), likeness, input_precision=PRECISION)
        else:
            likeness = streamed_products(
                mine_ptr=mine_codes_ptr, other_ptr=other_codes_ptr, mine_start=start, other_start=first, P=P, Q=Q,
                stride_m=ZP, stride_o=ZP, width=ZP, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK_Z,
                OPERAND=CODE, PRECISION=PRECISION,
            )  # fmt: skip

        if SIMILARITY_ALONE:
            force = closeness + tl.where(here, 1.0, 0.0)[None, :]
        else:
            scale = tl.load(other_inverse_ptr + it * Q + first + column, mask=here, other=0.0)
            force = closeness * scale[None, :] * mine_scale[:, None]
            if FROM_I:
                force += mine_bias[:, None]
                # a padded column still carries my bias, and its cosine of 0 may be clamped to another number
                if ZERO_MOVES:
                    force = tl.where(here[None, :], force, 0.0)
            else:
                bias = tl.zeros((BLOCK_N,), tl.float32) + shift
                if CENTER:
                    bias -= tl.load(row_means_ptr + n * Q + first + column, mask=here, other=0.0)
                force += (bias / largest)[None, :]
            if HINGE:
                force = tl.maximum(force, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if HAS_WEIGHT:
            force *= tl.load(weight_ptr + n * Q + first + column, mask=here, other=0.0)[None, :]
        clamped = likeness
        if HAS_LOW:
            clamped = tl.maximum(clamped, low, propagate_nan=tl.PropagateNan.ALL)
        if HAS_HIGH:
            clamped = tl.minimum(clamped, high, propagate_nan=tl.PropagateNan.ALL)
        if ENERGY:
            energy += tl.sum(force * clamped, 1)
        if CLAMPED:
            if ZERO_MOVES:
                similarity += tl.sum(tl.where(here[None, :], clamped, 0.0), 1)
            else:
                similarity += tl.sum(clamped, 1)
        if GRADIENT:
            if UPSTREAM:
                force = force * d_energy - d_clamped
            if HAS_LOW or HAS_HIGH:
                force = tl.where(clamped == likeness, force, 0.0)  # between the bounds, or at one
            weight = force.to(CODE)
            new_gradients = ()
            for i in tl.static_range(PIECES):
                if ALL_PIECES:
                    piece = other_codes[i]
                else:
                    piece = load_rows(
                        other_codes_ptr + first_column + STARTS[i],
                        first,
                        Q,
                        ZP,
                        width=WIDTHS[i],
                        BLOCK=BLOCK_N,
                        WIDTH=WIDTHS[i],
                    )
                new_gradients = new_gradients + (tl.dot(weight, piece, gradients[i], input_precision=PRECISION),)
            gradients = new_gradients

    if ENERGY and GIVEN:
        tl.store(energy_ptr + n * P + start + row, energy * largest, mask=inside)
    elif ENERGY:
        tl.store(energy_ptr + n * tl.num_programs(0) + tl.program_id(0), tl.sum(energy, 0) * largest)
    if CLAMPED:
        similarity = tl.where(inside, similarity, 0.0)
        tl.store(clamped_ptr + n * tl.num_programs(0) + tl.program_id(0), tl.sum(similarity, 0))
    if GRADIENT:
        for i in tl.static_range(PIECES):
            columns = first_column + STARTS[i] + tl.arange(0, gradients[i].shape[1])
            out_ptr = gradient_ptr + (n * P + start) * ZP + row[:, None] * ZP + columns[None, :]
            tl.store(out_ptr, gradients[i] * size, mask=inside[:, None])
