"""The parts of `pair_energy` that are linear in the patches: unit rows, weights, means, centring."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import PairProblem, PairSet
from .rows import accumulation_dtype, unit_rows
from .types import PairEnergy


class Side(NamedTuple):
    """One side of the pairs in unit rows, and its means over patches."""

    f: Tensor  # [images,P,D]
    c: Tensor  # [images,P,Z]
    shares: Tensor | None  # [images,P] weights that add up to 1 over an image, or 0; none for equal ones


class Pairing(NamedTuple):
    """The two sides of one pair set."""

    i: Side
    j: Side
    f_mean: Tensor  # [B,D] the weighted mean of the unit features that an image meets
    c_mean: Tensor  # [B,Z]
    row_weight: Tensor | None  # [B,P_i] adds up to 1 over the batch
    column_weight: Tensor | None  # [B,P_j] adds up to 1 over an image
    pair_set: PairSet

    def over_i(self, rows: Tensor) -> Tensor:
        """Takes the mean over the patches [B,P_i] of the i side."""
        return rows.mean() if self.row_weight is None else (rows * self.row_weight).sum()


InBlocks = Callable[[PairProblem, "Pairing", Tensor], tuple[Tensor, Tensor | None, Tensor | None]]


def pair_energies(problem: PairProblem, in_blocks: InBlocks) -> list[PairEnergy]:
    """Returns the results of each pair set.

    `in_blocks` takes a problem, its pairing and the bias [B,P_i] of V_ij = f_i . f_j + bias_i. It returns the mean of
    V clamp(c_i . c_j), and where asked for that of the clamped similarity and the histogram.
    """
    dtype = accumulation_dtype(problem.features_i, problem.codes_i, problem.features_j, problem.codes_j)
    f_i, c_i = unit_rows(problem.features_i.to(dtype)), unit_rows(problem.codes_i.to(dtype))
    f_j = f_i if problem.features_j is problem.features_i else unit_rows(problem.features_j.to(dtype))
    c_j = c_i if problem.codes_j is problem.codes_i else unit_rows(problem.codes_j.to(dtype))
    i, j = Side(f_i, c_i, shares(problem.weight_i)), Side(f_j, c_j, shares(problem.weight_j))
    means = mean_rows(f_j, j.shares), mean_rows(c_j, j.shares)
    return [one_pair_set(problem, pairing(i, j, means, pair_set), in_blocks) for pair_set in problem.pair_sets]


def shares(weight: Tensor | None) -> Tensor | None:
    if weight is None:
        return None
    total = weight.sum(1, keepdim=True)
    return torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0)


def mean_rows(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Takes [N,P,W] to its mean over patches [N,W]."""
    return rows.mean(1) if weight is None else (weight[:, None] @ rows)[:, 0]


def paired(values: Tensor, partner: Tensor | None) -> Tensor:
    """Takes [N,...] to the partners' [B,...]. Not by `index_select`: a GPU adds up its gradient in no fixed order."""
    return values if partner is None else values[partner]


def pairing(i: Side, j: Side, means: tuple[Tensor, Tensor], pair_set: PairSet) -> Pairing:
    f_mean, c_mean = (paired(mean, pair_set.partner) for mean in means)
    row_weight = column_weight = None
    if i.shares is not None or j.shares is not None:
        by_row = torch.full_like(i.f[..., 0], 1 / i.f.shape[1]) if i.shares is None else i.shares
        by_column = torch.full_like(j.f[..., 0], 1 / j.f.shape[1]) if j.shares is None else j.shares
        column_weight = paired(by_column, pair_set.partner)
        present = ((by_row.sum(1) > 0) & (column_weight.sum(1) > 0)).to(by_row.dtype)
        row_weight = by_row * (present / present.sum().clamp(min=1))[:, None]
    return Pairing(
        i=i, j=j, f_mean=f_mean, c_mean=c_mean, row_weight=row_weight, column_weight=column_weight, pair_set=pair_set
    )


def one_pair_set(problem: PairProblem, x: Pairing, in_blocks: InBlocks) -> PairEnergy:
    if problem.rows or x.row_weight is not None:
        rows = rows_of(x.i.c, x.c_mean)
        similarity = rows if problem.rows else x.over_i(rows)
    else:  # means over pairs are products of means over patches
        similarity = (x.i.c.mean(1) * x.c_mean).sum(1).mean()
    row_means = rows_of(x.i.f, x.f_mean) if problem.center or problem.means else x.i.f[..., 0]  # not used otherwise
    threshold = x.pair_set.threshold if x.pair_set.threshold.dim() == 0 else x.pair_set.threshold[:, None]
    if problem.center:
        mean = x.over_i(row_means) if x.pair_set.mean is None else x.pair_set.mean
        bias = mean - threshold - row_means
    else:
        bias = (-threshold).expand(x.i.f.shape[:2])
    energy, clamped, histogram = in_blocks(problem, x, bias)
    closeness = None
    if problem.means:
        closeness = row_means if problem.rows else x.over_i(row_means)
    return PairEnergy(-energy, similarity, clamped, closeness, histogram)


def rows_of(rows: Tensor, mean: Tensor) -> Tensor:
    """Returns the products [B,P] of rows [B,P,W] with [B,W]: means over j of their products with every j."""
    return (mean[:, None] @ rows.mT)[:, 0]  # this way round ten times as fast on a CPU as by a column
