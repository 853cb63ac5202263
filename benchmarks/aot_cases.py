"""The calls that aot_report.py compiles: the operators' launchers on tensors without memory."""

from __future__ import annotations

from functools import partial

import torch

from smooseg_kernels.triton import (
    assignment,
    code_rows,
    contrast,
    gaussian,
    objective,
    pair_histogram,
    pair_options,
    pairs,
    projection,
    similarity,
)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def objective_case(dtype: torch.dtype, H: int, entries=(-1, 0), *, full=False, scaled=False, K=27) -> None:
    """Forward and backward. `scaled`: channel masks of dropout; `full`: every option, every upstream gradient."""
    B, P, D, Z, T = 32, 784, 384, 64, len(entries)
    features, codes = tensor(B, P, D, dtype=dtype), tensor(H, B, P, Z, dtype=dtype)
    student, teacher = tensor(H, K, Z), tensor(H, K, Z)
    partners, thresholds = tensor(1, B, dtype=torch.int64), tensor(H, T)
    scale, weight = tensor(B, D) if full or scaled else None, tensor(B, P) if full else None
    common = (features, codes, student, teacher, partners, entries, thresholds, scale, weight)
    out = objective.objective.launcher(*common, None, None, 0.1, full, True, True, True)
    upstream = [x if full or i == 0 else None for i, x in enumerate(out[:4])]
    objective.objective_backward.launcher(*upstream, *common, out[4], list(out[5:]), 0.1, full, True, True, True)


def rows_case(dtype: torch.dtype) -> None:
    codes, prototypes = tensor(1, 32, 784, 64, dtype=dtype), tensor(1, 27, 64)
    out = code_rows.probabilities.launcher(codes, prototypes, 0.1)
    code_rows.probabilities_backward.launcher(out, codes, prototypes, 0.1)
    code_rows.data_term.launcher(codes, prototypes, prototypes, None, True)
    labels = tensor(32, 320, 320, dtype=torch.uint8)
    assignment.assign.launcher(codes[0], prototypes[0], [28, 28], [320, 320], labels, 27)


def statistics_case(dtype: torch.dtype, entries: tuple[int, ...] = (-1,), full: bool = False) -> None:
    """Means, histogram and 32 neighbours; `full`: centred, weighted, the most bins and neighbours."""
    features, partners = tensor(32, 784, 384, dtype=dtype), tensor(1, 32, dtype=torch.int64)
    weight = tensor(32, 784) if full else None
    bins, neighbours = (similarity.LARGEST_BINS, similarity.LARGEST_NEIGHBOURS) if full else (512, 32)
    rows = (features, partners, list(entries), weight, None)
    similarity.similarity_statistics.launcher(*rows, True, bins, -1.5, 1.5, neighbours)


def pairs_case(dtype: torch.dtype, points: int = 784, full: bool = False, D: int = 384, Z: int = 70) -> None:
    """Forward and backward; `full`: a partner index, hinge, means, and upstream gradients to all outputs."""
    rows, number = (tensor(32, points, D, dtype=dtype), tensor(32, points, Z, dtype=dtype)), tensor()
    partner = tensor(32, dtype=torch.int64) if full else None
    common = (*rows, *rows, number, partner)
    out = pairs.pair_energy.launcher(*common, 0.0, 0.8, full, True, full, True)
    upstream = (number, number if full else None, number if full else None)
    pairs.pair_energy_backward.launcher(*upstream, *common, list(out[4:]), 0.0, 0.8, full, True, full, True, True)


def pair_options_case(dtype: torch.dtype) -> None:
    """Forward and backward with weights, a partner index, and both rows."""
    (B, P, Z), f32 = (32, 784, 70), torch.float32
    features, codes, rows = tensor(B, P, 384, dtype=dtype), tensor(B, P, Z, dtype=f32), tensor(B, P, dtype=f32)
    side, partner = (features, rows, codes), tensor(B, dtype=torch.int64)
    common = (*side, *side, partner, rows, rows, dtype != f32, 0.0, 0.8, False)
    pair_options.pair_rows.launcher(*common, True, True)
    pair_options.pair_rows_backward.launcher(rows, rows, *common)


def pair_bins_case() -> None:
    """Asks for as many bins as the kernel counts, with a partner index."""
    codes, partner = tensor(32, 784, 70), tensor(32, dtype=torch.int64)
    pair_histogram.pair_histogram.launcher(codes, codes, partner, similarity.LARGEST_BINS, -1.0, 1.0)


def contrast_case(dtype: torch.dtype, *, labels: bool = False, full: bool = False, Z: int = 64) -> None:
    """Forward and backward on all patches of an image; `full`: every option."""
    codes, sums, number = tensor(32, 784, Z, dtype=dtype), tensor(32, 784), tensor()
    label = tensor(32, 784, dtype=torch.int64) if labels else None
    features = None if labels else tensor(32, 784, 384, dtype=dtype)
    threshold = None if labels else sums
    common = (codes, codes, number, label, label, features, features, threshold, *[sums if full else None] * 2)
    out = contrast.contrast.launcher(*common, True, full)
    contrast.contrast_backward.launcher(sums, sums, *common, list(out), True, full, True, True)


def projection_case(dtype: torch.dtype, H: int = 1, D: int = 384) -> None:
    """A step's codes and their gradient to the projection, with dropout."""
    B, P, Z, mask = 32, 784, 64, tensor(32, D)
    shapes = (H, Z, D), (H, Z), (H, D, D), (H, D), (H, Z, D)
    weights = [tensor(*shape).requires_grad_() for shape in shapes]
    codes = projection.Projection.apply(tensor(B, P, D, dtype=dtype), mask, mask, *weights)
    torch.autograd.grad(codes, weights, torch.empty_like(codes))


# nearly the same programs as another case's, with fewer options or of another size: a sample does without
REPEATED = ("bf16 H=1", "bf16 H=16", "fp16 H=1", "bf16 pairs, P=121", "bf16 pairs, D=768", "bf16 pairs, Z=200")
REPEATED += ("bf16 contrast", "bf16 contrast, labels", "bf16 statistics", "fp32 statistics", "fp32 rows")
REPEATED += ("bf16 gaussian, K=135", "fp32 gaussian, K=135", "fp16 projection, H=4, D=104")


def shipped_cases(amount: str = "all") -> dict:
    """Calls by name; `amount`: "all", "sample" for each kernel and option once, or "step" for those of a training."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = {
        "bf16 dropout": partial(objective_case, bf16, 1, scaled=True),
        "bf16 dropout, H=16": partial(objective_case, bf16, 16, scaled=True),
        "bf16 pairs": partial(pairs_case, bf16),
        "bf16 projection": partial(projection_case, bf16),
    }
    if amount == "step":
        return cases
    for name, dtype, heads in (("bf16", bf16, 1), ("bf16", bf16, 16), ("fp16", fp16, 1), ("fp32", fp32, 1)):
        cases[f"{name} H={heads}"] = partial(objective_case, dtype, heads)
    cases["fp16 projection, H=4, D=104"] = partial(projection_case, fp16, 4, 104)
    cases["bf16 H=16, K=100"] = partial(objective_case, bf16, 16, K=100)
    for name, dtype, heads in (("bf16", bf16, 1), ("bf16", bf16, 16), ("fp16", fp16, 16)):
        title = f"{name} every option" + (f", H={heads}" if heads > 1 else "")
        cases[title] = partial(objective_case, dtype, heads, (-1, 0, -2), full=True)
    cases |= {
        "bf16 pairs, P=121": partial(pairs_case, bf16, 121),
        "bf16 pairs, options": partial(pairs_case, bf16, full=True),
        "bf16 pairs, rows": partial(pair_options_case, bf16),
        "fp32 pairs": partial(pairs_case, fp32),
        "fp32 pairs, bins": pair_bins_case,
        "bf16 pairs, D=768": partial(pairs_case, bf16, D=768),
        "bf16 pairs, Z=200": partial(pairs_case, bf16, Z=200),
        "bf16 pairs, D=768, Z=512": partial(pairs_case, bf16, D=768, Z=512),
    }
    cases |= {
        "bf16 contrast": partial(contrast_case, bf16),
        "bf16 contrast, options": partial(contrast_case, bf16, full=True),
        "bf16 contrast, labels": partial(contrast_case, bf16, labels=True),
        "bf16 contrast, Z=200": partial(contrast_case, bf16, Z=200),
        "fp32 contrast": partial(contrast_case, fp32),
    }
    for name, dtype in (("bf16", bf16), ("fp32", fp32)):
        cases[f"{name} rows"] = partial(rows_case, dtype)
        cases[f"{name} statistics"] = partial(statistics_case, dtype)
        cases[f"{name} statistics, every option"] = partial(statistics_case, dtype, (0, -2), full=True)
        for K in (27, 135):  # a picture's labels; the moments of their gradient to the points
            pixels, values = tensor(1, 320 * 320, 5), tensor(1, 320 * 320, K, dtype=dtype)
            cases[f"{name} gaussian, K={K}"] = partial(gaussian.gaussian_sums.launcher, pixels, values, 0.0)
    return {name: case for name, case in cases.items() if amount == "all" or name not in REPEATED}
