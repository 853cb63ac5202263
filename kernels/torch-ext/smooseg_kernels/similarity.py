"""The front door of the similarity statistics: the closeness of patch pairs, before a threshold is put on it."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import checks, dense, similarity_blocks
from .derivatives import refuse_func
from .dispatch import implementation, resolve_impl
from .precision import outside_autocast
from .problem import ClosenessProblem
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
    """Measures means, histogram and nearest neighbours of the closeness W of T pair sets, from blocks of cosines that
    are not kept.

    W_ij = cos(f_i, f_j) - its mean over j + M, where M is the mean cosine over the pair set; without `center` W_ij =
    cos(f_i, f_j). The thresholds of `smooseg_loss` apply to this W (Lan et al. 2023, arXiv 2310.17874). No gradient.
    Time is O(P^2 D) for a pair of images, and O(P D) for means alone (bins=0, neighbours=0). Memory next to the
    features: the outputs and one block.

    Args:
        features: [B,P,D] finite patch features, rows of any length. A row shorter than 1e-10 has cosine 0 to all.
        partners: as in `smooseg_loss`: int64 [T,B], or a sequence of "self", "all" and int64 [B].
        center: see above.
        bins: number of equal bins of the histogram; 0 for no histogram. Bin k holds limits[0] + k * width <= W < the
            next edge, and the end bins hold all values beyond the limits. In fp32 a value within rounding of an edge
            may fall on either side.
        limits: the lower and upper limit of the histogram, finite. W lies in -1 .. 1 without `center` and in -3 .. 3
            with it.
        neighbours: k >= 0, how many of the largest W of each patch to keep, ties to the lowest index. A patch is not
            its own neighbour, although the histogram and the means count that pair, as the energy does.
        patch_weight: [B,P], 0 or more and finite. Means are weighted by w_i w'_j. The histogram counts a pair once
            where both weights are above 0. A patch without weight is nobody's neighbour.
        mean: [T] takes the place of the measured M, for example that of a whole data set of which this is a batch.
        impl: "auto", "triton" (at most 2048 bins, 64 neighbours), "torch" or "dense".

    Returns:
        SimilarityStatistics.

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
        RuntimeError: impl="triton" cannot run here.
    """
    checks.float_tensor("features", features, ("B", "P", "D"), constant=True)
    B, P, _ = features.shape
    bins, neighbours = checks.count("bins", bins), checks.count("neighbours", neighbours)
    dtype = accumulation_dtype(features)
    pair_sets = checks.pair_sets(partners, B, features.device)
    problem = ClosenessProblem(
        features=features,
        partners=pair_sets,
        patch_weight=checks.weights(patch_weight, (B, P), features, dtype),
        mean=checks.optional_constant("mean", mean, (len(pair_sets),), features, dtype),
        center=bool(center),
        bins=bins,
        limits=checks.histogram_limits(limits),
        neighbours=neighbours,
    )
    if (bins or neighbours) and checks.is_inspectable(features) and not bool(features.isfinite().all()):
        raise ValueError("features must be finite where pairs are counted or compared, got NaN or infinity")
    if bins or neighbours:
        refuse_func("similarity_statistics", features)
    module = implementation_for(impl, problem)
    with torch.no_grad():
        return SimilarityStatistics(*module.similarity_statistics(problem))


def implementation_for(impl: str, problem: ClosenessProblem) -> ModuleType:
    """Picks the module. "auto" picks "torch" where Triton's kernels cannot hold as many bins or neighbours."""
    resolved = resolve_impl(impl, NO_PROTOTYPES, problem.features)
    if resolved == "triton":
        fused = implementation(resolved, NO_PROTOTYPES, problem.features)
        excess = fused.statistics_excess(problem.bins, problem.neighbours)
        if excess is None:
            return fused
        if impl == "triton":
            raise ValueError(f'impl="triton" {excess}: use impl="torch"')
        resolved = "torch"
    return {"dense": dense, "torch": similarity_blocks}[resolved]


def histogram_quantiles(
    histogram: Tensor, q: Tensor | Sequence[float], limits: tuple[float, float] = (-1.5, 1.5)
) -> Tensor:
    """Reads quantiles from counts, exact to the width of a bin.

    The result lies in the bin of the smallest value that has a share q of all counted values at or below it. Values are
    taken as evenly spaced within a bin.

    Args:
        histogram: integers [...,bins], bins >= 1, from `similarity_statistics`, or the sum of several with the same
            limits.
        q: [Q] shares, each 0 to 1.
        limits: the lower and upper limit of the histogram, finite.

    Returns:
        fp64 [...,Q]; NaN where nothing was counted. A value beyond the limits is only known to lie in an end bin.

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
    """
    check_histogram(histogram)
    low, high = checks.histogram_limits(limits)
    q = checks.numbers("q", q, torch.float64, histogram.device)
    if q.dim() != 1 or (checks.is_inspectable(q) and not bool(((q >= 0) & (q <= 1)).all())):
        got = q.tolist() if checks.is_inspectable(q) else list(q.shape)
        raise ValueError(f"q must be a sequence of shares, 0 to 1 each, got {got}")
    counts, bins = histogram.long(), histogram.shape[-1]
    ends = counts.cumsum(-1)  # [...,bins] values up to the end of each bin
    total = ends[..., -1:]
    # the rank of the quantile, 1 to total: rounding may put a share times a count just above the integer it means
    rank = (q * total * (1 - 2.0**-50)).ceil().long().clamp(min=1)
    place = torch.searchsorted(ends.contiguous(), torch.minimum(rank, total).contiguous()).clamp(max=bins - 1)
    end, count = ends.gather(-1, place), counts.gather(-1, place)
    within = (rank - (end - count)).double() - 0.5  # evenly spaced, each value in the middle of its share of the bin
    quantiles = low + (place + within / count.clamp(min=1)) * ((high - low) / bins)
    return torch.where(total > 0, quantiles, torch.nan)


def check_histogram(histogram: Tensor) -> None:
    if not isinstance(histogram, Tensor):
        raise TypeError(f"histogram must be an integer tensor [..., bins], got {type(histogram).__name__}")
    if histogram.dtype not in checks.INTEGERS or histogram.dim() < 1 or histogram.shape[-1] < 1:
        got = f"{histogram.dtype} {list(histogram.shape)}"
        raise TypeError(f"histogram must be an integer tensor [..., bins], got {got}")
