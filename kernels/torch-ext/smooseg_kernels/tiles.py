"""Energies that do not factor, block by block (`impl="torch"`): O(P_i P_j (D + Z)) time, memory of the inputs' size and
one block.

A clamp or a hinge stands between the two similarities of a pair, so every pair must be computed, but none must be kept.
The result is one number, and its gradient is a number times what the same blocks give: they are computed once, for the
energy and both gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .derivatives import refuse_second
from .problem import PairProblem
from .rows import accumulation_dtype, unit_rows

# pairs in one block: a few matrices of this many numbers live at a time, on a CPU in its cache
CPU_PAIRS, GPU_PAIRS = 1 << 20, 1 << 24


class Force(NamedTuple):
    """The factor of a pair's clamped similarity: V_ij = f_i . f_j + bias_i, or max(V_ij, 0) with `hinge`."""

    f_i: Tensor  # [B,P_i,D] unit rows
    f_j: Tensor  # [N,P_j,D] unit rows
    partner: Tensor | None  # int64 [B]
    bias: Tensor  # [B,P_i]
    clamp: tuple[float | None, float | None]
    hinge: bool


def pair_energy(problem: PairProblem) -> tuple[Tensor, Tensor]:
    """Returns energy [] and similarity []."""
    dtype = accumulation_dtype(problem.features_i, problem.codes_i, problem.features_j, problem.codes_j)
    partner, threshold = problem.partner, problem.threshold
    f_i, c_i = unit_rows(problem.features_i.to(dtype)), unit_rows(problem.codes_i.to(dtype))
    f_j = f_i if problem.features_j is problem.features_i else unit_rows(problem.features_j.to(dtype))
    c_j = c_i if problem.codes_j is problem.codes_i else unit_rows(problem.codes_j.to(dtype))
    # means over pairs are products of means over patches
    u_j, s_j = paired(f_j.mean(1), partner), paired(c_j.mean(1), partner)
    similarity = (c_i.mean(1) * s_j).sum(1).mean()
    if problem.center:
        row_means = (f_i @ u_j[..., None]).squeeze(2)
        bias = row_means.mean() - threshold - row_means
    else:
        bias = -threshold.expand(f_i.shape[:2])
    force = Force(f_i, f_j, partner, bias, problem.clamp, problem.hinge)
    if problem.clamp == (None, None) and not problem.hinge:
        return -factored(force, c_i, c_j, s_j), similarity
    total = TiledEnergy.apply(c_i, paired(c_j, partner), *force)
    return total / -(f_i.shape[0] * f_i.shape[1] * f_j.shape[1]), similarity


def paired(values: Tensor, partner: Tensor | None) -> Tensor:
    """Takes [N,...] to the partners' [B,...]. Not by `index_select`: a GPU adds up its gradient in no fixed order."""
    return values if partner is None else values[partner]


def factored(force: Force, c_i: Tensor, c_j: Tensor, s_j: Tensor) -> Tensor:
    """Returns the mean of (f_i . f_j + bias_i) (c_i . c_j) from moments: time linear in P, without clamp and hinge."""
    f_i, f_j = force.f_i, force.f_j
    g_i, g_j = c_i.mT @ f_i / f_i.shape[1], c_j.mT @ f_j / f_j.shape[1]  # [B,Z,D], [N,Z,D]
    inner = (g_i * paired(g_j, force.partner)).sum((1, 2)).mean()
    return inner + (force.bias * (c_i @ s_j[..., None]).squeeze(2)).mean()


class TiledEnergy(torch.autograd.Function):
    """Adds up V_ij clamp(c_i . c_j) for unit rows c_i [B,P_i,Z] and c_j [B,P_j,Z]. Has no second derivatives."""

    @staticmethod
    def forward(ctx, c_i, c_j, f_i, f_j, partner, bias, clamp, hinge):
        force = Force(f_i, f_j, partner, bias, clamp, hinge)
        total, d_i, d_j = sweep(c_i, c_j, force, gradients=ctx.needs_input_grad[:2])
        ctx.save_for_backward(d_i, d_j)
        return total

    @staticmethod
    def backward(ctx, d_total):
        refuse_second("pair_energy", "torch")
        d_i, d_j = (None if d is None else d_total * d for d in ctx.saved_tensors)
        return d_i, d_j, None, None, None, None, None, None


def sweep(
    c_i: Tensor, c_j: Tensor, force: Force, *, gradients: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the sum and its gradients to c_i and c_j; None for a gradient that is not asked for."""
    f_i, f_j, partner, bias, clamp, hinge = force
    (B, P_i, _), P_j = f_i.shape, f_j.shape[1]
    block_pairs = CPU_PAIRS if f_i.device.type == "cpu" else GPU_PAIRS
    images, rows = min(B, max(1, block_pairs // (P_i * P_j))), min(P_i, max(1, block_pairs // P_j))
    d_i, d_j = torch.empty_like(c_i) if gradients[0] else None, torch.zeros_like(c_j) if gradients[1] else None
    # one set of blocks serves all: allocating and freeing each time would leave holes in the heap
    space = [f_i.new_empty(images * rows * P_j) for _ in range(3)]
    total = f_i.new_zeros(())
    for first in range(0, B, images):
        group = slice(first, min(first + images, B))
        other, other_codes = f_j[group] if partner is None else f_j[partner[group]], c_j[group]
        for start in range(0, P_i, rows):
            part = (group, slice(start, min(start + rows, P_i)))
            shape = (group.stop - first, part[1].stop - start, P_j)
            v, likeness, clamped = (block[: shape[0] * shape[1] * P_j].view(shape) for block in space)
            v.copy_(bias[part][..., None].expand(shape)).baddbmm_(f_i[part], other.mT)
            if hinge:
                v.clamp_(min=0.0)
            likeness.baddbmm_(c_i[part], other_codes.mT, beta=0)
            clamped.copy_(likeness)
            if clamp != (None, None):
                clamped.clamp_(*clamp)
            likeness.eq_(clamped)  # 1 between the bounds, or at one
            total += clamped.mul_(v).sum()
            if d_i is not None or d_j is not None:
                v.mul_(likeness)
            if d_i is not None:
                d_i[part] = torch.bmm(v, other_codes)
            if d_j is not None:
                d_j[group].baddbmm_(v.mT, c_i[part])
    return total, d_i, d_j
