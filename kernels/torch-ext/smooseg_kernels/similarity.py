"""The front door of the similarity statistics: what the closeness of patch pairs looks like, before a threshold is put on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import checks, dense, similarity_blocks
from .api import implementation, resolve_impl
from .precision import outside_autocast
from .rows import accumulation_dtype
from .types import SimilarityStatistics

NO_PROTOTYPES = (1, 1)


@outside_autocast
def similarity_statistics(
    features: Tensor,
    partners: Tensor | Sequence[str | Tensor],
    *,
    center: bool = True,
    bins: int = 512,
    limits: tuple[float, float] = (-1.5, 1.5),
    neighbours: int = 0,
    patch_weight: Tensor | None = None,
    mean: Tensor | None = None,
    impl: str = "auto",
) -> SimilarityStatistics:
    """Means, histogram and nearest neighbours of the closeness W of T pair sets, from blocks of cosines that are never kept.

    W_ij = cos(f_i, f_j) - its mean over j + M, with M the mean over the pair set (W = cos without `center`): what `smooseg_loss` puts its
    thresholds on (Lan et al. 2023, arXiv 2310.17874). No gradient. Time O(P^2 D) a pair of images; means alone (bins=0, neighbours=0)
    are O(P D). Beside the features, memory is that of the outputs and of one block.

    Args:
        features: [B,P,D] patch features, any length, finite. A row shorter than 1e-10 has cosine 0 to all.
        partners: as in `smooseg_loss`: int64 [T,B], or a sequence of "self", "all" and int64 [B].
        bins, limits: the histogram's bins of one width and its lower and upper limit. Bin k has limits[0] + k * width <= W < the next
            edge; what lies beyond the limits is counted in the end bins. In fp32 a value within rounding of an edge may fall on either
            side of it. 0 bins: no histogram. W lies within -1 .. 1 without `center`, and within -3 .. 3 with it.
        neighbours: k >= 0, how many of the largest W of each patch are kept, ties to the lowest index. A patch is no neighbour of its own;
            the histogram and the means do count it as the energy does.
        patch_weight: [B,P] >= 0. Means are weighted by w_i w'_j. A pair is counted in the histogram once where both weights are above 0,
            and a patch without weight is nobody's neighbour.
        mean: [T] takes the place of the measured M, such as the one of a whole data set of which this is a batch.
        impl: "auto", "triton" (at most 2048 bins, 64 neighbours), "torch" or "dense".

    Returns:
        SimilarityStatistics.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.float_tensor("features", features, ("B", "P", "D"), constant=True)
    B, P, _ = features.shape
    bins, neighbours = checks.count("bins", bins), checks.count("neighbours", neighbours)
    limits = histogram_limits(limits)
    dtype = accumulation_dtype(features)
    pair_sets = checks.pair_sets(partners, B, features.device)
    weight = checks.weights(patch_weight, (B, P), features, dtype)
    mean = checks.optional_constant("mean", mean, (len(pair_sets),), features, dtype)
    if (bins or neighbours) and checks.is_inspectable(features) and not bool(features.isfinite().all()):
        raise ValueError("features must be finite where pairs are counted or compared, got NaN or infinity")
    module = form(impl, features, bins, neighbours)
    with torch.no_grad():
        return SimilarityStatistics(
            *module.similarity_statistics(features, pair_sets, weight, mean, bool(center), bins, limits, neighbours)
        )


def form(impl: str, features: Tensor, bins: int, neighbours: int) -> ModuleType:
    """The module that computes: "auto" goes past Triton where its kernels do not hold as many bins or neighbours."""
    chosen = resolve_impl(impl, NO_PROTOTYPES, features)
    if chosen == "triton":
        fused = implementation(chosen, NO_PROTOTYPES, features)
        excess = fused.statistics_excess(bins, neighbours)
        if excess is None:
            return fused
        if impl == "triton":
            raise ValueError(f'impl="triton" {excess}: use impl="torch"')
        chosen = "torch"
    return {"dense": dense, "torch": similarity_blocks}[chosen]


def histogram_limits(limits: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(limit) for limit in limits)
    except (TypeError, ValueError):
        raise TypeError(f"limits must be two numbers, lower and upper, got {limits!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"limits must be two finite numbers, the lower first, got {(low, high)}")
    return low, high


def histogram_quantiles(
    histogram: Tensor, q: Tensor | Sequence[float], limits: tuple[float, float] = (-1.5, 1.5)
) -> Tensor:
    """Quantiles of what was counted, exact to the width of a bin.

    The smallest value that has a share q of all counted values at or below it lies in the same bin as what is returned; within the bin
    values are taken as evenly spread.

    Args:
        histogram: integers [...,bins], bins >= 1, as of `similarity_statistics`, or the sum of several with the same limits.
        q: [Q] shares, 0 to 1.
        limits: those of the histogram.

    Returns:
        fp64 [...,Q]; nan where nothing was counted. What lies beyond the limits is known to be in an end bin and no more.
    """
    if (
        not isinstance(histogram, Tensor)
        or histogram.dtype not in checks.INTEGERS
        or histogram.dim() < 1
        or histogram.shape[-1] < 1
    ):
        got = (
            f"{histogram.dtype} {list(histogram.shape)}" if isinstance(histogram, Tensor) else type(histogram).__name__
        )
        raise TypeError(f"histogram must be an integer tensor [..., bins], got {got}")
    low, high = histogram_limits(limits)
    q = torch.as_tensor(q, dtype=torch.float64, device=histogram.device)
    if q.dim() != 1 or (checks.is_inspectable(q) and not bool(((q >= 0) & (q <= 1)).all())):
        raise ValueError(
            f"q must be a sequence of shares, 0 to 1 each, got {q.tolist() if checks.is_inspectable(q) else list(q.shape)}"
        )
    ends = histogram.long().cumsum(-1)  # [...,bins] values up to the end of each bin
    total = ends[..., -1:]
    # the rank of the quantile, 1 to total, as an integer: a share times a count may come out a hair above the whole number it stands for
    rank = (q * total * (1 - 2.0**-50)).ceil().long().clamp(min=1)
    place = torch.searchsorted(ends.contiguous(), torch.minimum(rank, total).contiguous()).clamp(
        max=histogram.shape[-1] - 1
    )
    end, count = ends.gather(-1, place), histogram.long().gather(-1, place)
    within = (rank - (end - count)).double() - 0.5  # evenly spread, each value in the middle of its share of the bin
    found = low + (place + within / count.clamp(min=1)) * ((high - low) / histogram.shape[-1])
    return torch.where(total > 0, found, torch.nan)
