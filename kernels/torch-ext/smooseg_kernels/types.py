"""Results of the public functions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SmoothnessTerms(NamedTuple):
    """Smoothness energies of T pair sets, fp32 (fp64 with any fp64 input)."""

    energy: Tensor  # [T] mean over (image, i, j) of (W_ij - b) * (1 - cos(p_i, p_j))
    distance: Tensor  # [T] mean label distance, 1 - cos(p_i, p_j)
    mean: Tensor  # [T] mean closeness M of each pair set, measured or as given


class SmooSegLoss(NamedTuple):
    """The whole objective, fp32 (fp64 with any fp64 input). With heads all but `mean` have a leading [H]."""

    total: Tensor  # [] energy.sum() + data
    energy: Tensor  # [T]
    data: Tensor  # [] cross-entropy of the student against the teacher's labels
    distance: Tensor  # [T]
    mean: Tensor  # [T]


class PairEnergy(NamedTuple):
    """A clamped energy of patch pairs, fp32 (fp64 with any fp64 input)."""

    energy: Tensor  # [] mean over (image, i, j) of -clamp(cos(c_i, c_j)) * V_ij
    similarity: Tensor  # [] mean of cos(c_i, c_j), before the clamp


class SmoothnessLossTerms(NamedTuple):
    """Results of `layers.SmoothnessLoss`: scalars with gradients to probs, fp32 (fp64 with any fp64 input)."""

    energy_within: Tensor  # [] over the pairs inside an image
    distance_within: Tensor  # [] mean label distance of those pairs, 1 - cos(p_i, p_j)
    energy_across: Tensor  # [] over the pairs with another image
    distance_across: Tensor  # []


class SimilarityStatistics(NamedTuple):
    """Statistics of the closeness W of T pair sets, fp32 (fp64 for fp64 features)."""

    mean: Tensor  # [T] mean closeness M of each pair set, measured or as given
    row_mean: Tensor  # [T,B,P] each patch's mean cosine to its partner's patches; with "all" the mean over its partners
    histogram: (
        Tensor  # int64 [T,bins] pairs by their W; a bin includes its lower edge, the end bins all beyond the limits
    )
    neighbour_values: Tensor  # [T,B,P,k] the largest W of each patch, descending; -inf where there are fewer than k
    neighbour_indices: Tensor  # int64 [T,B,P,k] image * P + patch of each, a row of features.flatten(0, 1); -1 for none
