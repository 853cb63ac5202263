"""The front door: checks the arguments, brings them into one canonical form and picks the implementation."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import checks, dense, moments, tiles
from .derivatives import refuse_forward_mode
from .precision import outside_autocast
from .problem import PairProblem, Problem
from .rows import accumulation_dtype
from .types import PairEnergy, SmooSegLoss, SmoothnessTerms

IMPLS = {"dense": dense, "torch": moments}
PAIR_IMPLS = {"dense": dense, "torch": tiles}  # for energies that do not factor


def resolve_impl(impl: str, prototypes: tuple[int, int], *tensors: Tensor) -> str:
    """Tells which implementation `impl` stands for.

    Args:
        impl: "auto", "triton", "torch" or "dense".
        prototypes: their shape (K, Z).
        tensors: the other inputs, or tensors of the same dtypes and devices.

    Returns:
        `impl` itself, or for "auto": "triton" where Triton serves all tensors (see `smooseg_loss`), else "torch".

    Raises:
        ValueError: `impl` is not one of the four names.
    """
    if impl not in ("auto", "triton", *IMPLS):
        raise ValueError(f'impl must be "auto", "triton", "torch" or "dense", got {impl!r}')
    if impl == "auto":
        return "triton" if triton_serves(prototypes, tensors) else "torch"
    return impl


def implementation(
    impl: str, prototypes: tuple[int, int], *tensors: Tensor, forms: dict[str, ModuleType] = IMPLS
) -> ModuleType:
    """Picks the module for checked `tensors`. An explicit choice is honoured or raises; it is never swapped."""
    impl = resolve_impl(impl, prototypes, *tensors)
    if impl in forms:
        return forms[impl]
    if not has_triton():
        raise RuntimeError(
            'impl="triton" needs Triton, which is not installed: pip install triton, or use impl="torch" (or "auto")'
        )
    if any(t.dtype == torch.float64 for t in tensors):
        raise TypeError('impl="triton" takes fp32, fp16 and bf16, got fp64: use impl="torch" or "dense"')
    from . import triton as fused

    if not fused.fits(*prototypes):
        raise ValueError(
            f'impl="triton" cannot keep K = {prototypes[0]} prototypes on chip (K * Z to about 8000): use impl="torch"'
        )
    if tensors[0].device.type == "cpu":
        fused.require_interpreter()
    refuse_forward_mode(*tensors)
    return fused


def triton_serves(prototypes: tuple[int, int], tensors: tuple[Tensor, ...]) -> bool:
    if not all(t.is_cuda and t.dtype != torch.float64 for t in tensors) or not has_triton():
        return False
    from . import triton as fused

    return fused.fits(*prototypes)


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def clamps_partners(module: ModuleType) -> bool:
    """Tells whether the implementation's kernels clamp partner numbers themselves, which spares a launch."""
    return getattr(module, "CLAMPS_PARTNERS", False)


@outside_autocast
def smooseg_loss(
    features: Tensor,
    codes: Tensor,
    student: Tensor,
    teacher: Tensor,
    partners: Tensor | Sequence[str | Tensor],
    thresholds: Tensor | Sequence[float],
    *,
    temperature: float = 0.1,
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
        temperature: a finite number above 0, a constant.
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
    *outputs, mean = module.loss(problem, codes, student, teacher, checks.temperature(temperature))
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
    impl: str = "auto",
) -> PairEnergy:
    """Computes the correlation energy of two sets of patches, with a clamp on the codes' similarity, as in STEGO,
    DepthG and EAGLE.

    energy = mean over (image, i, j) of -clamp(cos(c_i, c_j), low, high) V_ij with V = W - b, or max(W - b, 0) with
    `hinge`. With S_ij = cos(f_i, f_j), the closeness is W_ij = S_ij - mean_j S_ij + mean(S), where the last mean is
    over all pairs of all images; without `center` it is W = S. In Hamilton et al., ICLR 2022, arXiv 2203.08414, b is
    called the shift, and the clamp is (0, None), or (0, 0.8) where it is stabilised.

    Args:
        features_i: [B,P_i,D] frozen patch features, rows of any length. A constant.
        codes_i: [B,P_i,Z], rows of any length. Get gradients; these pass at a bound of the clamp and stop beyond it, as
            in torch.clamp.
        features_j: [N,P_j,D], like features_i.
        codes_j: [N,P_j,Z], like codes_i.
        threshold: b, a finite number or a tensor of shape [], which a captured graph reads at every replay. A constant.
        partner: int64 [B], the image of the j side that each image of the i side meets; repeats are allowed. None pairs
            images of the same number (N = B). Checked on a CPU. On a GPU a number out of range is taken as the nearest
            image, unless SMOOSEG_CHECK_INDICES=1 is set in the environment.
        clamp: (low, high) with low <= high, each a number or None for no bound.
        hinge: pulls only: V = max(W - b, 0).
        center: see above.
        impl: "auto", "triton", "torch" or "dense". "dense" writes [B,P_i,P_j] matrices. "torch" works in blocks of
            bounded size, and in time linear in P without clamp and hinge. "triton" keeps the blocks in registers.

    Returns:
        PairEnergy, fp32 (fp64 with any fp64 input). fp16 codes need loss scaling, because their gradients underflow.
        Only "dense" has gradients of gradients.

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
        RuntimeError: impl="triton" cannot run here.
    """
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
    tensors = (features_i, codes_i, features_j, codes_j)
    module = implementation(impl, (1, 1), *tensors, forms=PAIR_IMPLS)
    if partner is not None:
        partner = checks.index_vector("partner", partner, B, N, features_i.device, clamp=not clamps_partners(module))
    problem = PairProblem(
        features_i=features_i,
        codes_i=codes_i,
        features_j=features_j,
        codes_j=codes_j,
        threshold=checks.scalar("threshold", threshold, accumulation_dtype(*tensors), features_i.device),
        partner=partner,
        clamp=checks.bounds("clamp", clamp),
        hinge=bool(hinge),
        center=bool(center),
    )
    energy, similarity = module.pair_energy(problem)
    return PairEnergy(energy, similarity)


@outside_autocast
def prototype_probabilities(
    codes: Tensor, prototypes: Tensor, *, temperature: float = 0.1, impl: str = "auto"
) -> Tensor:
    """Computes label distributions, softmax_k(cos(code, prototype_k) / temperature) (Lan et al. 2023, arXiv
    2310.17874).

    Args:
        codes: [B,P,Z], rows of any length. Get gradients.
        prototypes: [K,Z], rows of any length. Get gradients.
        temperature: a finite number above 0, a constant.
        impl: "auto", "triton", "torch" or "dense".

    Returns:
        probs [B,P,K], fp32 (fp64 with any fp64 input).

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
        RuntimeError: impl="triton" cannot run here.
    """
    checks.float_tensor("codes", codes, ("B", "P", "Z"))
    checks.float_tensor("prototypes", prototypes, ("K", codes.shape[-1]), codes)
    module = implementation(impl, (prototypes.shape[0], prototypes.shape[1]), codes, prototypes)
    return module.probabilities(codes[None], prototypes[None], checks.temperature(temperature)).squeeze(0)


@outside_autocast
def prototype_loss(
    codes: Tensor, student: Tensor, teacher: Tensor, *, patch_weight: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Computes the data term: the mean cross-entropy of cos(stopgrad(code), student) against argmax cos(code, teacher).

    There is no temperature. Lan et al. 2023, arXiv 2310.17874.

    Args:
        codes: [B,P,Z], rows of any length. Get no gradient.
        student: [K,Z], rows of any length. Gets gradients.
        teacher: [K,Z], rows of any length. A constant.
        patch_weight: [B,P], 0 or more and finite, weights the mean. The loss is 0 where all weights are.
        impl: "auto", "triton", "torch" or "dense".

    Returns:
        A scalar, fp32 (fp64 with any fp64 input).

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
        RuntimeError: impl="triton" cannot run here.
    """
    checks.float_tensor("codes", codes, ("B", "P", "Z"))
    checks.float_tensor("student", student, ("K", codes.shape[-1]), codes)
    checks.float_tensor("teacher", teacher, tuple(student.shape), codes, constant=True)
    B, P, _ = codes.shape
    weight = checks.weights(patch_weight, (B, P), codes, accumulation_dtype(codes, student, teacher))
    module = implementation(impl, (student.shape[0], student.shape[1]), codes, student, teacher)
    return module.data_term(codes[None], student[None], teacher[None], weight).squeeze(0)


@outside_autocast
def assign(
    codes: Tensor,
    prototypes: Tensor,
    *,
    grid: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    labels: Tensor | None = None,
    classes: int | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Finds the nearest prototype of every patch, or of every pixel of bilinearly upsampled codes
    (align_corners=False).

    The nearest prototype has the largest cosine; ties go to the lowest index. No gradients.

    Args:
        codes: [B,P,Z], rows of any length.
        prototypes: [K,Z], rows of any length.
        grid: (h, w) with h * w = P, patches row by row. Goes with size.
        size: (H, W) pixels. Goes with grid.
        labels: ground truth, integers [B,H,W], or [B,P] without a grid. Values outside 0 .. classes - 1 are ignored.
            Goes with classes.
        classes: number of classes of the ground truth, at least 1. Goes with labels.
        impl: "auto", "triton", "torch" or "dense".

    Returns:
        int64 [B,P] or [B,H,W] prototype numbers. With labels, a tuple of them and of the int64 [K,classes] counts of
        pixels by (prototype, class).

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
        RuntimeError: impl="triton" cannot run here.
    """
    checks.float_tensor("codes", codes, ("B", "P", "Z"))
    checks.float_tensor("prototypes", prototypes, ("K", codes.shape[-1]), codes)
    grid, size = checks.size_pair("grid", grid), checks.size_pair("size", size)
    if (grid is None) != (size is None):
        raise ValueError(f"grid and size go together, got grid={grid} and size={size}")
    if grid is not None and grid[0] * grid[1] != codes.shape[1]:
        raise ValueError(f"grid {grid} has {grid[0] * grid[1]} patches, but codes has {codes.shape[1]}")
    if (labels is None) != (classes is None):
        raise ValueError("labels and classes go together: the counts need both")
    module = implementation(impl, (prototypes.shape[0], prototypes.shape[1]), codes, prototypes)
    if labels is None or classes is None:
        with torch.no_grad():
            return module.assign(codes, prototypes, grid, size)
    checks.truth("labels", labels, (codes.shape[0], *(size or codes.shape[1:2])), codes)
    classes = checks.count("classes", classes)
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    with torch.no_grad():
        if hasattr(module, "assign_counted"):  # the same kernel counts
            return module.assign_counted(codes, prototypes, grid, size, labels, classes)
        assigned = module.assign(codes, prototypes, grid, size)
        return assigned, confusion_counts(assigned, labels, prototypes.shape[0], classes)


def confusion_counts(labels: Tensor, truth: Tensor, K: int, classes: int) -> Tensor:
    """Counts pixels by (prototype, class) in int64 [K,classes]. Ignored pixels go to a spare cell that is dropped."""
    truth = truth.long()
    cell = torch.where((truth >= 0) & (truth < classes), labels * classes + truth, K * classes).flatten()
    counts = torch.zeros(K * classes + 1, dtype=torch.int64, device=truth.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell))[:-1].view(K, classes)
