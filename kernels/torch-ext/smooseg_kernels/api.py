"""The front door: validates, brings the arguments into one canonical form and picks the implementation."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import checks, dense, moments, tiles
from .derivatives import refuse_forward_mode
from .precision import outside_autocast
from .rows import accumulation_dtype
from .types import PairEnergy, SmooSegLoss, SmoothnessTerms

IMPLS = {"dense": dense, "torch": moments}
PAIR_IMPLS = {"dense": dense, "torch": tiles}  # of energies that do not factor


def resolve_impl(impl: str, prototypes: tuple[int, int], *tensors: Tensor) -> str:
    """What `impl` stands for with (K, Z) prototypes and inputs such as `tensors`: "auto" is "triton" where that serves all of them.

    ValueError for a name that is not known.
    """
    if impl not in ("auto", "triton", *IMPLS):
        raise ValueError(f'impl must be "auto", "triton", "torch" or "dense", got {impl!r}')
    if impl == "auto":
        return "triton" if triton_serves(prototypes, tensors) else "torch"
    return impl


def implementation(
    impl: str, prototypes: tuple[int, int], *tensors: Tensor, forms: dict[str, ModuleType] = IMPLS
) -> ModuleType:
    """An explicit choice is honoured or raises, never swapped; `tensors` are checked inputs."""
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
            f'impl="triton" keeps K = {prototypes[0]} prototypes on chip at most while K * Z is about 8000: use impl="torch"'
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
    """The whole SmooSeg objective: smoothness energies of T pair sets plus the student's data term.

    Label distributions are softmax(cos(code, teacher) / temperature); closeness is W_ij = cos(f_i, f_j) - its mean over j + M, with M
    the mean over the pair set (W = cos without `center`); energy is the mean of (W_ij - b) (1 - cos(p_i, p_j)); the data term is the
    cross-entropy of cos(stopgrad(code), student) against argmax cos(code, teacher). Lan et al. 2023, arXiv 2310.17874.

    Args:
        features: [B,P,D] frozen patch features, of lengths to 1e19; a row shorter than 1e-10 has cosine 0 to all.
        codes: [B,P,Z], or [H,B,P,Z] for H heads on the same features. Gets gradients, through the energies only.
        student: [K,Z] or [H,K,Z], any length. Gets gradients, through the data term only.
        teacher: like student, a constant.
        partners: int64 [T,B] image numbers, or a sequence of T entries, each int64 [B], "self" (the image itself) or "all" (every ordered
            pair of different images, B >= 2). Numbers are checked on a CPU; on a GPU, where looking would wait for the device, one out of
            range is taken as the nearest image, unless the environment has SMOOSEG_CHECK_INDICES=1 (which checks patch_weight too).
        thresholds: [T], or [H,T] with heads. Patches more alike than b are pulled together, the others pushed apart.
        temperature: a finite number above 0, a constant.
        relative: thresholds are an excess over the measured mean closeness, b = M + threshold.
        channel_scale: [B,D] multiplies an image's features on whichever side it stands (dropout masks), without a copy that stays.
        patch_weight: [B,P] >= 0. Means over i, j are weighted by w_i w'_j, the data term by w_i; an image without weight is left out.
        feature_norms: [B,P] the features' row norms, to spare computing them; not together with channel_scale.
        mean: [T] takes the place of the measured M (data-parallel runs average it first).
        impl: "auto", "triton", "torch" or "dense".

    Returns:
        SmooSegLoss, fp32 (fp64 for fp64 inputs). With heads everything but `mean` has a leading [H] and equals H single calls. fp16 codes
        need loss scaling: their gradients underflow.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.float_tensor("features", features, ("B", "P", "D"), constant=True)
    B, P, _ = features.shape
    H = codes.shape[0] if isinstance(codes, Tensor) and codes.dim() == 4 else None
    heads = () if H is None else (H,)
    checks.float_tensor("codes", codes, (*("H" for _ in heads), B, P, "Z"), features)
    checks.float_tensor("student", student, (*heads, "K", codes.shape[-1]), features)
    checks.float_tensor("teacher", teacher, tuple(student.shape), features, constant=True)
    tensors, constants = (features, codes, student, teacher), (channel_scale, patch_weight, feature_norms, mean)
    module = implementation(impl, tuple(student.shape[-2:]), *tensors)
    pair_sets, options = energy_arguments(module, tensors, partners, thresholds, H, relative, center, *constants)
    canonical = (codes, student, teacher) if H is not None else (codes[None], student[None], teacher[None])
    *outputs, mean = module.loss(
        features, *canonical, pair_sets, temperature=checks.temperature(temperature), **options
    )
    # squeezed, not indexed: the gradient of an index is a copy into zeros
    total, energy, data, distance = outputs if H is not None else [output.squeeze(0) for output in outputs]
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
    """The smoothness energies alone, of label rows `probs` [B,P,K] of any positive length (cosine is what counts). Gradient to `probs`.

    The other arguments, the returned dtypes and the errors are those of `smooseg_loss`.
    """
    checks.float_tensor("features", features, ("B", "P", "D"), constant=True)
    checks.float_tensor("probs", probs, (*features.shape[:2], "K"), features)
    module = implementation(impl, (probs.shape[-1], 1), features, probs)
    pair_sets, options = energy_arguments(
        module,
        (features, probs),
        partners,
        thresholds,
        None,
        relative,
        center,
        channel_scale,
        patch_weight,
        feature_norms,
        mean,
    )
    energy, distance, mean = module.smoothness(features, probs[None], pair_sets, **options)
    return SmoothnessTerms(energy.squeeze(0), distance.squeeze(0), mean)


def energy_arguments(
    module, tensors, partners, thresholds, H, relative, center, channel_scale, patch_weight, feature_norms, mean
):
    """The arguments that both energies share -> pair sets and keyword arguments, checked, constants in the accumulation dtype."""
    features = tensors[0]
    B, P, D = features.shape
    dtype = accumulation_dtype(*tensors)
    pair_sets = checks.pair_sets(partners, B, features.device, clamp=not getattr(module, "CLAMPS_PARTNERS", False))
    if channel_scale is not None and feature_norms is not None:
        raise ValueError(
            "feature_norms cannot be used with channel_scale, which changes the norms: leave one of them out"
        )
    return pair_sets, {
        "thresholds": checks.threshold_table(thresholds, len(pair_sets), H, dtype, features.device),
        "relative": bool(relative),
        "center": bool(center),
        "channel_scale": checks.optional_constant("channel_scale", channel_scale, (B, D), features, dtype),
        "patch_weight": checks.weights(patch_weight, (B, P), features, dtype),
        "feature_norms": checks.optional_constant("feature_norms", feature_norms, (B, P), features, dtype),
        "mean": checks.optional_constant("mean", mean, (len(pair_sets),), features, dtype),
    }


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
    """The correlation energy of two sets of patches with a clamp on the codes' similarity, as STEGO, DepthG and EAGLE train on.

    energy = mean over (image, i, j) of -clamp(cos(c_i, c_j), low, high) * V_ij with V = W - b, or max(W - b, 0) with `hinge`; closeness
    W_ij = S_ij - mean_j S_ij + mean(S) of S_ij = cos(f_i, f_j), the last mean over all pairs of all images, or W = S without `center`.
    Hamilton et al., ICLR 2022, arXiv 2203.08414: there b is the shift, and the clamp (0, None), or (0, 0.8) where it is stabilised.

    Args:
        features_i: [B,P_i,D] frozen patch features, any length; features_j: [N,P_j,D]. Constants.
        codes_i: [B,P_i,Z] and codes_j: [N,P_j,Z], any length. Both get gradients; at a bound of the clamp the gradient passes, beyond it
            does not, as torch.clamp has it.
        threshold: b, a finite number or a tensor of shape [] (which a captured graph reads anew each time). A constant.
        partner: int64 [B], the image of the j side that each image of the i side meets; repeats are welcome. None: the one of the same
            number (N = B). Checked on a CPU; on a GPU one out of range is taken as the nearest image, unless SMOOSEG_CHECK_INDICES=1.
        clamp: (low, high), low <= high, each a number or None for no bound.
        impl: "auto", "triton", "torch" or "dense". "dense" writes [B,P_i,P_j] matrices; "torch" works in blocks of bounded size, and in
            time linear in P without clamp and hinge; "triton" keeps blocks in registers.

    Returns:
        PairEnergy, fp32 (fp64 for fp64 inputs). fp16 codes need loss scaling: their gradients underflow.
        Gradients of gradients: of "dense" alone.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
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
        partner = checks.index_vector(
            "partner", partner, B, N, features_i.device, clamp=not getattr(module, "CLAMPS_PARTNERS", False)
        )
    return PairEnergy(
        *module.pair_energy(
            *tensors,
            checks.scalar("threshold", threshold, accumulation_dtype(*tensors), features_i.device),
            partner,
            checks.bounds("clamp", clamp),
            bool(hinge),
            bool(center),
        )
    )


@outside_autocast
def prototype_probabilities(
    codes: Tensor, prototypes: Tensor, *, temperature: float = 0.1, impl: str = "auto"
) -> Tensor:
    """softmax_k(cos(code, prototype_k) / temperature): [B,P,Z], [K,Z] -> [B,P,K], fp32 (fp64 for fp64). Gradients to both."""
    checks.float_tensor("codes", codes, ("B", "P", "Z"))
    checks.float_tensor("prototypes", prototypes, ("K", codes.shape[-1]), codes)
    module = implementation(impl, tuple(prototypes.shape), codes, prototypes)
    return module.probabilities(codes[None], prototypes[None], checks.temperature(temperature)).squeeze(0)


@outside_autocast
def prototype_loss(
    codes: Tensor, student: Tensor, teacher: Tensor, *, patch_weight: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """The data term: mean cross-entropy of cos(stopgrad(code), student) against argmax cos(code, teacher), no temperature.

    codes [B,P,Z], student and teacher [K,Z], patch_weight [B,P] >= 0 -> scalar, fp32 (fp64 for fp64). Gradient to the student only.
    """
    checks.float_tensor("codes", codes, ("B", "P", "Z"))
    checks.float_tensor("student", student, ("K", codes.shape[-1]), codes)
    checks.float_tensor("teacher", teacher, tuple(student.shape), codes, constant=True)
    weight = checks.weights(patch_weight, tuple(codes.shape[:2]), codes, accumulation_dtype(codes, student, teacher))
    module = implementation(impl, tuple(student.shape), codes, student, teacher)
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
    """The nearest prototype of every patch, or of every pixel of bilinearly upsampled codes (align_corners=False).

    Nearest is by cosine; ties go to the lowest index.

    Args:
        codes: [B,P,Z]; prototypes: [K,Z].
        grid, size: (h, w) with h * w = P, patches row by row, and (H, W) pixels; both or neither.
        labels: integers [B,H,W] (or [B,P] without a grid), with `classes`; values outside 0 .. classes - 1 are ignored.

    Returns:
        int64 [B,P] or [B,H,W]; with labels a tuple of it and the int64 [K, classes] counts of (assigned, labelled) pixels.
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
    module = implementation(impl, tuple(prototypes.shape), codes, prototypes)
    if labels is None:
        with torch.no_grad():
            return module.assign(codes, prototypes, grid, size)
    expected = (codes.shape[0], *(size or codes.shape[1:2]))
    if not isinstance(labels, Tensor) or labels.dtype not in checks.INTEGERS:
        raise TypeError(
            f"labels must be an integer tensor {list(expected)}, got {getattr(labels, 'dtype', type(labels).__name__)}"
        )
    if tuple(labels.shape) != expected or labels.device != codes.device:
        raise ValueError(
            f"labels must have shape {list(expected)} on {codes.device}, got {list(labels.shape)} on {labels.device}"
        )
    classes = checks.count("classes", classes)
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    with torch.no_grad():
        if hasattr(module, "assign_counted"):  # counts in the same kernel
            return module.assign_counted(codes, prototypes, grid, size, labels, classes)
        assigned = module.assign(codes, prototypes, grid, size)
        return assigned, confusion_counts(assigned, labels, prototypes.shape[0], classes)


def confusion_counts(assigned: Tensor, labels: Tensor, K: int, classes: int) -> Tensor:
    """[K, classes] int64, exact: integer additions, in any order. Ignored pixels go to a spare cell that is dropped."""
    labels = labels.long()
    cell = torch.where((labels >= 0) & (labels < classes), assigned * classes + labels, K * classes).flatten()
    counts = torch.zeros(K * classes + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell))[:-1].view(K, classes)
