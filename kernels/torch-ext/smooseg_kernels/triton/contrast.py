"""Contrastive losses as registered operators.

Forward: lengths of all rows and unit codes, then the blocks of pairs, which give the sums of every query. Backward: the
blocks once for each side's gradient, and through the codes' lengths. Shapes: codes_i [B,N,Z], codes_j [B,M,Z],
temperature [], labels_i [B,N] and labels_j [B,M] or none, features_i [B,N,D] and features_j [B,M,D] or none, threshold
[B,N] with the features, threshold_j [B,M] and negative_threshold [B,N] or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..derivatives import refuse_second_of
from .contrast_tiles import contrast_gradient_kernel, contrast_sums_kernel
from .launch import (
    block_z,
    config,
    contiguous,
    launch,
    operand,
    operator,
    or_nothing,
    precision,
    with_rows_together,
)
from .pair_rows import code_gradient_kernel
from .pair_walk import code_dtype, padded, width_block
from .pairs import measure_rows, row_settings

# code channels that a program holds: all, or so many at a time
WHOLE_COLUMNS, SLICE_COLUMNS = 128, 64


class Scratch(NamedTuple):
    """Tensors that the forward pass leaves to the backward pass; ZP is Z padded, F is B, or 0 with labels."""

    inverse_i: Tensor  # [F,N] fp32: 1 / |f_i|
    inverse_j: Tensor  # [F,M] fp32
    unit_i: Tensor  # [B,N,ZP] unit codes
    unit_j: Tensor  # [B,M,ZP]
    code_inverse_i: Tensor  # [B,N] fp32: 1 / |c_i|
    code_inverse_j: Tensor  # [B,M] fp32


class Side(NamedTuple):
    """Queries or keys; features or labels are missing."""

    features: Tensor | None  # [B,P,D]
    inverse: Tensor  # [F,P] fp32
    unit: Tensor  # [B,P,ZP]
    labels: Tensor | None  # [B,P]
    threshold: Tensor | None  # [B,P] fp32


class Rule(NamedTuple):
    """How pairs are told apart, apart from what belongs to one side."""

    temperature: Tensor  # []
    negative_threshold: Tensor | None  # [B,N] fp32
    exclude_self: bool
    inside: bool


class Sums(NamedTuple):
    """Sums of every query, [B,N]."""

    log_sum: Tensor
    positive: Tensor
    count: Tensor  # type: ignore[assignment]  # int64; hides tuple.count


def empty_outputs(codes_i: Tensor, codes_j: Tensor, features_i: Tensor | None) -> tuple[Sums, Scratch]:
    (B, N, Z), M = codes_i.shape, codes_j.shape[1]
    with_features = B if features_i is not None else 0
    unit = code_dtype(codes_i, codes_j)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=codes_i.device)

    return Sums(empty(B, N), empty(B, N), empty(B, N, dtype=torch.int64)), Scratch(
        inverse_i=empty(with_features, N),
        inverse_j=empty(with_features, M),
        unit_i=empty(B, N, padded(int(Z)), dtype=unit),
        unit_j=empty(B, M, padded(int(Z)), dtype=unit),
        code_inverse_i=empty(B, N),
        code_inverse_j=empty(B, M),
    )


@operator("contrast")
def contrast(
    codes_i: Tensor,
    codes_j: Tensor,
    temperature: Tensor,
    labels_i: Tensor | None,
    labels_j: Tensor | None,
    features_i: Tensor | None,
    features_j: Tensor | None,
    threshold: Tensor | None,
    threshold_j: Tensor | None,
    negative_threshold: Tensor | None,
    exclude_self: bool,
    inside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the Sums, then the Scratch."""
    sums, kept = empty_outputs(codes_i, codes_j, features_i)
    with torch.cuda.device_of(codes_i):
        measure_rows(with_rows_together(codes_i), kept.code_inverse_i, None, kept.unit_i)
        measure_rows(with_rows_together(codes_j), kept.code_inverse_j, None, kept.unit_j)
        i_side = side_of(features_i, kept.inverse_i, kept.unit_i, labels_i, threshold)
        j_side = side_of(features_j, kept.inverse_j, kept.unit_j, labels_j, threshold_j)
        for side in (i_side, j_side):
            if side.features is not None:
                measure_rows(side.features, side.inverse, None, None)
        rule = Rule(temperature, contiguous(negative_threshold), exclude_self, inside)
        add_up(i_side, j_side, rule, sums)
    return *sums, *kept


def side_of(
    features: Tensor | None, inverse: Tensor, unit: Tensor, labels: Tensor | None, threshold: Tensor | None
) -> Side:
    features = None if features is None else with_rows_together(features)
    return Side(features, inverse, unit, contiguous(labels), contiguous(threshold))


def tile_arguments(mine: Side, other: Side, rule: Rule, kernel: str) -> dict:
    """Returns settings, sizes and switches that both kernels share."""
    features, P, ZP = mine.features, *mine.unit.shape[1:]
    like = mine.unit if features is None or features.dtype != torch.float32 else features  # fp32 takes the room of fp32
    settings = config(kernel, like)
    D = 1 if features is None else features.shape[2]
    settings["BLOCK_D"] = min(settings["BLOCK_D"], width_block(D))
    tiles, resident = triton.cdiv(D, settings["BLOCK_D"]), settings.pop("RESIDENT")
    whole = ZP <= WHOLE_COLUMNS
    return {
        "settings": settings,
        "grid": (triton.cdiv(P, settings["BLOCK_M"]), len(mine.unit)),
        "D": D, "ZP": ZP, "TILES": tiles if features is not None and tiles <= resident else 0,
        "BLOCK_Z": width_block(ZP) if whole else SLICE_COLUMNS,
        "WHOLE": whole, "BY_LABELS": features is None, "BAND": rule.negative_threshold is not None,
        "EXCLUDE_SELF": rule.exclude_self, "INSIDE": rule.inside,
        "FEATURE": operand(mine.unit.dtype if features is None else features.dtype), "CODE": operand(mine.unit.dtype),
        "PRECISION": precision(mine.unit.device),
    }  # fmt: skip


def strides_of(side: Side) -> tuple[int, int]:
    return (0, 0) if side.features is None else (side.features.stride(0), side.features.stride(1))


def add_up(query: Side, key: Side, rule: Rule, sums: Sums) -> None:
    """Launches every block of pairs, and fills the sums of the queries."""
    arguments = tile_arguments(query, key, rule, "contrast_sums")
    nothing = sums.log_sum
    (stride_ib, stride_ip), (stride_jb, stride_jp) = strides_of(query), strides_of(key)
    launch(
        contrast_sums_kernel, arguments.pop("grid"),
        # in
        features_i_ptr=or_nothing(query.features, nothing), inverse_i_ptr=query.inverse, codes_i_ptr=query.unit,
        labels_i_ptr=or_nothing(query.labels, nothing), features_j_ptr=or_nothing(key.features, nothing),
        inverse_j_ptr=key.inverse, codes_j_ptr=key.unit, labels_j_ptr=or_nothing(key.labels, nothing),
        threshold_ptr=or_nothing(query.threshold, nothing), threshold_j_ptr=or_nothing(key.threshold, nothing),
        negative_ptr=or_nothing(rule.negative_threshold, nothing), temperature_ptr=rule.temperature,
        # out
        log_sum_ptr=sums.log_sum, positive_ptr=sums.positive, count_ptr=sums.count,
        # sizes
        N=query.unit.shape[1], M=key.unit.shape[1],
        stride_ib=stride_ib, stride_ip=stride_ip, stride_jb=stride_jb, stride_jp=stride_jp,
        # switches
        HAS_THRESHOLD_J=key.threshold is not None, **arguments,
    )  # fmt: skip


@contrast.register_fake
def _(codes_i, codes_j, temperature, labels_i, labels_j, features_i, *rest):
    sums, kept = empty_outputs(codes_i, codes_j, features_i)
    return *sums, *kept


@operator("contrast_backward")
def contrast_backward(
    d_log_sum: Tensor,
    d_positive: Tensor,
    codes_i: Tensor,
    codes_j: Tensor,
    temperature: Tensor,
    labels_i: Tensor | None,
    labels_j: Tensor | None,
    features_i: Tensor | None,
    features_j: Tensor | None,
    threshold: Tensor | None,
    threshold_j: Tensor | None,
    negative_threshold: Tensor | None,
    kept: Sequence[Tensor],
    exclude_self: bool,
    inside: bool,
    i_gradient: bool,
    j_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of both codes, in their dtypes; empty where not asked for. `kept`: Sums, then Scratch."""
    sums, scratch = Sums(*kept[:3]), Scratch(*kept[3:])
    d_i, d_j = empty_gradients(codes_i, codes_j, i_gradient, j_gradient)
    upstream = (d_log_sum.contiguous(), d_positive.contiguous())
    with torch.cuda.device_of(codes_i):
        query = side_of(features_i, scratch.inverse_i, scratch.unit_i, labels_i, threshold)
        key = side_of(features_j, scratch.inverse_j, scratch.unit_j, labels_j, threshold_j)
        rule = Rule(temperature, contiguous(negative_threshold), exclude_self, inside)
        if i_gradient:
            rows = gradient_rows(query, key, rule, sums, upstream, from_i=True)
            through_lengths(with_rows_together(codes_i), scratch.code_inverse_i, rows, d_i)
        if j_gradient:
            rows = gradient_rows(key, query, rule, sums, upstream, from_i=False)
            through_lengths(with_rows_together(codes_j), scratch.code_inverse_j, rows, d_j)
    return d_i, d_j


def gradient_rows(
    mine: Side, other: Side, rule: Rule, sums: Sums, upstream: tuple[Tensor, Tensor], *, from_i: bool
) -> Tensor:
    """Launches every block of pairs, and returns the gradient [B,P,ZP] toward the unit codes of `mine`."""
    arguments = tile_arguments(mine, other, rule, "contrast_gradient")
    (B, P, ZP), nothing = mine.unit.shape, sums.log_sum
    gradient = nothing.new_empty(B, P, ZP)
    key = other if from_i else mine
    (stride_mb, stride_mp), (stride_ob, stride_op) = strides_of(mine), strides_of(other)
    launch(
        contrast_gradient_kernel, (*arguments.pop("grid"), triton.cdiv(ZP, arguments["BLOCK_Z"])),
        # in
        mine_features_ptr=or_nothing(mine.features, nothing), mine_inverse_ptr=mine.inverse, mine_codes_ptr=mine.unit,
        mine_labels_ptr=or_nothing(mine.labels, nothing), mine_threshold_ptr=or_nothing(mine.threshold, nothing),
        other_features_ptr=or_nothing(other.features, nothing), other_inverse_ptr=other.inverse,
        other_codes_ptr=other.unit, other_labels_ptr=or_nothing(other.labels, nothing),
        other_threshold_ptr=or_nothing(other.threshold, nothing),
        negative_ptr=or_nothing(rule.negative_threshold, nothing), temperature_ptr=rule.temperature,
        log_sum_ptr=sums.log_sum, positive_ptr=sums.positive, count_ptr=sums.count,
        d_log_sum_ptr=upstream[0], d_positive_ptr=upstream[1],
        largest_ptr=torch.maximum(upstream[0].abs().amax(), upstream[1].abs().amax()),
        # out
        gradient_ptr=gradient,
        # sizes
        P=P, Q=other.unit.shape[1],
        stride_mb=stride_mb, stride_mp=stride_mp, stride_ob=stride_ob, stride_op=stride_op,
        # switches
        FROM_I=from_i, HAS_THRESHOLD_J=key.threshold is not None, **arguments,
    )  # fmt: skip
    return gradient


def through_lengths(codes: Tensor, inverse: Tensor, rows: Tensor, d_codes: Tensor) -> None:
    """Launches the gradient through the codes' lengths; `rows` are gradients toward the unit codes."""
    B, P, Z = codes.shape
    settings = row_settings("code_gradient", codes, Z)
    launch(
        code_gradient_kernel, (triton.cdiv(P, settings["BLOCK_P"]), B), settings=settings,
        codes_ptr=codes, inverse_ptr=inverse, rows_ptr=rows, sums_ptr=inverse, partner_ptr=inverse,
        d_energy_ptr=inverse, d_similarity_ptr=inverse, d_codes_ptr=d_codes,
        # the kernel is that of an energy, which has a minus
        B=B, N=B, P=P, share=-1.0, stride_b=codes.stride(0), stride_p=codes.stride(1), Z=Z, ZP=padded(Z), SPLITS=1,
        BLOCK_B=1, BLOCK_Z=block_z(Z),
        FROM_I=True, HAS_PARTNER=False, HAS_ROWS=True, HAS_SIMILARITY=False, UNIT=False,
    )  # fmt: skip


def empty_gradients(codes_i: Tensor, codes_j: Tensor, i_gradient: bool, j_gradient: bool) -> tuple[Tensor, Tensor]:
    def empty(codes: Tensor, asked: bool) -> Tensor:
        return torch.empty(codes.shape if asked else (0,), dtype=codes.dtype, device=codes.device)

    return empty(codes_i, i_gradient), empty(codes_j, j_gradient)


@contrast_backward.register_fake
def _(d_log_sum, d_positive, codes_i, codes_j, *rest):
    return empty_gradients(codes_i, codes_j, *rest[-2:])


def setup_context(ctx, inputs, output):
    *tensors, ctx.exclude_self, ctx.inside = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, d_log_sum, d_positive, *_):
    saved = ctx.saved_tensors  # once: a checkpointed region unpacks no tensor twice
    tensors, kept = saved[:10], saved[10:]
    asked, arrived = ctx.needs_input_grad[:2], d_log_sum is not None or d_positive is not None
    found: tuple = (None, None)
    if arrived and any(asked):
        upstream = [torch.zeros_like(kept[0]) if d is None else d for d in (d_log_sum, d_positive)]
        found = contrast_backward(*upstream, *tensors, list(kept), ctx.exclude_self, ctx.inside, *asked)
    return (*(d if wanted and arrived else None for d, wanted in zip(found, asked)), *[None] * 10)


refuse_second_of(contrast_backward, "contrastive_loss")
contrast.register_autograd(backward, setup_context=setup_context)
