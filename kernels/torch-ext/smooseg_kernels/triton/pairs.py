"""Clamped energies of patch pairs as registered operators.

Forward: the lengths and means that are linear in the patches, then the blocks of pairs, which leave the energy and, as it is one number,
the i side's gradient for an upstream gradient of 1. Backward: the blocks once more for the j side, and through the codes' lengths.
Shapes: features_i [B,P_i,D], codes_i [B,P_i,Z], features_j [N,P_j,D], codes_j [N,P_j,Z], partner [B] or none, threshold [].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .launch import block_z, config, launch, operand, operator, precision, with_rows_together
from .pair_rows import code_gradient_kernel, finish_pairs_kernel, row_means_kernel, unit_rows_kernel
from .pair_tiles import pair_tiles_kernel

# code channels whose gradient one launch holds in registers: all, or so many at a time
GRADIENT_COLUMNS, GRADIENT_SLICE = 128, 64
ROW_ELEMENTS = 8192  # of a tile of whole rows


def width_block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def padded(Z: int) -> int:
    """Unit codes are kept in rows of whole 16 columns: no load of theirs needs a mask, and all are aligned."""
    return -(-Z // 16) * 16


def pieces(columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A multiple of 16 as powers of two, the widest first -> where they start, and their widths."""
    starts, widths, start = [], [], 0
    while start < columns:
        width = 1 << ((columns - start).bit_length() - 1)
        starts.append(start)
        widths.append(width)
        start += width
    return tuple(starts), tuple(widths)


def code_dtype(codes_i: Tensor, codes_j: Tensor) -> torch.dtype:
    """Of unit codes: fp16 is finer than bf16 where nothing exceeds 1."""
    return torch.float32 if torch.float32 in (codes_i.dtype, codes_j.dtype) else torch.float16


def row_settings(kernel: str, like: Tensor, *widths: int) -> dict[str, int]:
    """Fewer rows to a program where they are wide."""
    settings = config(kernel, like)
    return {**settings, "BLOCK_P": max(1, min(settings["BLOCK_P"], ROW_ELEMENTS // max(map(width_block, widths))))}


def mean_parts(features_i: Tensor) -> int:
    """Programs of `row_means` for one image."""
    block = row_settings("row_means", features_i, int(features_i.shape[2]))["BLOCK_P"]
    return (features_i.shape[1] + block - 1) // block


def scratch(
    features_i: Tensor, codes_i: Tensor, features_j: Tensor, codes_j: Tensor, i_gradient: bool
) -> tuple[Tensor, ...]:
    """inverse_i, inverse_j: 1 / |f|; unit_i, unit_j; code_inverse_i, code_inverse_j; sums_i, sums_j; row_means, mean_parts; rows_i."""
    (B, P_i, Z), (N, P_j, _) = codes_i.shape, codes_j.shape
    ZP, splits = padded(int(Z)), config("unit_rows", features_i)["SPLITS"]
    unit = code_dtype(codes_i, codes_j)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=features_i.device)

    return (
        empty(B, P_i),
        empty(N, P_j),
        empty(B, P_i, ZP, dtype=unit),
        empty(N, P_j, ZP, dtype=unit),
        empty(B, P_i),
        empty(N, P_j),
        empty(B, splits, Z),
        empty(N, splits, Z),
        empty(B, P_i),
        empty(B, mean_parts(features_i)),
        empty(B if i_gradient else 0, P_i, ZP),
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
    """-> energy [], similarity [], then the scratch that the backward reads."""
    kept = scratch(features_i, codes_i, features_j, codes_j, i_gradient)
    inverse_i, inverse_j, unit_i, unit_j, code_inverse_i, code_inverse_j, sums_i, sums_j, row_means, parts, rows_i = (
        kept
    )
    features_i, codes_i, features_j, codes_j = (
        with_rows_together(x) for x in (features_i, codes_i, features_j, codes_j)
    )
    partner = None if partner is None else partner.contiguous()
    (B, P_i, D), (N, P_j, _), Z = features_i.shape, features_j.shape, codes_i.shape[2]
    feature_sums = inverse_j.new_empty(N, sums_j.shape[1], D)
    energy, similarity = inverse_i.new_empty(()), inverse_i.new_empty(())
    similarity_parts = inverse_i.new_empty(B)
    with torch.cuda.device_of(features_i):
        measure_rows(features_j, inverse_j, feature_sums if center else None, None)
        measure_rows(codes_i, code_inverse_i, sums_i, unit_i)
        measure_rows(codes_j, code_inverse_j, sums_j, unit_j)
        launch(
            row_means_kernel,
            (parts.shape[1], B),
            features_i,
            feature_sums,
            sums_i,
            sums_j,
            sums_i if partner is None else partner,
            inverse_i,
            row_means,
            parts,
            similarity_parts,
            N,
            P_i,
            P_j,
            *features_i.stride()[:2],
            D=D,
            Z=Z,
            SPLITS=feature_sums.shape[1],
            SPLITS_I=sums_i.shape[1],
            SPLITS_J=sums_j.shape[1],
            HAS_PARTNER=partner is not None,
            CENTER=center,
            BLOCK_D=width_block(D),
            BLOCK_Z=block_z(Z),
            settings=row_settings("row_means", features_i, D),
        )
        i_side, j_side = (features_i, inverse_i, unit_i), (features_j, inverse_j, unit_j)
        energy_parts = walk_tiles(
            i_side,
            j_side,
            partner,
            row_means,
            parts,
            threshold,
            low,
            high,
            hinge,
            center,
            rows_i if i_gradient else None,
            from_i=True,
        )
        launch(
            finish_pairs_kernel,
            (1,),
            energy_parts,
            similarity_parts,
            energy,
            similarity,
            energy_parts.numel(),
            B,
            1.0 / (B * P_i * P_j),
            settings=config("finish_pairs", features_i),
        )
    return energy, similarity, *kept


def measure_rows(rows: Tensor, inverse: Tensor, sums: Tensor | None, unit: Tensor | None) -> None:
    B, P, W = rows.shape
    settings = row_settings("unit_rows", rows, W)
    splits = settings.pop("SPLITS")
    launch(
        unit_rows_kernel,
        (splits, B),
        rows,
        inverse,
        inverse if sums is None else sums,
        inverse if unit is None else unit,
        P,
        *rows.stride()[:2],
        W=W,
        WP=W if unit is None else unit.shape[2],
        SUMS=sums is not None,
        WRITE=unit is not None,
        BLOCK_W=width_block(W),
        settings=settings,
    )


def tile_settings(features: Tensor, codes: Tensor, rows: int) -> tuple[dict[str, int], int, bool]:
    """-> settings; TILES, the feature tiles of a program's rows that stay on chip; whether their codes do. `rows` of all images."""
    like = features if features.dtype == torch.float32 else codes  # fp32 on either side takes the room of fp32
    settings = config("pair_tiles", like)
    if rows < settings.pop("PROGRAMS") * settings["BLOCK_M"]:
        settings = config("few_pair_tiles", like)
    settings["BLOCK_D"] = min(settings["BLOCK_D"], width_block(features.shape[2]))
    tiles = -(-features.shape[2] // settings["BLOCK_D"])
    resident = settings.pop("RESIDENT")
    return settings, tiles if tiles <= resident else 0, resident > 0 and codes.shape[2] <= GRADIENT_COLUMNS


def walk_tiles(
    mine, other, partner, row_means, parts, threshold, low, high, hinge, center, gradient, from_i: bool
) -> Tensor:
    """Every block of pairs of `mine` with `other`, each (features, inverse, unit codes) -> parts of the energy; fills `gradient`.

    Codes wider than one launch holds take one for each slice; only the first adds up the energy.
    """
    (mine_features, mine_inverse, mine_unit), (other_features, other_inverse, other_unit) = mine, other
    B, P, Q, ZP = row_means.shape[0], mine_inverse.shape[1], other_inverse.shape[1], mine_unit.shape[2]
    N = other_inverse.shape[0] if from_i else mine_inverse.shape[0]
    settings, tiles, whole = tile_settings(mine_features, mine_unit, B * P)
    blocks = triton.cdiv(P, settings["BLOCK_M"])
    energy = mine_inverse.new_empty(B, blocks)
    step = ZP if ZP <= GRADIENT_COLUMNS else GRADIENT_SLICE
    for first in range(0, ZP if gradient is not None else 1, step):
        starts, widths = pieces(min(ZP - first, step)) if whole or gradient is not None else ((), ())
        launch(
            pair_tiles_kernel,
            (blocks, B),
            mine_features,
            mine_inverse,
            mine_unit,
            other_features,
            other_inverse,
            other_unit,
            mine_inverse if partner is None else partner,
            row_means,
            parts,
            threshold,
            energy,
            energy if gradient is None else gradient,
            N,
            P,
            Q,
            parts.numel(),
            float(row_means.numel()),
            0.0 if low is None else low,
            0.0 if high is None else high,
            first,
            *mine_features.stride()[:2],
            *other_features.stride()[:2],
            D=mine_features.shape[2],
            ZP=ZP,
            STARTS=starts,
            WIDTHS=widths,
            PIECES=len(starts),
            ALL_PIECES=whole,
            FROM_I=from_i,
            HAS_PARTNER=partner is not None,
            CENTER=center,
            HINGE=hinge,
            HAS_LOW=low is not None,
            HAS_HIGH=high is not None,
            ENERGY=from_i and first == 0,
            GRADIENT=gradient is not None,
            TILES=tiles,
            BLOCK_Z=min(32, width_block(ZP)),
            FEATURE=operand(mine_features.dtype),
            CODE=operand(mine_unit.dtype),
            PRECISION=precision(mine_features.device),
            settings=settings,
        )
    return energy


@pair_energy.register_fake
def _(features_i, codes_i, features_j, codes_j, threshold, partner, low, high, hinge, center, i_gradient):
    kept = scratch(features_i, codes_i, features_j, codes_j, i_gradient)
    return kept[0].new_empty(()), kept[0].new_empty(()), *kept


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
    """-> the gradients of both codes, in their dtypes; empty where not asked for."""
    inverse_i, inverse_j, unit_i, unit_j, code_inverse_i, code_inverse_j, sums_i, sums_j, row_means, parts, rows_i = (
        kept
    )
    d_i, d_j = empty_gradients(codes_i, codes_j, i_gradient, j_gradient)
    features_i, codes_i, features_j, codes_j = (
        with_rows_together(x) for x in (features_i, codes_i, features_j, codes_j)
    )
    partner = None if partner is None else partner.contiguous()
    with torch.cuda.device_of(features_i):
        if i_gradient:
            through_lengths(
                codes_i, code_inverse_i, rows_i, sums_j, partner, d_energy, d_similarity, d_i, features_j, from_i=True
            )
        if j_gradient:
            rows_j = rows_i.new_empty(
                row_means.shape[0] if d_energy is not None else 0, codes_j.shape[1], unit_j.shape[2]
            )
            if d_energy is not None:
                i_side, j_side = (features_i, inverse_i, unit_i), (features_j, inverse_j, unit_j)
                walk_tiles(
                    j_side, i_side, partner, row_means, parts, threshold, low, high, hinge, center, rows_j, from_i=False
                )
            through_lengths(
                codes_j, code_inverse_j, rows_j, sums_i, partner, d_energy, d_similarity, d_j, features_i, from_i=False
            )
    return d_i, d_j


def through_lengths(
    codes, inverse, rows, sums, partner, d_energy, d_similarity, d_codes, other_features, from_i: bool
) -> None:
    """`rows` are gradients toward unit codes, of each image of the i side; `sums` the other side's."""
    images, P, Z = codes.shape
    B, N = (images, other_features.shape[0]) if from_i else (other_features.shape[0], images)
    settings = row_settings("code_gradient", codes, Z)
    launch(
        code_gradient_kernel,
        (triton.cdiv(P, settings["BLOCK_P"]), images),
        codes,
        inverse,
        rows,
        sums,
        inverse if partner is None else partner,
        inverse if d_energy is None else d_energy,
        inverse if d_similarity is None else d_similarity,
        d_codes,
        B,
        N,
        P,
        1.0 / (B * P * other_features.shape[1]),
        *codes.stride()[:2],
        Z=Z,
        ZP=padded(Z),
        SPLITS=sums.shape[1],
        FROM_I=from_i,
        HAS_PARTNER=partner is not None,
        HAS_ENERGY=d_energy is not None,
        HAS_SIMILARITY=d_similarity is not None,
        BLOCK_B=triton.next_power_of_2(B),
        BLOCK_Z=block_z(Z),
        settings=settings,
    )


def empty_gradients(codes_i: Tensor, codes_j: Tensor, i_gradient: bool, j_gradient: bool) -> tuple[Tensor, Tensor]:
    return tuple(
        torch.empty(codes.shape if wanted else (0,), dtype=codes.dtype, device=codes.device)
        for codes, wanted in ((codes_i, i_gradient), (codes_j, j_gradient))
    )


@pair_energy_backward.register_fake
def _(
    d_energy, d_similarity, features_i, codes_i, features_j, codes_j, threshold, partner, kept, low, high, hinge, center, i_gradient,
    j_gradient,
):  # fmt: skip
    return empty_gradients(codes_i, codes_j, i_gradient, j_gradient)


def setup_context(ctx, inputs, output):
    features_i, codes_i, features_j, codes_j, threshold, partner, ctx.low, ctx.high, ctx.hinge, ctx.center, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features_i, codes_i, features_j, codes_j, threshold, partner, *output[2:])


def backward(ctx, d_energy, d_similarity, *_):
    features_i, codes_i, features_j, codes_j, threshold, partner, *kept = ctx.saved_tensors
    gradients, asked = [None] * 11, d_energy is not None or d_similarity is not None
    want_i, want_j = ctx.needs_input_grad[1] and asked, ctx.needs_input_grad[3] and asked
    if want_i or want_j:
        d_i, d_j = pair_energy_backward(
            d_energy, d_similarity, features_i, codes_i, features_j, codes_j, threshold, partner, kept, ctx.low, ctx.high, ctx.hinge,
            ctx.center, want_i, want_j,
        )  # fmt: skip
        gradients[1], gradients[3] = d_i if want_i else None, d_j if want_j else None
    return tuple(gradients)


pair_energy.register_autograd(backward, setup_context=setup_context)
