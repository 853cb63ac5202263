"""Blocks of patch pairs in plain PyTorch, as registered operators: O(P_i P_j (D + Z)) time, one block of memory.

A clamp or a hinge stands between the two similarities of a pair, so every pair must be computed, but none must be kept.
Sums over all pairs are numbers, and their gradients are a number times what the same blocks give: `pair_sums` computes
them once, for the values and both gradients. Sums over j alone are rows, whose gradients to the j side `pair_rows`
computes in the backward pass. Operators are whole to compilers, so sizes may change and exported programs have
gradients. Shapes: c_i [B,P_i,Z] and f_i [B,P_i,D], c_j [N,P_j,Z] and f_j [N,P_j,D], unit rows; partner int64 [B] or
none; bias [B,P_i]. V_ij = f_i . f_j + bias_i, or max(V_ij, 0) with `hinge`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .derivatives import refuse_second
from .operators import operator
from .products import products

# pairs in one block: a few matrices of this many numbers live at a time, on a CPU in its cache
CPU_PAIRS, GPU_PAIRS = 1 << 20, 1 << 24
# pairs of an image up to which one product for two gradients gains more than joining its factors costs
JOINED_PAIRS = 1 << 15


class Pairs(NamedTuple):
    """The two sides and the rule by which they meet."""

    c_i: Tensor
    c_j: Tensor
    f_i: Tensor
    f_j: Tensor
    partner: Tensor | None
    bias: Tensor
    column_weight: Tensor | None  # [B,P_j]; none for 1
    low: float | None
    high: float | None
    hinge: bool


class Sums(NamedTuple):
    """Sums over j, with the column weights, of every i; empty where not asked for."""

    energy: Tensor  # [B,P_i] of V clamp(c_i . c_j)
    clamped: Tensor  # [B,P_i] of clamp(c_i . c_j)
    slope: Tensor  # [B,P_i] the derivative of `energy` by the bias
    energy_i: Tensor  # [B,P_i,Z] the gradient of `energy` to c_i
    clamped_i: Tensor  # [B,P_i,Z] the gradient of `clamped` to c_i
    energy_j: Tensor  # [N,P_j,Z] the gradient to c_j of the sum of `energy` over i, by its row weights
    clamped_j: Tensor  # [N,P_j,Z] the same of `clamped`
    histogram: Tensor  # int64 [bins] of c_i . c_j


class Asked(NamedTuple):
    """Which sums are asked for."""

    energy: bool = False
    clamped: bool = False
    slope: bool = False
    energy_i: bool = False
    clamped_i: bool = False
    energy_j: Tensor | None = None  # c_i [B,P_i,Z] times the row weights
    clamped_j: Tensor | None = None
    bins: int = 0
    limits: tuple[float, float] = (-1.0, 1.0)


def empty_sums(x: Pairs, asked: Asked) -> Sums:
    def empty(like: Tensor, is_asked: bool) -> Tensor:
        shape = like.shape if is_asked else (0,)
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    return Sums(
        energy=empty(x.bias, asked.energy),
        clamped=empty(x.bias, asked.clamped),
        slope=empty(x.bias, asked.slope),
        energy_i=empty(x.c_i, asked.energy_i),
        clamped_i=empty(x.c_i, asked.clamped_i),
        energy_j=empty(x.c_j, asked.energy_j is not None),
        clamped_j=empty(x.c_j, asked.clamped_j is not None),
        histogram=torch.empty(asked.bins, dtype=torch.int64, device=x.bias.device),
    )


def sweep(x: Pairs, asked: Asked) -> Sums:
    """Goes over all blocks of pairs once."""
    sums = empty_sums(x, asked)
    for total in (sums.energy_j, sums.clamped_j, sums.histogram):
        total.zero_()
    (B, P_i, _), P_j = x.f_i.shape, x.f_j.shape[1]
    block_pairs = CPU_PAIRS if x.f_i.device.type == "cpu" else GPU_PAIRS
    images, rows = min(B, max(1, block_pairs // (P_i * P_j))), min(P_i, max(1, block_pairs // P_j))
    for first in range(0, B, images):
        group = slice(first, min(first + images, B))
        met = torch.arange(B, device=x.bias.device)[group] if x.partner is None else x.partner[group]
        for start in range(0, P_i, rows):
            add_block(x, asked, sums, (group, slice(start, min(start + rows, P_i))), met)
    return sums


def add_block(x: Pairs, asked: Asked, sums: Sums, part: tuple[slice, slice], met: Tensor) -> None:
    """Computes one block of pairs, with the images `met`, and adds it to the sums."""
    weight = None if x.column_weight is None else x.column_weight[part[0]][..., None]

    def over_j(block: Tensor) -> Tensor:
        return block.sum(2) if weight is None else torch.bmm(block, weight)[..., 0]

    likeness = products(x.c_i[part], x.c_j, met)
    if asked.bins:
        sums.histogram.add_(histogram(likeness.clone(), asked))
    clamped = likeness.clamp(x.low, x.high) if x.low is not None or x.high is not None else likeness.clone()
    if asked.clamped:
        sums.clamped[part] = over_j(clamped)
    passes = likeness.eq_(clamped)  # 1 between the bounds, or at one
    gradients = []
    if asked.energy or asked.energy_i or asked.slope or asked.energy_j is not None:
        v = products(x.f_i[part], x.f_j, met).add_(x.bias[part][..., None])
        if asked.slope:
            sums.slope[part] = over_j(clamped * (v >= 0) if x.hinge else clamped)
        if x.hinge:
            v.clamp_(min=0.0)
        if asked.energy:
            sums.energy[part] = over_j(clamped.mul_(v))
        if asked.energy_i or asked.energy_j is not None:
            gradients.append(Gradient(v.mul_(passes), sums.energy_i, asked.energy_j, sums.energy_j))
    del clamped
    if asked.clamped_i or asked.clamped_j is not None:
        gradients.append(Gradient(passes, sums.clamped_i, asked.clamped_j, sums.clamped_j))
    if weight is not None:
        for gradient in gradients:
            gradient.block.mul_(weight.mT)
    small = passes[0].numel() <= JOINED_PAIRS
    if small and len(gradients) == 2 and asked.energy_j is asked.clamped_j:
        add_gradients(x, gradients, part, met)
    else:
        for gradient in gradients:
            add_gradients(x, [gradient], part, met)


class Gradient(NamedTuple):
    """The factors of one block of pairs in a gradient, and where it goes; empty or none where not asked for."""

    block: Tensor  # [images,rows,P_j]
    toward_i: Tensor  # [B,P_i,Z]
    c_i: Tensor | None  # [B,P_i,Z] times the row weights
    toward_j: Tensor  # [N,P_j,Z]


def add_gradients(x: Pairs, gradients: list[Gradient], part: tuple[slice, slice], met: Tensor) -> None:
    """Multiplies blocks of factors with both sides' codes; blocks of several gradients have the same c_i."""
    one = gradients[0].block[:, :, None]
    blocks = one if len(gradients) == 1 else torch.stack([gradient.block for gradient in gradients], 2)
    if gradients[0].toward_i.numel():
        rows = products(blocks.flatten(1, 2), x.c_j.mT, met).unflatten(1, blocks.shape[1:3])
        for gradient, toward in zip(gradients, rows.unbind(2)):
            gradient.toward_i[part] = toward
    c_i = gradients[0].c_i
    if c_i is None:
        return
    columns = products(c_i[part].mT, blocks.flatten(2).mT).unflatten(2, blocks.shape[2:])
    for gradient, toward in zip(gradients, columns.unbind(2)):
        if x.partner is None:
            gradient.toward_j[part[0]] += toward.mT
        else:  # adds up in a fixed order, also on a GPU
            gradient.toward_j.index_put_((met,), toward.mT, accumulate=True)


def histogram(likeness: Tensor, asked: Asked) -> Tensor:
    """Counts the pairs of a block in int64 [bins]. Overwrites it."""
    low, high = asked.limits
    places = likeness.sub_(low).mul_(asked.bins / (high - low)).clamp_(0, asked.bins - 1).to(torch.int32)
    if places.device.type == "cpu":  # eight times as fast as adding ones
        return torch.bincount(places.flatten(), minlength=asked.bins)
    counts = torch.zeros(asked.bins, dtype=torch.int64, device=places.device)
    return counts.scatter_add_(0, places.long().flatten(), torch.ones_like(places, dtype=torch.int64).flatten())


def by_rows(c_i: Tensor, weight: Tensor | None) -> Tensor:
    return c_i if weight is None else c_i * weight[..., None]


def asked_of_sums(
    c_i: Tensor, row_weight: Tensor | None, means: bool, gradients: list[bool], bins: int, limits: list[float]
) -> Asked:
    i, j, slope = gradients
    side = by_rows(c_i, row_weight) if j else None
    return Asked(
        energy=True,
        clamped=means,
        slope=slope,
        energy_i=i,
        clamped_i=i and means,
        energy_j=side,
        clamped_j=side if means else None,
        bins=bins,
        limits=(limits[0], limits[1]),
    )


@operator("pair_sums")
def pair_sums(
    c_i: Tensor,
    c_j: Tensor,
    f_i: Tensor,
    f_j: Tensor,
    partner: Tensor | None,
    bias: Tensor,
    row_weight: Tensor | None,
    column_weight: Tensor | None,
    low: float | None,
    high: float | None,
    hinge: bool,
    means: bool,
    gradients: list[bool],
    bins: int,
    limits: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the sums of energy [] and clamped similarity [] over all pairs, histogram, slope and the gradients.

    `means` asks for the clamped similarity, `gradients` for those to c_i, c_j and the bias. Has no second derivatives.
    """
    asked = asked_of_sums(c_i, row_weight, means, gradients, bins, limits)
    sums = sweep(Pairs._make((c_i, c_j, f_i, f_j, partner, bias, column_weight, low, high, hinge)), asked)

    def over_i(rows: Tensor) -> Tensor:
        return (rows if row_weight is None else rows * row_weight).sum()

    if row_weight is not None:
        for rows in (sums.slope, sums.energy_i, sums.clamped_i):
            if rows.numel():
                rows.mul_(row_weight if rows.dim() == 2 else row_weight[..., None])
    clamped = over_i(sums.clamped) if means else bias.new_empty(0)
    return over_i(sums.energy), clamped, sums.histogram, *sums[2:7]


@pair_sums.register_fake
def _(
    c_i, c_j, f_i, f_j, partner, bias, row_weight, column_weight, low, high, hinge, means, gradients, bins, limits
):  # fmt: skip
    asked = asked_of_sums(c_i, row_weight, means, gradients, bins, limits)
    sums = empty_sums(Pairs._make((c_i, c_j, f_i, f_j, partner, bias, column_weight, low, high, hinge)), asked)
    return bias.new_empty(()), bias.new_empty(() if means else 0), sums.histogram, *sums[2:7]


def keep_gradients(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])


def backward_of_sums(ctx, d_energy, d_clamped, *_):
    refuse_second("pair_energy", "torch")
    slope, energy_i, clamped_i, energy_j, clamped_j = ctx.saved_tensors
    needs = ctx.needs_input_grad

    def both(energy: Tensor, clamped: Tensor) -> Tensor | None:
        return added(
            None if d_energy is None else d_energy * energy, None if d_clamped is None else d_clamped * clamped
        )

    d_bias = d_energy * slope if needs[5] and d_energy is not None else None
    d_i, d_j = both(energy_i, clamped_i) if needs[0] else None, both(energy_j, clamped_j) if needs[1] else None
    return d_i, d_j, None, None, None, d_bias, *(None,) * 9


def times(upstream: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if upstream is None else upstream * gradient


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


pair_sums.register_autograd(backward_of_sums, setup_context=keep_gradients)


@operator("pair_rows")
def pair_rows(
    c_i: Tensor,
    c_j: Tensor,
    f_i: Tensor,
    f_j: Tensor,
    partner: Tensor | None,
    bias: Tensor,
    column_weight: Tensor | None,
    low: float | None,
    high: float | None,
    hinge: bool,
    means: bool,
    gradients: list[bool],
    bins: int,
    limits: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the sums over j, energy [B,P_i] and clamped similarity [B,P_i], histogram, slope, gradients to c_i."""
    asked = asked_of_sums(c_i, None, means, [gradients[0], False, gradients[2]], bins, limits)
    sums = sweep(Pairs._make((c_i, c_j, f_i, f_j, partner, bias, column_weight, low, high, hinge)), asked)
    return sums.energy, sums.clamped, sums.histogram, sums.slope, sums.energy_i, sums.clamped_i


@pair_rows.register_fake
def _(c_i, c_j, f_i, f_j, partner, bias, column_weight, low, high, hinge, means, gradients, bins, limits):
    asked = asked_of_sums(c_i, None, means, [gradients[0], False, gradients[2]], bins, limits)
    sums = empty_sums(Pairs._make((c_i, c_j, f_i, f_j, partner, bias, column_weight, low, high, hinge)), asked)
    return sums.energy, sums.clamped, sums.histogram, sums.slope, sums.energy_i, sums.clamped_i


@operator("pair_rows_backward")
def pair_rows_backward(
    d_energy: Tensor | None,
    d_clamped: Tensor | None,
    c_i: Tensor,
    c_j: Tensor,
    f_i: Tensor,
    f_j: Tensor,
    partner: Tensor | None,
    bias: Tensor,
    column_weight: Tensor | None,
    low: float | None,
    high: float | None,
    hinge: bool,
) -> Tensor:
    """Returns the gradient to c_j for upstream gradients [B,P_i], from the blocks once more."""
    x = Pairs._make((c_i, c_j, f_i, f_j, partner, bias, column_weight, low, high, hinge))
    energy_j, clamped_j = (None if d is None else by_rows(c_i, d) for d in (d_energy, d_clamped))
    sums = sweep(x, Asked(energy_j=energy_j, clamped_j=clamped_j))
    if clamped_j is None:
        return sums.energy_j
    return sums.clamped_j if energy_j is None else sums.energy_j.add_(sums.clamped_j)


@pair_rows_backward.register_fake
def _(d_energy, d_clamped, c_i, c_j, f_i, f_j, partner, bias, column_weight, low, high, hinge):
    return torch.empty_like(c_j, memory_format=torch.contiguous_format)


def keep_pairs(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output[3:])
    ctx.rule = inputs[7:10]


def backward_of_rows(ctx, d_energy, d_clamped, *_):
    refuse_second("pair_energy", "torch")
    *pairs, slope, energy_i, clamped_i = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_i = d_j = d_bias = None
    if needs[0]:
        d_i = added(
            None if d_energy is None else by_rows(energy_i, d_energy),
            None if d_clamped is None else by_rows(clamped_i, d_clamped),
        )
    if needs[1] and not (d_energy is None and d_clamped is None):
        d_j = pair_rows_backward(d_energy, d_clamped, *pairs, *ctx.rule)
    if needs[5] and d_energy is not None:
        d_bias = d_energy * slope
    return d_i, d_j, None, None, None, d_bias, *(None,) * 8


pair_rows.register_autograd(backward_of_rows, setup_context=keep_pairs)
