"""The front door of the energies: checks the arguments, makes them canonical and calls the implementation."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from . import checks
from .dispatch import clamps_partners, implementation
from .precision import outside_autocast
from .problem import Problem
from .rows import accumulation_dtype
from .types import SmooSegLoss, SmoothnessTerms


@outside_autocast
def smooseg_loss(
    features: Tensor,
    codes: Tensor,
    student: Tensor,
    teacher: Tensor,
    partners: Tensor | Sequence[str | Tensor],
    thresholds: Tensor | Sequence[float],
    *,
    temperature: float | Tensor = 0.1,
    relative: bool = False,
    center: bool = True,
    channel_scale: Tensor | None = None,
    patch_weight: Tensor | None = None,
    feature_norms: Tensor | None = None,
    mean: Tensor | None = None,
    impl: str = "auto",
) -> SmooSegLoss:
    """Computes the whole SmooSeg objective: smoothness energies of T pair sets plus the student's data term.

    The energy of a pair set is the mean over (image, i, j) of (W_ij - b) (1 - cos(p_i, p_j)). The label distributions
    are p = softmax(cos(code, teacher) / temperature). The closeness is W_ij = cos(f_i, f_j) - its mean over j + M,
    where M is the mean cosine over the pair set; without `center` it is W_ij = cos(f_i, f_j). The data term is the
    cross-entropy of cos(stopgrad(code), student) against argmax cos(code, teacher). Lan et al. 2023, arXiv 2310.17874.

    Args:
        features: [B,P,D] frozen patch features. Rows may have any length up to 1e19; a row shorter than 1e-10 has
            cosine 0 to all.
        codes: [B,P,Z], or [H,B,P,Z] for H heads on the same features. Get gradients, through the energies only.
        student: [K,Z] or [H,K,Z], rows of any length. Gets gradients, through the data term only.
        teacher: the same shape as student. A constant.
        partners: int64 [T,B] image numbers, or a sequence of T entries, each int64 [B], "self" (the image itself) or
            "all" (every ordered pair of different images, B >= 2). Numbers are checked on a CPU. On a GPU a check would
            wait for the device, so a number out of range is taken as the nearest image, unless SMOOSEG_CHECK_INDICES=1
            is set in the environment (which also checks patch_weight).
        thresholds: b, numbers [T], or [H,T] with heads. Pairs of patches with W > b are pulled together, the others
            pushed apart.
        temperature: above 0, a finite number or a tensor [], which a captured graph reads at every replay. A constant.
        relative: thresholds are an excess over the measured mean closeness, b = M + threshold.
        channel_scale: [B,D] multiplies an image's features on both sides of its pairs (dropout masks). Makes no lasting
            copy.
        patch_weight: [B,P], 0 or more and finite. Weights the means over i, j by w_i w'_j and the data term by w_i. An
            image without any weight is left out.
        feature_norms: [B,P] row norms of the features, which spares computing them. Excludes channel_scale.
        mean: [T] takes the place of the measured M (data-parallel runs average it first).
        impl: "auto", "triton", "torch" or "dense". "auto" picks "triton" where every tensor is on a GPU, none is fp64,
            Triton is installed and the prototypes fit on chip; else "torch".

    Returns:
        SmooSegLoss, fp32 (fp64 with any fp64 input). With heads everything but `mean` has a leading [H] and equals H
        single calls. fp16 codes need loss scaling, because their gradients underflow.

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
        RuntimeError: impl="triton" cannot run here.
    """
    checks.float_tensor("features", features, ("B", "P", "D"), constant=True)
    B, P, _ = features.shape
    heads = (codes.shape[0],) if isinstance(codes, Tensor) and codes.dim() == 4 else ()
    checks.float_tensor("codes", codes, (*("H" for _ in heads), B, P, "Z"), features)
    checks.float_tensor("student", student, (*heads, "K", codes.shape[-1]), features)
    checks.float_tensor("teacher", teacher, tuple(student.shape), features, constant=True)
    tensors = (features, codes, student, teacher)
    module = implementation(impl, (student.shape[-2], student.shape[-1]), *tensors)
    problem = energy_problem(
        module,
        tensors,
        partners,
        thresholds,
        heads=heads[0] if heads else None,
        relative=relative,
        center=center,
        channel_scale=channel_scale,
        patch_weight=patch_weight,
        feature_norms=feature_norms,
        mean=mean,
    )
    if not heads:
        codes, student, teacher = codes[None], student[None], teacher[None]
    heat = checks.temperature(temperature, problem.thresholds.dtype, features.device)
    *outputs, mean = module.loss(problem, codes, student, teacher, heat)
    # squeezed, not indexed: the gradient of an index is a copy into zeros
    total, energy, data, distance = outputs if heads else [output.squeeze(0) for output in outputs]
    return SmooSegLoss(total, energy, data, distance, mean)


@outside_autocast
def smoothness_energy(
    features: Tensor,
    probs: Tensor,
    partners: Tensor | Sequence[str | Tensor],
    thresholds: Tensor | Sequence[float],
    *,
    relative: bool = False,
    center: bool = True,
    channel_scale: Tensor | None = None,
    patch_weight: Tensor | None = None,
    feature_norms: Tensor | None = None,
    mean: Tensor | None = None,
    impl: str = "auto",
) -> SmoothnessTerms:
    """Computes the smoothness energies alone, for any label distributions (Lan et al. 2023, arXiv 2310.17874).

    Args:
        probs: [B,P,K] label distributions, or rows of any positive length, because only their cosines count. Get
            gradients.

    The other arguments, the dtype of the results and the errors are those of `smooseg_loss`.

    Returns:
        SmoothnessTerms.
    """
    checks.float_tensor("features", features, ("B", "P", "D"), constant=True)
    checks.float_tensor("probs", probs, (*features.shape[:2], "K"), features)
    module = implementation(impl, (probs.shape[-1], 1), features, probs)
    problem = energy_problem(
        module,
        (features, probs),
        partners,
        thresholds,
        heads=None,
        relative=relative,
        center=center,
        channel_scale=channel_scale,
        patch_weight=patch_weight,
        feature_norms=feature_norms,
        mean=mean,
    )
    energy, distance, mean = module.smoothness(problem, probs[None])
    return SmoothnessTerms(energy.squeeze(0), distance.squeeze(0), mean)


def energy_problem(
    module: ModuleType,
    tensors: tuple[Tensor, ...],
    partners: Tensor | Sequence[str | Tensor],
    thresholds: Tensor | Sequence[float],
    *,
    heads: int | None,
    relative: bool,
    center: bool,
    channel_scale: Tensor | None,
    patch_weight: Tensor | None,
    feature_norms: Tensor | None,
    mean: Tensor | None,
) -> Problem:
    """Checks the arguments that both energies share. `tensors` are checked inputs, the features first."""
    features = tensors[0]
    B, P, D = features.shape
    dtype = accumulation_dtype(*tensors)
    pair_sets = checks.pair_sets(partners, B, features.device, clamp=not clamps_partners(module))
    T = len(pair_sets)
    if channel_scale is not None and feature_norms is not None:
        raise ValueError(
            "feature_norms cannot be used with channel_scale, which changes the norms: leave one of them out"
        )
    return Problem(
        features=features,
        partners=pair_sets,
        thresholds=checks.threshold_table(thresholds, T, heads, dtype, features.device),
        relative=bool(relative),
        center=bool(center),
        channel_scale=checks.optional_constant("channel_scale", channel_scale, (B, D), features, dtype),
        patch_weight=checks.weights(patch_weight, (B, P), features, dtype),
        feature_norms=checks.optional_constant("feature_norms", feature_norms, (B, P), features, dtype),
        mean=checks.optional_constant("mean", mean, (T,), features, dtype),
    )
