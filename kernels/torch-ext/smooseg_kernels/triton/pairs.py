"""Clamped energies of patch pairs as registered operators.

Forward: the lengths and means that are linear in the patches, then the blocks of pairs. They give the energy and,
because it is one number, the i side's gradient for an upstream gradient of 1. Backward: the blocks once more for the j
side, and through the codes' lengths. Shapes: features_i [B,P_i,D], codes_i [B,P_i,Z], features_j [N,P_j,D], codes_j
[N,P_j,Z], partner int64 [B] or none, threshold [].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .launch import block_z, config, contiguous, launch, operand, operator, or_nothing, precision, with_rows_together
from .pair_rows import code_gradient_kernel, finish_pairs_kernel, row_means_kernel, unit_rows_kernel
from .pair_tiles import pair_tiles_kernel

# code channels whose gradient one launch holds in registers: all, or so many at a time
GRADIENT_COLUMNS, GRADIENT_SLICE = 128, 64
ROW_ELEMENTS = 8192  # elements of a tile of whole rows


class Scratch(NamedTuple):
    """Tensors that the forward pass leaves to the backward pass; ZP is Z padded, S counts splits."""

    inverse_i: Tensor  # [B,P_i] fp32: 1 / |f_i|
    inverse_j: Tensor  # [N,P_j] fp32
    unit_i: Tensor  # [B,P_i,ZP] unit codes
    unit_j: Tensor  # [N,P_j,ZP]
    code_inverse_i: Tensor  # [B,P_i] fp32: 1 / |c_i|
    code_inverse_j: Tensor  # [N,P_j] fp32
    sums_i: Tensor  # [B,S,Z] fp32 sums of unit codes
    sums_j: Tensor  # [N,S,Z] fp32
    row_means: Tensor  # [B,P_i] fp32: mean_j S_ij
    mean_parts: Tensor  # [B,parts] fp32 sums of row means
    rows_i: Tensor  # [B,P_i,ZP] fp32 gradient toward unit_i for an upstream gradient of 1; [0,P_i,ZP] for none


class Side(NamedTuple):
    """One side of the pairs."""

    features: Tensor  # [B or N,P,D]
    inverse: Tensor  # [B or N,P] fp32: 1 / |f|
    unit: Tensor  # [B or N,P,ZP] unit codes


class Rule(NamedTuple):
    """How pairs meet and what their energy is."""

    threshold: Tensor  # []
    partner: Tensor | None  # int64 [B]
    low: float | None
    high: float | None
    hinge: bool
    center: bool


class Given(NamedTuple):
    """Takes the place of the means that a Scratch has: any bias, weights, and a row of results in place of a sum."""

    row_means: Tensor  # [B,P_i] fp32: -bias
    weight: Tensor | None  # [B,Q] of the other side
    similarity_alone: bool  # V is 1


class Upstream(NamedTuple):
    """Gradients that arrive in the backward pass."""

    energy: Tensor | None  # []
    similarity: Tensor | None  # []


def width_block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def padded(Z: int) -> int:
    """Rounds Z up to whole 16 columns: loads of unit codes then need no mask, and all are aligned."""
    return -(-Z // 16) * 16


def pieces(columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cuts a multiple of 16 into powers of two, the widest first; returns their starts and widths."""
    starts, widths, start = [], [], 0
    while start < columns:
        width = 1 << ((columns - start).bit_length() - 1)
        starts.append(start)
        widths.append(width)
        start += width
    return tuple(starts), tuple(widths)


def code_dtype(codes_i: Tensor, codes_j: Tensor) -> torch.dtype:
    """Returns the dtype of unit codes: fp16 is finer than bf16 where nothing exceeds 1."""
    return torch.float32 if torch.float32 in (codes_i.dtype, codes_j.dtype) else torch.float16


def row_settings(kernel: str, like: Tensor, width: int) -> dict[str, int]:
    """Returns settings with fewer rows in a program where they are wide."""
    settings = config(kernel, like)
    return {**settings, "BLOCK_P": max(1, min(settings["BLOCK_P"], ROW_ELEMENTS // width_block(width)))}


def mean_part_count(features_i: Tensor) -> int:
    """Counts the programs of `row_means` for one image."""
    block = row_settings("row_means", features_i, int(features_i.shape[2]))["BLOCK_P"]
    return (features_i.shape[1] + block - 1) // block


def empty_scratch(
    features_i: Tensor, codes_i: Tensor, features_j: Tensor, codes_j: Tensor, *, i_gradient: bool
) -> Scratch:
    (B, P_i, Z), (N, P_j, _) = codes_i.shape, codes_j.shape
    ZP, splits = padded(int(Z)), config("unit_rows", features_i)["SPLITS"]
    unit = code_dtype(codes_i, codes_j)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=features_i.device)

    return Scratch(
        inverse_i=empty(B, P_i),
        inverse_j=empty(N, P_j),
        unit_i=empty(B, P_i, ZP, dtype=unit),
        unit_j=empty(N, P_j, ZP, dtype=unit),
        code_inverse_i=empty(B, P_i),
        code_inverse_j=empty(N, P_j),
        sums_i=empty(B, splits, Z),
        sums_j=empty(N, splits, Z),
        row_means=empty(B, P_i),
        mean_parts=empty(B, mean_part_count(features_i)),
        rows_i=empty(B if i_gradient else 0, P_i, ZP),
    )


@operator("pair_energy")
def pair_energy(
    features_i: Tensor,
    codes_i: Tensor,
    features_j: Tensor,
    codes_j: Tensor,
    threshold: Tensor,
    partner: Tensor | None,
    low: float | None,
    high: float | None,
    hinge: bool,
    center: bool,
    i_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns energy [], similarity [], then the Scratch."""
    kept = empty_scratch(features_i, codes_i, features_j, codes_j, i_gradient=i_gradient)
    features_i, codes_i = with_rows_together(features_i), with_rows_together(codes_i)
    features_j, codes_j = with_rows_together(features_j), with_rows_together(codes_j)
    rule = Rule(threshold, contiguous(partner), low, high, hinge=hinge, center=center)
    (B, P_i, D), P_j = features_i.shape, features_j.shape[1]
    feature_sums = kept.inverse_j.new_empty(len(features_j), kept.sums_j.shape[1], D)
    energy, similarity = kept.inverse_i.new_empty(()), kept.inverse_i.new_empty(())
    similarity_parts = kept.inverse_i.new_empty(B)
    with torch.cuda.device_of(features_i):
        measure_rows(features_j, kept.inverse_j, feature_sums if center else None, None)
        measure_rows(codes_i, kept.code_inverse_i, kept.sums_i, kept.unit_i)
        measure_rows(codes_j, kept.code_inverse_j, kept.sums_j, kept.unit_j)
        add_up_rows(features_i, kept, rule, feature_sums, similarity_parts)
        i_side = Side(features_i, kept.inverse_i, kept.unit_i)
        j_side = Side(features_j, kept.inverse_j, kept.unit_j)
        energy_parts = walk_tiles(i_side, j_side, rule, kept, gradient=kept.rows_i if i_gradient else None, from_i=True)
        launch(
            finish_pairs_kernel, (1,), settings=config("finish_pairs", features_i),
            energy_parts_ptr=energy_parts, similarity_parts_ptr=similarity_parts,
            energy_ptr=energy, similarity_ptr=similarity,
            parts=energy_parts.numel(), B=B, share=1.0 / (B * P_i * P_j),
        )  # fmt: skip
    return energy, similarity, *kept


def measure_rows(rows: Tensor, inverse: Tensor, sums: Tensor | None, unit: Tensor | None) -> None:
    """Launches the lengths of rows [B,P,W], and where given a place for them, sums of unit rows and the unit rows."""
    B, P, W = rows.shape
    settings = row_settings("unit_rows", rows, W)
    splits = settings.pop("SPLITS")
    launch(
        unit_rows_kernel, (splits, B), settings=settings,
        rows_ptr=rows,
        inverse_ptr=inverse, sums_ptr=or_nothing(sums, inverse), unit_ptr=or_nothing(unit, inverse),
        P=P, stride_b=rows.stride(0), stride_p=rows.stride(1), W=W, WP=W if unit is None else unit.shape[2],
        BLOCK_W=width_block(W),
        SUMS=sums is not None, WRITE=unit is not None,
    )  # fmt: skip


def add_up_rows(features_i: Tensor, kept: Scratch, rule: Rule, feature_sums: Tensor, similarity_parts: Tensor) -> None:
    """Launches the i side's row means, its features' lengths and the sums of the codes' cosines."""
    (B, P, D), Z, sums_i = features_i.shape, kept.sums_i.shape[2], kept.sums_i
    N, Q = kept.inverse_j.shape
    launch(
        row_means_kernel, (kept.mean_parts.shape[1], B), settings=row_settings("row_means", features_i, D),
        # in
        features_ptr=features_i, feature_sums_ptr=feature_sums, codes_i_sums_ptr=sums_i, codes_j_sums_ptr=kept.sums_j,
        partner_ptr=or_nothing(rule.partner, sums_i),
        # out
        inverse_ptr=kept.inverse_i, row_means_ptr=kept.row_means, parts_ptr=kept.mean_parts,
        similarity_ptr=similarity_parts,
        # sizes
        N=N, P=P, Q=Q, stride_b=features_i.stride(0), stride_p=features_i.stride(1), D=D, Z=Z,
        SPLITS=feature_sums.shape[1], SPLITS_I=sums_i.shape[1], SPLITS_J=kept.sums_j.shape[1],
        BLOCK_D=width_block(D), BLOCK_Z=block_z(Z),
        # switches
        HAS_PARTNER=rule.partner is not None, CENTER=rule.center,
    )  # fmt: skip


def tile_settings(features: Tensor, codes: Tensor, rows: int) -> tuple[dict[str, int], int, bool]:
    """Returns settings, the feature tiles of a program's rows that stay on chip (TILES), and whether its codes stay
    there.

    `rows` counts the rows of all images.
    """
    like = features if features.dtype == torch.float32 else codes  # fp32 on either side takes the room of fp32
    settings = config("pair_tiles", like)
    if rows < settings.pop("PROGRAMS") * settings["BLOCK_M"]:
        settings = config("few_pair_tiles", like)
    settings["BLOCK_D"] = min(settings["BLOCK_D"], width_block(features.shape[2]))
    tiles = -(-features.shape[2] // settings["BLOCK_D"])
    resident = settings.pop("RESIDENT")
    return settings, tiles if tiles <= resident else 0, resident > 0 and codes.shape[2] <= GRADIENT_COLUMNS


def walk_tiles(
    mine: Side, other: Side, rule: Rule, kept: Scratch | Given, *, gradient: Tensor | None, from_i: bool
) -> Tensor:
    """Launches every block of pairs of `mine` with `other`; returns parts or rows of the energy, fills `gradient`.

    Codes wider than one launch holds take a launch for each slice. Only the first adds up the energy.
    """
    B, P, Q, ZP = kept.row_means.shape[0], mine.inverse.shape[1], other.inverse.shape[1], mine.unit.shape[2]
    rows = B * P if isinstance(kept, Scratch) else 0  # weights need registers, which the smaller tiles leave
    settings, tiles, resident_codes = tile_settings(mine.features, mine.unit, rows)
    blocks = triton.cdiv(P, settings["BLOCK_M"])
    parts, options = kept.row_means, dict[str, bool | Tensor]()
    if isinstance(kept, Given):
        energy, tiles = mine.inverse.new_empty(B, P), 0 if kept.similarity_alone else tiles
        options = {"GIVEN": True, "HAS_WEIGHT": kept.weight is not None, "SIMILARITY_ALONE": kept.similarity_alone}
        options["weight_ptr"] = or_nothing(kept.weight, energy)
    else:
        energy, parts = mine.inverse.new_empty(B, blocks), kept.mean_parts
    step = ZP if ZP <= GRADIENT_COLUMNS else GRADIENT_SLICE
    for first in range(0, ZP if gradient is not None else 1, step):
        starts, widths = pieces(min(ZP - first, step)) if resident_codes or gradient is not None else ((), ())
        launch(
            pair_tiles_kernel, (blocks, B), settings=settings,
            # in
            mine_features_ptr=mine.features, mine_inverse_ptr=mine.inverse, mine_codes_ptr=mine.unit,
            other_features_ptr=other.features, other_inverse_ptr=other.inverse, other_codes_ptr=other.unit,
            partner_ptr=or_nothing(rule.partner, mine.inverse), row_means_ptr=kept.row_means,
            mean_parts_ptr=parts, threshold_ptr=rule.threshold,
            # out
            energy_ptr=energy, gradient_ptr=or_nothing(gradient, energy),
            # sizes
            N=len(other.inverse) if from_i else len(mine.inverse), P=P, Q=Q, parts=parts.numel(),
            row_mean_count=float(kept.row_means.numel()), low=0.0 if rule.low is None else rule.low,
            high=0.0 if rule.high is None else rule.high, first_column=first,
            stride_mb=mine.features.stride(0), stride_mp=mine.features.stride(1),
            stride_ob=other.features.stride(0), stride_op=other.features.stride(1),
            D=mine.features.shape[2], ZP=ZP, STARTS=starts, WIDTHS=widths, PIECES=len(starts), TILES=tiles,
            BLOCK_Z=min(32, width_block(ZP)),
            # switches
            ALL_PIECES=resident_codes, FROM_I=from_i, HAS_PARTNER=rule.partner is not None, CENTER=rule.center,
            HINGE=rule.hinge, HAS_LOW=rule.low is not None, HAS_HIGH=rule.high is not None,
            ZERO_MOVES=(rule.low or 0.0) > 0 or (rule.high or 0.0) < 0,
            ENERGY=from_i and first == 0, GRADIENT=gradient is not None,
            FEATURE=operand(mine.features.dtype), CODE=operand(mine.unit.dtype),
            PRECISION=precision(mine.features.device),
            **options,
        )  # fmt: skip
    return energy


@pair_energy.register_fake
def _(features_i, codes_i, features_j, codes_j, threshold, partner, low, high, hinge, center, i_gradient):
    kept = empty_scratch(features_i, codes_i, features_j, codes_j, i_gradient=i_gradient)
    return kept.inverse_i.new_empty(()), kept.inverse_i.new_empty(()), *kept


@operator("pair_energy_backward")
def pair_energy_backward(
    d_energy: Tensor | None,
    d_similarity: Tensor | None,
    features_i: Tensor,
    codes_i: Tensor,
    features_j: Tensor,
    codes_j: Tensor,
    threshold: Tensor,
    partner: Tensor | None,
    kept: Sequence[Tensor],
    low: float | None,
    high: float | None,
    hinge: bool,
    center: bool,
    i_gradient: bool,
    j_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of both codes, in their dtypes; empty where not asked for. `kept` is a Scratch."""
    scratch, upstream = Scratch(*kept), Upstream(d_energy, d_similarity)
    d_i, d_j = empty_gradients(codes_i, codes_j, i_gradient, j_gradient)
    features_i, codes_i = with_rows_together(features_i), with_rows_together(codes_i)
    features_j, codes_j = with_rows_together(features_j), with_rows_together(codes_j)
    rule = Rule(threshold, contiguous(partner), low, high, hinge=hinge, center=center)
    B, share = len(features_i), 1.0 / (features_i.shape[0] * features_i.shape[1] * features_j.shape[1])
    with torch.cuda.device_of(features_i):
        if i_gradient:
            through_lengths(
                codes_i, scratch.code_inverse_i, d_i, rule.partner, upstream,
                rows=scratch.rows_i, sums=scratch.sums_j, B=B, N=len(features_j), share=share, from_i=True,
            )  # fmt: skip
        if j_gradient:
            has_energy = d_energy is not None
            rows_j = scratch.rows_i.new_empty(B if has_energy else 0, codes_j.shape[1], scratch.unit_j.shape[2])
            if has_energy:
                i_side = Side(features_i, scratch.inverse_i, scratch.unit_i)
                j_side = Side(features_j, scratch.inverse_j, scratch.unit_j)
                walk_tiles(j_side, i_side, rule, scratch, gradient=rows_j, from_i=False)
            through_lengths(
                codes_j, scratch.code_inverse_j, d_j, rule.partner, upstream,
                rows=rows_j, sums=scratch.sums_i, B=B, N=len(features_j), share=share, from_i=False,
            )  # fmt: skip
    return d_i, d_j


def through_lengths(
    codes: Tensor, inverse: Tensor, d_codes: Tensor, partner: Tensor | None, upstream: Upstream, *,
    rows: Tensor, sums: Tensor, B: int, N: int, share: float, from_i: bool,
) -> None:  # fmt: skip
    """Launches the gradient through the codes' lengths.

    `rows` are gradients toward unit codes, for each image of the i side; `sums` are the other side's.
    """
    images, P, Z = codes.shape
    settings = row_settings("code_gradient", codes, Z)
    launch(
        code_gradient_kernel, (triton.cdiv(P, settings["BLOCK_P"]), images), settings=settings,
        # in
        codes_ptr=codes, inverse_ptr=inverse, rows_ptr=rows, sums_ptr=sums, partner_ptr=or_nothing(partner, inverse),
        d_energy_ptr=or_nothing(upstream.energy, inverse), d_similarity_ptr=or_nothing(upstream.similarity, inverse),
        # out
        d_codes_ptr=d_codes,
        # sizes
        B=B, N=N, P=P, share=share, stride_b=codes.stride(0), stride_p=codes.stride(1), Z=Z, ZP=padded(Z),
        SPLITS=sums.shape[1], BLOCK_B=triton.next_power_of_2(B), BLOCK_Z=block_z(Z),
        # switches
        FROM_I=from_i, HAS_PARTNER=partner is not None,
        HAS_ENERGY=upstream.energy is not None, HAS_SIMILARITY=upstream.similarity is not None,
    )  # fmt: skip


def empty_gradients(codes_i: Tensor, codes_j: Tensor, i_gradient: bool, j_gradient: bool) -> tuple[Tensor, Tensor]:
    def empty(codes: Tensor, asked: bool) -> Tensor:
        return torch.empty(codes.shape if asked else (0,), dtype=codes.dtype, device=codes.device)

    return empty(codes_i, i_gradient), empty(codes_j, j_gradient)


@pair_energy_backward.register_fake
def _(
    d_energy, d_similarity, features_i, codes_i, features_j, codes_j, threshold, partner, kept, low, high, hinge,
    center,
    i_gradient, j_gradient,
):  # fmt: skip
    return empty_gradients(codes_i, codes_j, i_gradient, j_gradient)


def setup_context(ctx, inputs, output):
    features_i, codes_i, features_j, codes_j, threshold, partner, ctx.low, ctx.high, ctx.hinge, ctx.center, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features_i, codes_i, features_j, codes_j, threshold, partner, *output[2:])


def backward(ctx, d_energy, d_similarity, *_):
    features_i, codes_i, features_j, codes_j, threshold, partner, *kept = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * 11  # one for each input
    arrived = d_energy is not None or d_similarity is not None
    i_gradient, j_gradient = ctx.needs_input_grad[1] and arrived, ctx.needs_input_grad[3] and arrived
    if i_gradient or j_gradient:
        d_i, d_j = pair_energy_backward(
            d_energy=d_energy, d_similarity=d_similarity, features_i=features_i, codes_i=codes_i, features_j=features_j,
            codes_j=codes_j, threshold=threshold, partner=partner, kept=kept, low=ctx.low, high=ctx.high,
            hinge=ctx.hinge,
            center=ctx.center, i_gradient=i_gradient, j_gradient=j_gradient,
        )  # fmt: skip
        gradients[1], gradients[3] = d_i if i_gradient else None, d_j if j_gradient else None
    return tuple(gradients)


pair_energy.register_autograd(backward, setup_context=setup_context)
