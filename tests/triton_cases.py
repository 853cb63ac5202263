"""Inputs, values with gradients, and the error budget for tests and benchmarks of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from smooseg_kernels import smooseg_loss

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-52}
# on a card an fp32 dot is three tf32 products, which leave out the product of the two low parts: 2^-22 of a term
FP32_EPS = 2.0**-22 if torch.cuda.is_available() else EPS[torch.float32]


@dataclass
class Case:
    features: Tensor
    codes: Tensor
    student: Tensor
    teacher: Tensor
    partners: list
    thresholds: Tensor
    options: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        """Converts every tensor to `dtype`."""
        tensors = (
            x.detach().to(dtype) for x in (self.features, self.codes, self.student, self.teacher, self.thresholds)
        )
        features, codes, student, teacher, thresholds = tensors
        options = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return Case(features, codes, student, teacher, self.partners, thresholds, options)


def make_case(
    B=2, P=17, D=5, K=3, Z=6, H=None, dtype=torch.float32, device="cpu", partners=("self", "index"), seed=0, **options
) -> Case:
    """Makes features with a common mean, codes near prototypes (a peaked softmax), fp32 prototypes of any length."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    heads = () if H is None else (H,)
    features = normal(B, P, D) + normal(B, 1, D) + 0.5 * normal(1, 1, D)
    teacher = normal(*heads, K, Z)
    student = teacher + 0.3 * normal(*heads, K, Z)
    nearest = torch.randint(0, K, (*heads, B, P), generator=generator)
    codes = torch.gather(
        teacher[..., None, :, :].expand(*heads, B, K, Z), -2, nearest[..., None].expand(*nearest.shape, Z)
    )
    codes = 2.0 * (codes + 0.7 * normal(*heads, B, P, Z))
    entries = [
        torch.randint(0, B, (B,), generator=generator).to(device) if entry == "index" else entry for entry in partners
    ]
    thresholds = 0.2 * normal(*heads, len(entries))
    moved = [x.to(device) for x in (features.to(dtype), codes.to(dtype), student, teacher, thresholds)]
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    return Case(*moved[:4], entries, moved[4], options)


@dataclass
class Result:
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def evaluate(case: Case, impl: str, upstream: dict[str, Tensor] | None = None) -> Result:
    """Returns all outputs, and the gradients for the given upstream gradients (default: 1.7 to the total)."""
    codes, student = case.codes.detach().clone().requires_grad_(), case.student.detach().clone().requires_grad_()
    out = smooseg_loss(
        case.features, codes, student, case.teacher, case.partners, case.thresholds, impl=impl, **case.options
    )
    upstream = {"total": torch.full_like(out.total, 1.7)} if upstream is None else upstream
    outputs = [getattr(out, name) for name in upstream]
    weights = [g.to(o) for g, o in zip(upstream.values(), outputs)]
    gradients = torch.autograd.grad(outputs, [codes, student], weights, allow_unused=True)
    named = {name: g for name, g in zip(("codes", "student"), gradients) if g is not None}
    return Result({name: value.detach() for name, value in out._asdict().items()}, named)


def term_size(case: Case) -> float:
    """Bounds the mean magnitude of the energies' terms, |W_ij - b| (1 - cos). The energy itself nearly cancels."""
    thresholds = float(case.thresholds.abs().max())
    mean = case.options.get("mean")
    return 1.0 + 2.0 * thresholds + (0.0 if mean is None else float(mean.abs().max()))


def gradient_term_size(case: Case) -> float:
    """Bounds the norm of the terms of the total's gradient to the codes, on both sides of every pair set."""
    codes, teacher = case.codes.double(), case.teacher.double()
    length = codes.norm(dim=-1)
    cosine = torch.nn.functional.cosine_similarity(codes[..., None, :], teacher[..., None, None, :, :], dim=-1)
    c = torch.nn.functional.normalize(torch.softmax(cosine / 0.1, -1), dim=-1)
    meeting = (c * c.mean((-2, -3), keepdim=True)).sum(-1)
    rows = (
        2
        * len(case.partners)
        * term_size(case)
        * meeting
        * (2 / 0.1)
        / length.clamp(min=1e-3)
        / (length.shape[-2] * length.shape[-1])
    )
    return float(1.7 * rows.norm())


def check(got: Result, same: Result, oracle: Result, eps: float, size: float, gradient_size: float = 0.0) -> None:
    """Checks values and gradients.

    Values: error <= 2 x that of the same dtype's dense form + 2 eps x size of the terms. Gradients: relative norm,
    cosine, signed bias. Sums are in fp32 whatever the inputs are, so a gradient's terms count with the eps of fp32.
    """
    for name, truth in oracle.values.items():
        error = (got.values[name].double() - truth).abs().max()
        budget = 2 * (same.values[name].double() - truth).abs().max() + 2 * eps * size
        assert error <= budget, f"{name}: off by {error:.2e}, {budget:.2e} allowed"
    assert got.gradients.keys() == oracle.gradients.keys()
    for name, truth in oracle.gradients.items():
        if not truth.any():
            assert not got.gradients[name].any(), f"gradient of {name} must be 0"
            continue
        error, other = got.gradients[name].double() - truth, same.gradients[name].double() - truth
        norm = truth.norm()
        cancelled = 2 * FP32_EPS * (gradient_size if name == "codes" else 0.0) / norm
        relative, allowed = error.norm() / norm, 2 * other.norm() / norm + 4 * eps + cancelled
        assert relative <= allowed, f"gradient of {name}: relative error {relative:.2e}, {allowed:.2e} allowed"
        bias = (error * truth).sum().abs() / norm**2
        bias_allowed = 2 * (other * truth).sum().abs() / norm**2 + 4 * eps + cancelled
        assert bias <= bias_allowed, f"gradient of {name}: signed bias {bias:.2e}, {bias_allowed:.2e} allowed"
        cosine = (got.gradients[name].double() * truth).sum() / (got.gradients[name].double().norm() * norm)
        assert cosine >= 1 - allowed**2 - 1e-12, f"gradient of {name}: cosine {cosine:.6f}"


def check_against_dense(case: Case, upstream: dict[str, Tensor] | None = None, oracle_impl: str = "dense") -> Result:
    got = evaluate(case, "triton", upstream)
    eps = max(FP32_EPS, EPS[case.features.dtype], EPS[case.codes.dtype])
    same, oracle = evaluate(case, oracle_impl, upstream), evaluate(case.to(torch.float64), oracle_impl, upstream)
    check(got, same, oracle, eps, term_size(case), gradient_term_size(case))
    return got
