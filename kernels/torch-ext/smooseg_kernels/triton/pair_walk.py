"""Launches of the blocks of patch pairs, for energies of all pairs and for rows of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .launch import config, launch, operand, or_nothing, precision
from .pair_tiles import pair_tiles_kernel

# code channels whose gradient one launch holds in registers: all, or so many at a time
GRADIENT_COLUMNS, GRADIENT_SLICE = 128, 64


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


class Upstream(NamedTuple):
    """Gradients that arrive in the backward pass."""

    energy: Tensor | None  # []
    similarity: Tensor | None  # []
    clamped: Tensor | None  # []


class Means(NamedTuple):
    """The measured means in V_ij = S_ij - row_means_i + M - threshold, with M from the parts."""

    row_means: Tensor  # [B,P_i] fp32: mean_j S_ij
    parts: Tensor  # [B,parts] fp32: they add up to the sum of all row means


class Given(NamedTuple):
    """Takes the place of measured means: any bias, weights, and a row of results in place of a sum."""

    row_means: Tensor  # [B,P_i] fp32: -bias
    weight: Tensor | None  # [B,Q] of the other side
    similarity_alone: bool  # V is 1


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


def tile_settings(features: Tensor, codes: Tensor, rows: int) -> tuple[dict[str, int], int, bool]:
    """Returns settings, the feature tiles of a program's rows that stay on chip (TILES), and whether its codes stay
    there.

    `rows` counts the rows of all images.
    """
    like = features if features.dtype == torch.float32 else codes  # fp32 on either side takes the room of fp32
    settings = config("pair_tiles", like)
    wide_codes = codes.shape[2] > GRADIENT_COLUMNS
    if wide_codes or rows < settings.pop("PROGRAMS") * settings["BLOCK_M"]:
        settings = config("few_pair_tiles", like)
    # larger blocks for features that do not stay on chip, but not where codes do not stay either
    if not wide_codes and 0 < settings["RESIDENT"] < feature_tiles(features, settings):
        settings = config("wide_pair_tiles", like)
    settings.pop("PROGRAMS", None)
    tiles, resident = feature_tiles(features, settings), settings.pop("RESIDENT")
    settings["BLOCK_D"] = min(settings["BLOCK_D"], width_block(features.shape[2]))
    return settings, tiles if tiles <= resident else 0, resident > 0 and not wide_codes


def feature_tiles(features: Tensor, settings: dict[str, int]) -> int:
    return -(-features.shape[2] // min(settings["BLOCK_D"], width_block(features.shape[2])))


def walk_tiles(
    mine: Side, other: Side, rule: Rule, means: Means | Given, *, from_i: bool,
    energy: bool = False, clamped: bool = False, gradient: Tensor | None = None, upstream: Upstream | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches every block of pairs of `mine` with `other`; fills `gradient` where it is given.

    The gradient is that of sum V clamp(c.c') to my unit codes, or with `upstream` that of the energy and the clamped
    similarity together. Codes wider than one launch holds take a launch for each slice.

    Returns: what `energy` and `clamped` ask for, in parts: sums of V clamp(c.c') and of clamp(c.c'). With Given the
    first are rows.
    """
    B, P, Q, ZP = means.row_means.shape[0], mine.inverse.shape[1], other.inverse.shape[1], mine.unit.shape[2]
    rows = B * P if isinstance(means, Means) else 0  # weights need registers, which the smaller tiles leave
    settings, tiles, resident_codes = tile_settings(mine.features, mine.unit, rows)
    blocks = triton.cdiv(P, settings["BLOCK_M"])
    parts, options = means.row_means, dict[str, bool | Tensor]()
    energies = mine.inverse.new_empty(B, blocks)
    similarities = torch.empty_like(energies) if clamped else energies
    if isinstance(means, Given):
        energies, tiles = mine.inverse.new_empty(B, P), 0 if means.similarity_alone else tiles
        options = {"GIVEN": True, "HAS_WEIGHT": means.weight is not None, "SIMILARITY_ALONE": means.similarity_alone}
        options["weight_ptr"] = or_nothing(means.weight, energies)
    else:
        parts = means.parts
    if upstream is not None:
        options |= {"UPSTREAM": True, "D_ENERGY": upstream.energy is not None}
        options |= {"D_CLAMPED": upstream.clamped is not None}
        options["d_energy_ptr"] = or_nothing(upstream.energy, energies)
        options["d_clamped_ptr"] = or_nothing(upstream.clamped, energies)
    step = ZP if ZP <= GRADIENT_COLUMNS else GRADIENT_SLICE
    for first in range(0, ZP if gradient is not None else 1, step):
        starts, widths = pieces(min(ZP - first, step)) if resident_codes or gradient is not None else ((), ())
        launch(
            pair_tiles_kernel, (blocks, B), settings=settings,
            # in
            mine_features_ptr=mine.features, mine_inverse_ptr=mine.inverse, mine_codes_ptr=mine.unit,
            other_features_ptr=other.features, other_inverse_ptr=other.inverse, other_codes_ptr=other.unit,
            partner_ptr=or_nothing(rule.partner, mine.inverse), row_means_ptr=means.row_means,
            mean_parts_ptr=parts, threshold_ptr=rule.threshold,
            # out
            energy_ptr=energies, clamped_ptr=similarities, gradient_ptr=or_nothing(gradient, energies),
            # sizes
            N=len(other.inverse) if from_i else len(mine.inverse), P=P, Q=Q, parts=parts.numel(),
            row_mean_count=float(means.row_means.numel()), low=0.0 if rule.low is None else rule.low,
            high=0.0 if rule.high is None else rule.high, first_column=first,
            stride_mb=mine.features.stride(0), stride_mp=mine.features.stride(1),
            stride_ob=other.features.stride(0), stride_op=other.features.stride(1),
            D=mine.features.shape[2], ZP=ZP, STARTS=starts, WIDTHS=widths, PIECES=len(starts), TILES=tiles,
            BLOCK_Z=min(32, width_block(ZP)),
            # switches
            ALL_PIECES=resident_codes, FROM_I=from_i, HAS_PARTNER=rule.partner is not None, CENTER=rule.center,
            HINGE=rule.hinge, HAS_LOW=rule.low is not None, HAS_HIGH=rule.high is not None,
            ZERO_MOVES=(rule.low or 0.0) > 0 or (rule.high or 0.0) < 0,
            ENERGY=energy and first == 0, CLAMPED=clamped and first == 0, GRADIENT=gradient is not None,
            FEATURE=operand(mine.features.dtype), CODE=operand(mine.unit.dtype),
            PRECISION=precision(mine.features.device),
            **options,
        )  # fmt: skip
    return energies, similarities
