"""The objective in Triton (`impl="triton"`): one read of the features for the sums, one for the gradients; registered operators.

Arguments come canonical from `api`, as `dense` takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import assignment, code_rows, objective, pairs, similarity
from .launch import INTERPRETED, fits, require_interpreter
from .pair_sums import ALL, SELF

__all__ = [
    "INTERPRETED",
    "assign",
    "assign_counted",
    "data_term",
    "fits",
    "loss",
    "pair_energy",
    "probabilities",
    "require_interpreter",
    "similarity_statistics",
    "smoothness",
    "statistics_excess",
]

# kernels clamp partner numbers themselves, and spare a launch
CLAMPS_PARTNERS = True


def pair_table(partners: tuple[str | Tensor, ...]) -> tuple[Tensor | None, list[int]]:
    """-> the index entries as one table [rows,B], and for each pair set SELF, ALL or its row there."""
    table = [entry for entry in partners if isinstance(entry, Tensor)]
    rows = iter(range(len(table)))
    entries = [next(rows) if isinstance(entry, Tensor) else SELF if entry == "self" else ALL for entry in partners]
    if len(table) > 1:
        return torch.stack(table), entries
    return (table[0][None] if table else None), entries


def wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and torch.is_grad_enabled() and tensor.requires_grad


def run(
    features,
    rows,
    student,
    teacher,
    partners,
    thresholds,
    temperature,
    relative,
    center,
    channel_scale,
    patch_weight,
    feature_norms,
    mean,
):
    table, entries = pair_table(partners)
    outputs = objective.objective(
        features,
        rows,
        student,
        teacher,
        table,
        entries,
        thresholds,
        channel_scale,
        patch_weight,
        feature_norms,
        mean,
        temperature,
        relative,
        center,
        wants_gradient(rows),
        wants_gradient(student),
    )
    return (*outputs[:4], outputs[4].detach())


def smoothness(
    features, probs, partners, thresholds, relative, center, channel_scale, patch_weight, feature_norms, mean
):
    """-> energy [H,T], distance [H,T], mean [T]."""
    _, energy, _, distance, mean = run(
        features,
        probs,
        None,
        None,
        partners,
        thresholds,
        1.0,
        relative,
        center,
        channel_scale,
        patch_weight,
        feature_norms,
        mean,
    )
    return energy, distance, mean


def loss(
    features,
    codes,
    student,
    teacher,
    partners,
    thresholds,
    temperature,
    relative,
    center,
    channel_scale,
    patch_weight,
    feature_norms,
    mean,
):
    """-> total [H], energy [H,T], data [H], distance [H,T], mean [T]."""
    return run(
        features,
        codes,
        student,
        teacher,
        partners,
        thresholds,
        temperature,
        relative,
        center,
        channel_scale,
        patch_weight,
        feature_norms,
        mean,
    )


def similarity_statistics(features, partners, patch_weight, mean, center, bins, limits, neighbours):
    """-> mean [T], row_mean [T,B,P], histogram int64 [T,bins], neighbour_values and neighbour_indices [T,B,P,k]."""
    table, entries = pair_table(partners)
    return similarity.similarity_statistics(
        features, table, entries, patch_weight, mean, center, bins, *limits, neighbours
    )


def statistics_excess(bins: int, neighbours: int) -> str | None:
    """Why these kernels do not serve such a request, or None."""
    return similarity.excess(bins, neighbours)


def probabilities(codes: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    return code_rows.probabilities(codes, prototypes, temperature)


def data_term(codes: Tensor, student: Tensor, teacher: Tensor, patch_weight: Tensor | None) -> Tensor:
    """-> [H]."""
    return code_rows.data_term(codes.detach(), student, teacher, patch_weight, wants_gradient(student))[0]


def pair_energy(features_i, codes_i, features_j, codes_j, threshold, partner, clamp, hinge, center):
    """-> energy [], similarity []."""
    dtype = torch.promote_types(features_i.dtype, features_j.dtype)  # one matrix product takes both
    features_i, features_j = features_i.to(dtype), features_j.to(dtype)
    return pairs.pair_energy(
        features_i, codes_i, features_j, codes_j, threshold, partner, *clamp, hinge, center, wants_gradient(codes_i)
    )[:2]


def assign(codes: Tensor, prototypes: Tensor, grid: tuple[int, int] | None, size: tuple[int, int] | None) -> Tensor:
    """-> [B,P] or [B,H,W]."""
    return assign_counted(codes, prototypes, grid, size, None, 0)[0]


def assign_counted(
    codes: Tensor,
    prototypes: Tensor,
    grid: tuple[int, int] | None,
    size: tuple[int, int] | None,
    labels: Tensor | None,
    classes: int,
) -> tuple[Tensor, Tensor]:
    """The same and the counts [K, classes] from one kernel."""
    pairs = (None if pair is None else list(pair) for pair in (grid, size))
    return assignment.assign(codes, prototypes, *pairs, labels, classes)
