"""The objective in Triton (`impl="triton"`): the features are read once for the sums and once for the gradients.

The launchers are registered operators with flat signatures, as torch.library requires; here they meet the front door's
problems.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..derivatives import refuse_tangents
from ..operators import as_arguments
from ..problem import ClosenessProblem, ContrastProblem, PairProblem, PairSet, Problem
from ..types import PairEnergy
from . import assignment, code_rows, contrast, gaussian, objective, pair_histogram, pair_options, pairs, similarity
from .launch import INTERPRETED, fits, require_interpreter
from .pair_sets import ALL, SELF

__all__ = [
    "INTERPRETED",
    "assign",
    "assign_counted",
    "contrastive",
    "data_term",
    "fits",
    "gaussian",
    "loss",
    "pair_energy",
    "probabilities",
    "require_interpreter",
    "similarity_statistics",
    "smoothness",
    "statistics_excess",
]

# kernels clamp partner numbers themselves, which spares a launch
CLAMPS_PARTNERS = True


def pair_table(partners: tuple[str | Tensor, ...]) -> tuple[Tensor | None, list[int]]:
    """Returns the index entries as one table [rows,B], and for each pair set SELF, ALL or its row there."""
    table = [entry for entry in partners if isinstance(entry, Tensor)]
    rows = iter(range(len(table)))
    entries = [next(rows) if isinstance(entry, Tensor) else SELF if entry == "self" else ALL for entry in partners]
    if len(table) > 1:
        return torch.stack(table), entries
    return (table[0][None] if table else None), entries


def wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and torch.is_grad_enabled() and tensor.requires_grad


def energies(
    problem: Problem, rows: Tensor, *, student: Tensor | None, teacher: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns total [H], energy [H,T], data [H], distance [H,T], mean [T]. `rows`: codes with a teacher, else probs."""
    refuse_tangents("triton", problem, temperature)
    partners, entries = pair_table(problem.partners)
    number, tensor = as_arguments(temperature)
    total, energy, data, distance, mean, *_ = objective.objective(
        features=problem.features,
        rows=rows,
        student=student,
        teacher=teacher,
        partners=partners,
        entries=entries,
        thresholds=problem.thresholds,
        channel_scale=problem.channel_scale,
        patch_weight=problem.patch_weight,
        feature_norms=problem.feature_norms,
        mean=problem.mean,
        temperature=number,
        relative=problem.relative,
        center=problem.center,
        rows_gradient=wants_gradient(rows),
        student_gradient=wants_gradient(student),
        temperature_tensor=tensor,
    )
    return total, energy, data, distance, mean.detach()


def smoothness(problem: Problem, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns energy [H,T], distance [H,T] and mean [T] for probs [H,B,P,K]."""
    _, energy, _, distance, mean = energies(problem, probs, student=None, teacher=None, temperature=1.0)
    return energy, distance, mean


def loss(
    problem: Problem, codes: Tensor, student: Tensor, teacher: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns total [H], energy [H,T], data [H], distance [H,T] and mean [T]."""
    return energies(problem, codes, student=student, teacher=teacher, temperature=temperature)


def similarity_statistics(problem: ClosenessProblem) -> tuple[Tensor, ...]:
    """Returns mean [T], row_mean [T,B,P], histogram int64 [T,bins], neighbour values and indices [T,B,P,k]."""
    partners, entries = pair_table(problem.partners)
    low, high = problem.limits
    return similarity.similarity_statistics(
        features=problem.features,
        partners=partners,
        entries=entries,
        weight=problem.patch_weight,
        mean=problem.mean,
        center=problem.center,
        bins=problem.bins,
        low=low,
        high=high,
        neighbours=problem.neighbours,
    )


def statistics_excess(bins: int, neighbours: int) -> str | None:
    """Says why these kernels do not serve such a request, or returns None."""
    return similarity.excess(bins, neighbours)


def probabilities(codes: Tensor, prototypes: Tensor, temperature: float | Tensor) -> Tensor:
    """Returns probs [H,B,P,K]."""
    refuse_tangents("triton", temperature)
    return code_rows.probabilities(codes, prototypes, *as_arguments(temperature))


def data_term(codes: Tensor, student: Tensor, teacher: Tensor, patch_weight: Tensor | None) -> Tensor:
    """Returns the data term [H]."""
    refuse_tangents("triton", patch_weight)
    return code_rows.data_term(codes.detach(), student, teacher, patch_weight, wants_gradient(student))[0]


def pair_energy(problem: PairProblem) -> list[PairEnergy]:
    """Returns the results of each pair set. Kernels of the means alone serve where that is all that is asked."""
    refuse_tangents("triton", problem)
    dtype = torch.promote_types(problem.features_i.dtype, problem.features_j.dtype)  # one matrix product takes both
    problem = replace(problem, features_i=problem.features_i.to(dtype), features_j=problem.features_j.to(dtype))
    plain = not problem.rows and problem.weight_i is problem.weight_j is None
    for _, threshold, mean in problem.pair_sets:
        plain = plain and threshold.dim() == 0 and mean is None and not (problem.hinge and wants_gradient(threshold))
    if plain:
        results = [pair_set_energy(problem, pair_set) for pair_set in problem.pair_sets]
    else:
        results = pair_options.pair_energy(with_clamped_partners(problem))
    if not problem.bins:
        return results
    codes = (problem.codes_i.detach(), problem.codes_j.detach())
    rule = (problem.bins, *problem.limits)
    counts = [pair_histogram.pair_histogram(*codes, pair_set.partner, *rule) for pair_set in problem.pair_sets]
    return [result._replace(histogram=histogram) for result, histogram in zip(results, counts)]


def with_clamped_partners(problem: PairProblem) -> PairProblem:
    """Keeps partner numbers in range for what is not a kernel."""
    last = problem.features_j.shape[0] - 1
    return replace(
        problem,
        pair_sets=tuple(
            one if one.partner is None else one._replace(partner=one.partner.clamp(0, last))
            for one in problem.pair_sets
        ),
    )


def pair_set_energy(problem: PairProblem, pair_set: PairSet) -> PairEnergy:
    """Returns the mean energy and similarity of one pair set."""
    low, high = problem.clamp
    energy, similarity, clamped, closeness, *_ = pairs.pair_energy(
        features_i=problem.features_i,
        codes_i=problem.codes_i,
        features_j=problem.features_j,
        codes_j=problem.codes_j,
        threshold=pair_set.threshold,
        partner=pair_set.partner,
        low=low,
        high=high,
        hinge=problem.hinge,
        center=problem.center,
        means=problem.means or wants_gradient(pair_set.threshold),
        i_gradient=wants_gradient(problem.codes_i),
    )
    return PairEnergy(energy, similarity, *((clamped, closeness) if problem.means else ()))


def contrastive(problem: ContrastProblem) -> tuple[None, Tensor, Tensor, Tensor]:
    """Returns no loss, log_sum [B,N], positive [B,N], count int64 [B,N]."""
    refuse_tangents("triton", problem)
    features_i, features_j = problem.features_i, problem.features_j
    if features_i is not None and features_j is not None:  # one matrix product takes both
        dtype = torch.promote_types(features_i.dtype, features_j.dtype)
        features_i, features_j = features_i.to(dtype), features_j.to(dtype)
    log_sum, positive, count, *_ = contrast.contrast(
        codes_i=problem.codes_i,
        codes_j=problem.codes_j,
        temperature=problem.temperature,
        labels_i=problem.labels_i,
        labels_j=problem.labels_j,
        features_i=features_i,
        features_j=features_j,
        threshold=problem.threshold,
        threshold_j=problem.threshold_j,
        negative_threshold=problem.negative_threshold,
        exclude_self=problem.exclude_self,
        inside=problem.inside,
    )
    return None, log_sum, positive, count


def assign(codes: Tensor, prototypes: Tensor, grid: tuple[int, int] | None, size: tuple[int, int] | None) -> Tensor:
    """Returns labels, int64 [B,P] or [B,H,W]."""
    return assign_counted(codes, prototypes, grid, size, None, 0)[0]


def assign_counted(
    codes: Tensor,
    prototypes: Tensor,
    grid: tuple[int, int] | None,
    size: tuple[int, int] | None,
    truth: Tensor | None,
    classes: int,
) -> tuple[Tensor, Tensor]:
    """Returns labels and the counts [K,classes] against the ground truth, from one kernel."""
    lists = (None if pair is None else list(pair) for pair in (grid, size))
    return assignment.assign(codes, prototypes, *lists, truth, classes)
