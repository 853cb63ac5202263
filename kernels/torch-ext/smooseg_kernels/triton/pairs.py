"""Clamped energies of patch pairs as registered operators.

Forward: the lengths and means that are linear in the patches, then the blocks of pairs. They give the energy and,
because it is one number, the i side's gradient for an upstream gradient of 1. Backward: the blocks once more for the j
side, and through the codes' lengths. With `means` two upstream gradients arrive, and the blocks serve both at once:
then each side's gradient waits for the backward pass. Shapes: features_i [B,P_i,D], codes_i [B,P_i,Z], features_j
[N,P_j,D], codes_j [N,P_j,Z], partner int64 [B] or none, threshold [].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..derivatives import refuse_second_of
from .launch import block_z, config, contiguous, launch, operator, or_nothing, with_rows_together
from .pair_rows import code_gradient_kernel, finish_pairs_kernel, row_means_kernel, unit_rows_kernel
from .pair_walk import Means, Rule, Side, Upstream, code_dtype, padded, walk_tiles, width_block

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

    @property
    def means(self) -> Means:
        return Means(self.row_means, self.mean_parts)


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
    means: bool,
    i_gradient: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor,
]:  # fmt: skip
    """Returns energy [], similarity [], with `means` clamped [] and closeness [], else [0], then the Scratch."""
    i_gradient = i_gradient and not means
    kept = empty_scratch(features_i, codes_i, features_j, codes_j, i_gradient=i_gradient)
    features_i, codes_i = with_rows_together(features_i), with_rows_together(codes_i)
    features_j, codes_j = with_rows_together(features_j), with_rows_together(codes_j)
    rule = Rule(threshold, contiguous(partner), low, high, hinge=hinge, center=center)
    (B, P_i, D), P_j = features_i.shape, features_j.shape[1]
    feature_sums = kept.inverse_j.new_empty(len(features_j), kept.sums_j.shape[1], D)
    energy, similarity, clamped, closeness = empty_means(features_i, means)
    similarity_parts = kept.inverse_i.new_empty(B)
    with torch.cuda.device_of(features_i):
        measure_rows(features_j, kept.inverse_j, feature_sums if center or means else None, None)
        measure_rows(codes_i, kept.code_inverse_i, kept.sums_i, kept.unit_i)
        measure_rows(codes_j, kept.code_inverse_j, kept.sums_j, kept.unit_j)
        add_up_rows(features_i, kept, rule.partner, feature_sums if center or means else None, similarity_parts)
        i_side = Side(features_i, kept.inverse_i, kept.unit_i)
        j_side = Side(features_j, kept.inverse_j, kept.unit_j)
        energy_parts, clamped_parts = walk_tiles(
            i_side, j_side, rule, kept.means, from_i=True, energy=True, clamped=means,
            gradient=kept.rows_i if i_gradient else None,
        )  # fmt: skip
        launch(
            finish_pairs_kernel, (1,), settings=config("finish_pairs", features_i),
            # in
            energy_parts_ptr=energy_parts, similarity_parts_ptr=similarity_parts, clamped_parts_ptr=clamped_parts,
            mean_parts_ptr=kept.mean_parts,
            # out
            energy_ptr=energy, similarity_ptr=similarity, clamped_ptr=clamped, closeness_ptr=closeness,
            # sizes
            parts=energy_parts.numel(), B=B, mean_parts=kept.mean_parts.numel(), share=1.0 / (B * P_i * P_j),
            row_share=1.0 / (B * P_i),
            # switches
            MEANS=means,
        )  # fmt: skip
    return energy, similarity, clamped, closeness, *kept


def empty_means(like: Tensor, means: bool) -> list[Tensor]:
    sizes: list[tuple[int, ...]] = [(), (), *[() if means else (0,)] * 2]
    return [torch.empty(size, dtype=torch.float32, device=like.device) for size in sizes]


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


def add_up_rows(
    features_i: Tensor, kept: Scratch, partner: Tensor | None, feature_sums: Tensor | None, similarity_parts: Tensor
) -> None:
    """Launches the i side's features' lengths, the sums of the codes' cosines, and with feature sums the row means."""
    (B, P, D), Z, sums_i = features_i.shape, kept.sums_i.shape[2], kept.sums_i
    N, Q = kept.inverse_j.shape
    launch(
        row_means_kernel, (kept.mean_parts.shape[1], B), settings=row_settings("row_means", features_i, D),
        # in
        features_ptr=features_i, feature_sums_ptr=or_nothing(feature_sums, sums_i), codes_i_sums_ptr=sums_i,
        codes_j_sums_ptr=kept.sums_j, partner_ptr=or_nothing(partner, sums_i),
        # out
        inverse_ptr=kept.inverse_i, row_means_ptr=kept.row_means, parts_ptr=kept.mean_parts,
        similarity_ptr=similarity_parts,
        # sizes
        N=N, P=P, Q=Q, stride_b=features_i.stride(0), stride_p=features_i.stride(1), D=D, Z=Z,
        SPLITS=kept.sums_j.shape[1], SPLITS_I=sums_i.shape[1], SPLITS_J=kept.sums_j.shape[1],
        BLOCK_D=width_block(D), BLOCK_Z=block_z(Z),
        # switches
        HAS_PARTNER=partner is not None, MEANS=feature_sums is not None,
    )  # fmt: skip


@pair_energy.register_fake
def _(features_i, codes_i, features_j, codes_j, threshold, partner, low, high, hinge, center, means, i_gradient):
    kept = empty_scratch(features_i, codes_i, features_j, codes_j, i_gradient=i_gradient and not means)
    return *empty_means(features_i, means), *kept


@operator("pair_energy_backward")
def pair_energy_backward(
    d_energy: Tensor | None,
    d_similarity: Tensor | None,
    d_clamped: Tensor | None,
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
    means: bool,
    i_gradient: bool,
    j_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of both codes, in their dtypes; empty where not asked for. `kept` is a Scratch."""
    scratch, upstream = Scratch(*kept), Upstream(d_energy, d_similarity, d_clamped)
    d_i, d_j = empty_gradients(codes_i, codes_j, i_gradient, j_gradient)
    features_i, codes_i = with_rows_together(features_i), with_rows_together(codes_i)
    features_j, codes_j = with_rows_together(features_j), with_rows_together(codes_j)
    rule = Rule(threshold, contiguous(partner), low, high, hinge=hinge, center=center)
    share = 1.0 / (features_i.shape[0] * features_i.shape[1] * features_j.shape[1])
    i_side = Side(features_i, scratch.inverse_i, scratch.unit_i)
    j_side = Side(features_j, scratch.inverse_j, scratch.unit_j)

    def through_pairs(mine: Side, other: Side, given: Upstream | None, from_i: bool) -> Tensor | None:
        if d_energy is None and d_clamped is None:
            return None
        rows = scratch.rows_i.new_empty(len(features_i), *mine.unit.shape[1:])
        walk_tiles(mine, other, rule, scratch.means, from_i=from_i, gradient=rows, upstream=given)
        return rows

    with torch.cuda.device_of(features_i):
        if i_gradient:
            rows_i: Tensor | None = scratch.rows_i if d_energy is not None else None
            if means:
                rows_i = through_pairs(i_side, j_side, upstream, from_i=True)
            through_lengths(
                codes_i, scratch.code_inverse_i, d_i, rule.partner, upstream,
                rows=rows_i, sums=scratch.sums_j, B=len(features_i), share=share, unit=not means, from_i=True,
            )  # fmt: skip
        if j_gradient:
            rows_j = through_pairs(j_side, i_side, upstream if means else None, from_i=False)
            through_lengths(
                codes_j, scratch.code_inverse_j, d_j, rule.partner, upstream,
                rows=rows_j, sums=scratch.sums_i, B=len(features_i), share=share, unit=not means, from_i=False,
            )  # fmt: skip
    return d_i, d_j


def through_lengths(
    codes: Tensor, inverse: Tensor, d_codes: Tensor, partner: Tensor | None, upstream: Upstream, *,
    rows: Tensor | None, sums: Tensor, B: int, share: float, unit: bool, from_i: bool,
) -> None:  # fmt: skip
    """Launches the gradient through the codes' lengths.

    `rows` are gradients toward unit codes, for each image of the i side, with `unit` for an upstream gradient of 1;
    `sums` are the other side's.
    """
    images, P, Z = codes.shape
    settings = row_settings("code_gradient", codes, Z)
    launch(
        code_gradient_kernel, (triton.cdiv(P, settings["BLOCK_P"]), images), settings=settings,
        # in
        codes_ptr=codes, inverse_ptr=inverse, rows_ptr=or_nothing(rows, inverse), sums_ptr=sums,
        partner_ptr=or_nothing(partner, inverse),
        d_energy_ptr=or_nothing(upstream.energy, inverse), d_similarity_ptr=or_nothing(upstream.similarity, inverse),
        # out
        d_codes_ptr=d_codes,
        # sizes
        B=B, N=len(sums) if from_i else images, P=P, share=share, stride_b=codes.stride(0), stride_p=codes.stride(1),
        Z=Z, ZP=padded(Z),
        SPLITS=sums.shape[1], BLOCK_B=triton.next_power_of_2(B), BLOCK_Z=block_z(Z),
        # switches
        FROM_I=from_i, HAS_PARTNER=partner is not None,
        HAS_ROWS=rows is not None, HAS_SIMILARITY=upstream.similarity is not None, UNIT=unit,
    )  # fmt: skip


def empty_gradients(codes_i: Tensor, codes_j: Tensor, i_gradient: bool, j_gradient: bool) -> tuple[Tensor, Tensor]:
    def empty(codes: Tensor, asked: bool) -> Tensor:
        return torch.empty(codes.shape if asked else (0,), dtype=codes.dtype, device=codes.device)

    return empty(codes_i, i_gradient), empty(codes_j, j_gradient)


@pair_energy_backward.register_fake
def _(
    d_energy, d_similarity, d_clamped, features_i, codes_i, features_j, codes_j, threshold, partner, kept, low, high,
    hinge, center, means, i_gradient, j_gradient,
):  # fmt: skip
    return empty_gradients(codes_i, codes_j, i_gradient, j_gradient)


def setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output[2:3], *output[4:])
    ctx.rule = dict(zip(("low", "high", "hinge", "center", "means"), inputs[6:11]))


def backward(ctx, d_energy, d_similarity, d_clamped, *_):
    features_i, codes_i, features_j, codes_j, threshold, partner, clamped, *kept = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * 12  # one for each input
    arrived = any(d is not None for d in (d_energy, d_similarity, d_clamped))
    i_gradient, j_gradient = ctx.needs_input_grad[1] and arrived, ctx.needs_input_grad[3] and arrived
    if i_gradient or j_gradient:
        d_i, d_j = pair_energy_backward(
            d_energy=d_energy, d_similarity=d_similarity, d_clamped=d_clamped, features_i=features_i, codes_i=codes_i,
            features_j=features_j, codes_j=codes_j, threshold=threshold, partner=partner, kept=kept,
            i_gradient=i_gradient, j_gradient=j_gradient, **ctx.rule,
        )  # fmt: skip
        gradients[1], gradients[3] = d_i if i_gradient else None, d_j if j_gradient else None
    if ctx.needs_input_grad[4] and d_energy is not None:  # without a hinge, and with means
        gradients[4] = d_energy * clamped
    return tuple(gradients)


refuse_second_of(pair_energy_backward, "pair_energy")
pair_energy.register_autograd(backward, setup_context=setup_context)
