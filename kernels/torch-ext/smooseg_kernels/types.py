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
    """A clamped energy of patch pairs, fp32 (fp64 with any fp64 input).

    Means over all pairs have the shape []; means over j alone, with `reduction="none"`, are rows [B,P_i]. With partners
    [M,B] everything has a leading [M].
    """

    energy: Tensor  # mean over (image, i, j) of -clamp(cos(c_i, c_j)) * V_ij
    similarity: Tensor  # mean of cos(c_i, c_j), before the clamp
    clamped: Tensor | None = None  # with `means`: mean of clamp(cos(c_i, c_j))
    closeness: Tensor | None = None  # with `means`: mean of cos(f_i, f_j), a constant
    histogram: Tensor | None = None  # with `bins`: int64 [bins] pairs by their cos(c_i, c_j)


class ContrastiveTerms(NamedTuple):
    """A contrastive loss and its parts, fp32 (fp64 with any fp64 input); all but `count` have gradients."""

    loss: Tensor  # [] mean over the queries with a positive, or with reduction="none" [B,N], 0 without a positive
    log_sum: Tensor  # [B,N] log of the sum of exp(s_ij) over the candidates; 0 without any
    positive: Tensor  # [B,N] mean of s_ij over the positives, or with `inside` the log of the mean of exp(s_ij); or 0
    count: Tensor  # type: ignore[assignment]  # int64 [B,N] number of positives; hides tuple.count


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
