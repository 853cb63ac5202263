"""Energies that do not factor (`impl="torch"`): means that are linear in the patches from moments, pairs in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import pair_blocks
from .pair_means import Pairing, pair_energies, paired, rows_of
from .problem import PairProblem
from .types import PairEnergy


def pair_energy(problem: PairProblem) -> list[PairEnergy]:
    """Returns the results of each pair set."""
    return pair_energies(problem, of_pairs)


def of_pairs(problem: PairProblem, x: Pairing, bias: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the mean of V clamp(c_i . c_j), that of the clamped similarity, and the histogram, where asked for."""
    if problem.clamp != (None, None) or problem.hinge or problem.bins:
        return in_blocks(problem, x, bias)
    energy = factored(problem, x, bias)
    if not problem.means:
        return energy, None, None
    similarity = rows_of(x.i.c, x.c_mean)
    return energy, similarity if problem.rows else x.over_i(similarity), None


def factored(problem: PairProblem, x: Pairing, bias: Tensor) -> Tensor:
    """Returns the mean of (f_i . f_j + bias_i) (c_i . c_j) from moments: time linear in P, without clamp and hinge."""
    # products [B,Z,D] are divided, which are smaller than the rows
    g_j = x.j.c.mT @ x.j.f / x.j.c.shape[1] if x.j.shares is None else (x.j.c * x.j.shares[..., None]).mT @ x.j.f
    g_j = paired(g_j, x.pair_set.partner)
    if problem.rows:
        energy = (x.i.f @ g_j.mT * x.i.c).sum(2)
    elif x.row_weight is None:
        energy = (x.i.c.mT @ x.i.f * g_j).sum() / x.i.f[..., 0].numel()
    else:
        energy = ((x.i.c * x.row_weight[..., None]).mT @ x.i.f * g_j).sum()
    # later, so that its gradient comes first: memory in the order of the rows, to which transposed ones are added
    on_bias = bias * rows_of(x.i.c, x.c_mean)
    return energy + (on_bias if problem.rows else x.over_i(on_bias))


def in_blocks(problem: PairProblem, x: Pairing, bias: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the mean of V clamp(c_i . c_j), that of the clamped similarity, and the histogram, where asked for."""
    c_i, c_j = x.i.c, x.j.c
    (B, P_i, _), P_j = x.i.f.shape, x.j.f.shape[1]
    pairs = (c_i, c_j, x.i.f, x.j.f, x.pair_set.partner, bias)
    gradients = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (c_i, c_j, bias)]
    rule = (*problem.clamp, problem.hinge, problem.means, gradients, problem.bins, list(problem.limits))
    if problem.rows:
        energy, clamped, histogram, *_ = pair_blocks.pair_rows(*pairs, x.column_weight, *rule)
        pairs_in_a_mean = P_j
    else:
        energy, clamped, histogram, *_ = pair_blocks.pair_sums(*pairs, x.row_weight, x.column_weight, *rule)
        pairs_in_a_mean = B * P_i * P_j
    if x.column_weight is None:
        energy, clamped = energy / pairs_in_a_mean, clamped / pairs_in_a_mean
    return energy, clamped if problem.means else None, histogram if problem.bins else None
