"""Checked, canonical inputs: the front door makes them once, and every implementation takes them as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class PairSet(NamedTuple):
    """How the images of the i side meet those of the j side, once."""

    partner: Tensor | None  # int64 [B], or None where image n meets image n
    threshold: Tensor  # [] or [B] in the accumulation dtype; may take a gradient
    mean: Tensor | None  # [] in place of the measured mean closeness


@dataclass(frozen=True)
class PairProblem:
    """Inputs of `pair_energy`. Constants have the accumulation dtype."""

    features_i: Tensor  # [B,P_i,D]
    codes_i: Tensor  # [B,P_i,Z]
    features_j: Tensor  # [N,P_j,D]
    codes_j: Tensor  # [N,P_j,Z]
    pair_sets: tuple[PairSet, ...]
    weight_i: Tensor | None  # [B,P_i]
    weight_j: Tensor | None  # [N,P_j]
    clamp: tuple[float | None, float | None]
    hinge: bool
    center: bool
    rows: bool  # means over j alone
    means: bool  # also of the clamped similarity and of the closeness
    bins: int
    limits: tuple[float, float]


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


@dataclass(frozen=True)
class ContrastProblem:
    """Inputs of `contrastive_loss`. Constants have the accumulation dtype."""

    codes_i: Tensor  # [B,N,Z]
    codes_j: Tensor  # [B,M,Z]
    temperature: Tensor  # []
    labels_i: Tensor | None  # integers [B,N], or None where positives come from features
    labels_j: Tensor | None  # integers [B,M]
    features_i: Tensor | None  # [B,N,D]
    features_j: Tensor | None  # [B,M,D]
    threshold: Tensor | None  # [B,N]
    threshold_j: Tensor | None  # [B,M]
    negative_threshold: Tensor | None  # [B,N]
    exclude_self: bool
    inside: bool
    mean: bool
