"""The front door of the functions of codes and prototypes: probs, the data term, and assignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from . import checks
from .dispatch import implementation
from .precision import outside_autocast
from .rows import accumulation_dtype


@outside_autocast
def prototype_probabilities(
    codes: Tensor, prototypes: Tensor, *, temperature: float | Tensor = 0.1, impl: str = "auto"
) -> Tensor:
    """Computes label distributions, softmax_k(cos(code, prototype_k) / temperature) (Lan et al. 2023, arXiv
    2310.17874).

    Args:
        codes: [B,P,Z], rows of any length. Get gradients.
        prototypes: [K,Z], rows of any length. Get gradients.
        temperature: above 0, a finite number or a tensor [], which a captured graph reads at every replay. A constant.
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
    heat = checks.temperature(temperature, accumulation_dtype(codes, prototypes), codes.device)
    return module.probabilities(codes[None], prototypes[None], heat).squeeze(0)


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


@overload
def assign(
    codes: Tensor,
    prototypes: Tensor,
    *,
    grid: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    labels: None = None,
    classes: None = None,
    impl: str = "auto",
) -> Tensor: ...


@overload
def assign(
    codes: Tensor,
    prototypes: Tensor,
    *,
    grid: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    labels: Tensor,
    classes: int,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


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
