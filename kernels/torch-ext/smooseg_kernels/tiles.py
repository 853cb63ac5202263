"""Energies that do not factor, block by block (`impl="torch"`): O(P_i P_j (D + Z)) time, memory of the inputs' size and one block.

A clamp or a hinge stands between the two similarities of a pair, so every pair has to be looked at; none has to be kept. What comes out is
one number, so its gradient is a number times what the same blocks give: they are made once, for the energy and for both gradients.

Arguments come canonical from `api`, as `dense` takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .derivatives import refuse_second
from .rows import accumulation_dtype, unit_rows

# pairs in one block: a few matrices of this many numbers live at a time, on a CPU in its cache
CPU_PAIRS, GPU_PAIRS = 1 << 20, 1 << 24


def pair_energy(features_i, codes_i, features_j, codes_j, threshold, partner, clamp, hinge, center):
    """-> energy [], similarity []."""
    dtype = accumulation_dtype(features_i, codes_i, features_j, codes_j)
    f_i, c_i = unit_rows(features_i.to(dtype)), unit_rows(codes_i.to(dtype))
    f_j = f_i if features_j is features_i else unit_rows(features_j.to(dtype))
    c_j = c_i if codes_j is codes_i else unit_rows(codes_j.to(dtype))
    # means over pairs are products of means over patches
    u_j, s_j = paired(f_j.mean(1), partner), paired(c_j.mean(1), partner)
    similarity = (c_i.mean(1) * s_j).sum(1).mean()
    if center:
        row_means = (f_i @ u_j[..., None]).squeeze(2)
        bias = row_means.mean() - threshold - row_means
    else:
        bias = -threshold.expand(f_i.shape[:2])
    if clamp == (None, None) and not hinge:
        return -factored(f_i, c_i, f_j, c_j, s_j, partner, bias), similarity
    total = TiledEnergy.apply(c_i, paired(c_j, partner), f_i, f_j, partner, bias, clamp, hinge)
    return total / -(f_i.shape[0] * f_i.shape[1] * f_j.shape[1]), similarity


def paired(values: Tensor, partner: Tensor | None) -> Tensor:
    """[N,...] -> [B,...]: what image n meets. Not `index_select`, whose gradient on a GPU is added up in no fixed order."""
    return values if partner is None else values[partner]


def factored(f_i, c_i, f_j, c_j, s_j, partner, bias) -> Tensor:
    """Without clamp and hinge: the mean of (f_i . f_j + bias_i) (c_i . c_j) in time linear in P, from moments."""
    g_i, g_j = c_i.mT @ f_i / f_i.shape[1], c_j.mT @ f_j / f_j.shape[1]  # [B,Z,D], [N,Z,D]
    return (g_i * paired(g_j, partner)).sum((1, 2)).mean() + (bias * (c_i @ s_j[..., None]).squeeze(2)).mean()


class TiledEnergy(torch.autograd.Function):
    """The sum of V_ij clamp(c_i . c_j) over all pairs, for unit rows c_i [B,P_i,Z], c_j [B,P_j,Z], f_i [B,P_i,D], f_j [N,P_j,D]."""

    @staticmethod
    def forward(ctx, c_i, c_j, f_i, f_j, partner, bias, clamp, hinge):
        total, d_i, d_j = sweep(c_i, c_j, f_i, f_j, partner, bias, clamp, hinge, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(d_i, d_j)
        return total

    @staticmethod
    def backward(ctx, d_total):
        refuse_second("pair_energy", "torch")
        d_i, d_j = (None if d is None else d_total * d for d in ctx.saved_tensors)
        return d_i, d_j, None, None, None, None, None, None


def sweep(
    c_i, c_j, f_i, f_j, partner, bias, clamp, hinge, want_i: bool, want_j: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> the sum, and its gradients to c_i and c_j where they are wanted."""
    (B, P_i, _), P_j = f_i.shape, f_j.shape[1]
    pairs = CPU_PAIRS if f_i.device.type == "cpu" else GPU_PAIRS
    images, rows = min(B, max(1, pairs // (P_i * P_j))), min(P_i, max(1, pairs // P_j))
    d_i, d_j = torch.empty_like(c_i) if want_i else None, torch.zeros_like(c_j) if want_j else None
    # one set of blocks for all: made and freed each time, they would leave holes in the heap that nothing else fits
    space = [f_i.new_empty(images * rows * P_j) for _ in range(3)]
    total = f_i.new_zeros(())
    for first in range(0, B, images):
        group = slice(first, min(first + images, B))
        other, other_codes = f_j[group] if partner is None else f_j[partner[group]], c_j[group]
        for start in range(0, P_i, rows):
            part = (group, slice(start, min(start + rows, P_i)))
            shape = (group.stop - first, part[1].stop - start, P_j)
            force, likeness, clamped = (block[: shape[0] * shape[1] * P_j].view(shape) for block in space)
            force.copy_(bias[part][..., None].expand(shape)).baddbmm_(f_i[part], other.mT)
            if hinge:
                force.clamp_(min=0.0)
            likeness.baddbmm_(c_i[part], other_codes.mT, beta=0)
            clamped.copy_(likeness)
            if clamp != (None, None):
                clamped.clamp_(*clamp)
            likeness.eq_(clamped)  # 1 between the bounds, or at one
            total += clamped.mul_(force).sum()
            if want_i or want_j:
                force.mul_(likeness)
            if want_i:
                d_i[part] = torch.bmm(force, other_codes)
            if want_j:
                d_j[group].baddbmm_(force.mT, c_i[part])
    return total, d_i, d_j
