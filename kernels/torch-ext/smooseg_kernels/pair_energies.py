"""The front door of the energies of pairs: checks the arguments, makes them canonical and calls the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .derivatives import refuse_tangents, refuse_transforms
from .dispatch import PAIR_IMPLS, clamps_partners, implementation, resolve_impl
from .precision import outside_autocast
from .problem import PairProblem, PairSet
from .rows import accumulation_dtype
from .types import PairEnergy


@outside_autocast
def pair_energy(
    features_i: Tensor,
    codes_i: Tensor,
    features_j: Tensor,
    codes_j: Tensor,
    threshold: float | Tensor,
    *,
    partner: Tensor | None = None,
    clamp: tuple[float | None, float | None] = (None, None),
    hinge: bool = False,
    center: bool = True,
    weight_i: Tensor | None = None,
    weight_j: Tensor | None = None,
    mean: float | Tensor | None = None,
    reduction: str = "mean",
    means: bool = False,
    bins: int = 0,
    limits: tuple[float, float] = (-1.0, 1.0),
    impl: str = "auto",
) -> PairEnergy:
    """Computes the correlation energy of two sets of patches, with a clamp on the codes' similarity.

    STEGO, DepthG and EAGLE train on it. energy = mean over (image, i, j) of -clamp(cos(c_i, c_j), low, high) V_ij with
    V = W - b, or max(W - b, 0) with `hinge`. With S_ij = cos(f_i, f_j), the closeness is W_ij = S_ij - mean_j S_ij + M,
    where M is the mean of S over all pairs of all images; without `center` it is W = S. In Hamilton et al., ICLR 2022,
    arXiv 2203.08414, b is called the shift, and the clamp is (0, None), or (0, 0.8) where it is stabilised. The energy
    is linear in b without `hinge`: with threshold 0 and `means`, energy + b * clamped is the energy of any b.

    Args:
        features_i: [B,P_i,D] frozen patch features, rows of any length. A constant.
        codes_i: [B,P_i,Z], rows of any length. Get gradients; these pass at a bound of the clamp and stop beyond it, as
            in torch.clamp.
        features_j: [N,P_j,D], like features_i.
        codes_j: [N,P_j,Z], like codes_i.
        threshold: b, a finite number or a tensor of shape [] or [B] (one for each image of the i side), which a
            captured graph reads at every replay. Gets a gradient where it requires one.
        partner: int64 [B], the image of the j side that each image of the i side meets; repeats are allowed. None pairs
            images of the same number (N = B). With [M,B] the i side meets M images each, in M pair sets of one call:
            every result has a leading [M], each set is centred by its own M, and threshold may also be [M,1] or [M,B].
            Checked on a CPU. On a GPU a number out of range is taken as the nearest image, unless
            SMOOSEG_CHECK_INDICES=1 is set in the environment.
        clamp: (low, high) with low <= high, each a number or None for no bound.
        hinge: keep attraction alone, V = max(W - b, 0).
        center: see above.
        weight_i: [B,P_i], 0 or more and finite. Weights every mean over i; an image without any weight is left out.
        weight_j: [N,P_j], the same for means over j.
        mean: takes the place of the measured M, a number or a tensor [], or [M] with M pair sets. A constant.
        reduction: "mean" of all pairs, or "none": the mean over j alone, rows [B,P_i], of which weight_i weights M
            alone.
        means: also return the means of the clamped similarity (with gradients) and of S.
        bins: also count the codes' similarity in so many equal bins. Excludes weights.
        limits: the lower and upper limit of the bins; the end bins hold all values beyond them.
        impl: "auto", "triton", "torch" or "dense". "dense" writes [B,P_i,P_j] matrices. "torch" works in blocks of
            bounded size, and in time linear in P without clamp and hinge. "triton" keeps the blocks in registers; it
            counts at most 2048 bins, beyond which "auto" picks "torch", and has no gradient to the threshold with
            `hinge`.

    Returns:
        PairEnergy, fp32 (fp64 with any fp64 input). fp16 codes need loss scaling, because their gradients underflow.
        Only "dense" has gradients of gradients and runs inside torch.func.

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
        RuntimeError: impl="triton" cannot run here.
    """
    tensors = (features_i, codes_i, features_j, codes_j)
    check_sides(*tensors, partner)
    (B, P_i, _), (N, P_j, _) = features_i.shape, features_j.shape
    rows = checks.one_of("reduction", reduction, ("mean", "none")) == "none"
    bins, dtype, device = checks.count("bins", bins), accumulation_dtype(*tensors), features_i.device
    if bins and (weight_i is not None or weight_j is not None):
        raise ValueError("bins cannot be used with weight_i or weight_j: leave one of them out")
    resolved = resolve_impl(impl, (1, 1), *tensors)
    module = implementation(resolved, (1, 1), *tensors, forms=PAIR_IMPLS)
    excess = module.statistics_excess(bins, 0) if bins and resolved == "triton" else None
    if excess is not None:
        if impl == "triton":
            raise ValueError(f'impl="triton" {excess}: use impl="torch"')
        resolved, module = "torch", PAIR_IMPLS["torch"]
    sets = len(partner) if isinstance(partner, Tensor) and partner.dim() == 2 else None
    if sets == 0:
        raise ValueError(f"partner must have shape [{B}] or [M, {B}] with M >= 1, got [0, {B}]")
    several = partner.unbind() if partner is not None and sets else (partner,)
    met = [
        one if one is None else checks.index_vector("partner", one, B, N, device, clamp=not clamps_partners(module))
        for one in several
    ]
    thresholds = checks.pair_thresholds("threshold", threshold, sets, B, dtype, device)
    bounds = checks.bounds("clamp", clamp)
    in_blocks = resolved == "torch" and (bounds != (None, None) or hinge or bins)
    if in_blocks:
        refuse_transforms("torch", *tensors, thresholds[0], *(one for one in met if one is not None))
    problem = PairProblem(
        features_i=features_i,
        codes_i=codes_i,
        features_j=features_j,
        codes_j=codes_j,
        pair_sets=tuple(
            PairSet(*one) for one in zip(met, thresholds, checks.given_mean("mean", mean, sets, dtype, device))
        ),
        weight_i=checks.weights(weight_i, (B, P_i), features_i, dtype, "weight_i"),
        weight_j=checks.weights(weight_j, (N, P_j), features_i, dtype, "weight_j"),
        clamp=bounds,
        hinge=bool(hinge),
        center=bool(center),
        rows=rows,
        means=bool(means),
        bins=bins,
        limits=checks.histogram_limits(limits),
    )
    if in_blocks:
        refuse_tangents("torch", problem)
    results = module.pair_energy(problem)
    if sets is None:
        return results[0]
    energy, similarity, *others = (None if field[0] is None else torch.stack(field) for field in zip(*results))
    assert energy is not None
    assert similarity is not None
    return PairEnergy(energy, similarity, *others)


def check_sides(
    features_i: Tensor, codes_i: Tensor, features_j: Tensor, codes_j: Tensor, partner: Tensor | None
) -> None:
    checks.float_tensor("features_i", features_i, ("B", "P_i", "D"), constant=True)
    B, P_i, D = features_i.shape
    checks.float_tensor("codes_i", codes_i, (B, P_i, "Z"), features_i)
    checks.float_tensor("features_j", features_j, ("N", "P_j", D), features_i, constant=True)
    N, P_j, _ = features_j.shape
    if partner is None and N != B:
        raise ValueError(
            f"partner must say, int64 [{B}], which of the {N} images of features_j each of the {B} of features_i meets"
        )
    checks.float_tensor("codes_j", codes_j, (N, P_j, codes_i.shape[2]), features_i)
