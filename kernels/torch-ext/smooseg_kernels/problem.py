"""Checked, canonical inputs: the front door makes them once, and every implementation takes them as they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Inputs of the smoothness energies, apart from the label distributions. Constants have the accumulation dtype."""

    features: Tensor  # [B,P,D]
    partners: tuple[str | Tensor, ...]  # T entries, each "self", "all" or int64 [B]
    thresholds: Tensor  # [H,T]; H is 1 without a head axis
    relative: bool
    center: bool
    channel_scale: Tensor | None  # [B,D]
    patch_weight: Tensor | None  # [B,P]
    feature_norms: Tensor | None  # [B,P]
    mean: Tensor | None  # [T]


@dataclass(frozen=True)
class PairProblem:
    """Inputs of `pair_energy`."""

    features_i: Tensor  # [B,P_i,D]
    codes_i: Tensor  # [B,P_i,Z]
    features_j: Tensor  # [N,P_j,D]
    codes_j: Tensor  # [N,P_j,Z]
    threshold: Tensor  # [] in the accumulation dtype
    partner: Tensor | None  # int64 [B], or None where image n meets image n
    clamp: tuple[float | None, float | None]
    hinge: bool
    center: bool


@dataclass(frozen=True)
class ClosenessProblem:
    """Inputs of `similarity_statistics`. Constants have the accumulation dtype."""

    features: Tensor  # [B,P,D]
    partners: tuple[str | Tensor, ...]  # T entries, each "self", "all" or int64 [B]
    patch_weight: Tensor | None  # [B,P]
    mean: Tensor | None  # [T]
    center: bool
    bins: int
    limits: tuple[float, float]
    neighbours: int
