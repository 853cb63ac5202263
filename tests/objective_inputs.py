"""Inputs and error budgets for tests of the objective: a float64 oracle, rounding judged by the size of the terms."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import smooseg_kernels as sk


class Inputs(NamedTuple):
    features: Tensor
    codes: Tensor
    student: Tensor
    teacher: Tensor
    partners: list
    thresholds: Tensor
    options: dict

    def to(self, dtype: torch.dtype) -> Inputs:
        cast = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in self.options.items()}
        tensors = (t.to(dtype) for t in self[:4])
        return Inputs(*tensors, self.partners, self.thresholds.to(dtype), cast)


def make_inputs(
    B=3, P=17, D=70, K=5, Z=8, T=2, H=None, dtype=torch.float64, seed=0, structured=True, **options
) -> Inputs:
    """Makes clustered features and codes near the prototypes (so that the softmax is peaked), or plain noise."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    heads = () if H is None else (H,)
    group = torch.randint(0, max(2, K), (B, P), generator=g)
    features, codes, teacher = noise(B, P, D), noise(*heads, B, P, Z), noise(*heads, K, Z)
    student = teacher + 0.3 * noise(*heads, K, Z)
    if structured:
        features = noise(max(2, K), D)[group] + 0.5 * features + 0.5
        codes = 2.0 * teacher[..., group % K, :] + 0.5 * codes
    partners = ["self", torch.randint(0, B, (B,), generator=g), "all", torch.zeros(B, dtype=torch.int64), "self"][:T]
    if B == 1:
        partners = ["self", torch.zeros(B, dtype=torch.int64)] * 3
        partners = partners[:T]
    thresholds = torch.linspace(-0.05, 0.5, T, dtype=torch.float64)
    return Inputs(features, codes, student, teacher, partners, thresholds, options).to(dtype)


class Result(NamedTuple):
    values: dict[str, Tensor]
    grads: dict[str, Tensor]


def value_and_grad(inputs: Inputs, impl: str, seed: int = 7, **extra) -> Result:
    """Returns values, and gradients to codes and student for upstream gradients that differ from 1 and each other."""
    codes, student = inputs.codes.detach().requires_grad_(), inputs.student.detach().requires_grad_()
    out = sk.smooseg_loss(
        inputs.features,
        codes,
        student,
        inputs.teacher,
        inputs.partners,
        inputs.thresholds,
        impl=impl,
        **inputs.options,
        **extra,
    )
    g = torch.Generator().manual_seed(seed)
    outputs = [v for v in out if v.requires_grad]
    upstream = [(torch.rand(v.shape, generator=g, dtype=torch.float64) + 0.5).to(v.dtype) for v in outputs]
    d_codes, d_student = torch.autograd.grad(outputs, (codes, student), upstream)
    return Result({k: v.detach() for k, v in out._asdict().items()}, {"codes": d_codes, "student": d_student})


def pull_and_push(inputs: Inputs, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Returns the sizes of the energy's terms [.., T] and of their gradient to the codes, in float64, uncancelled."""
    x = inputs.to(torch.float64)
    codes = (x.codes if x.codes.dim() == 4 else x.codes[None]).requires_grad_()
    teacher = x.teacher if x.teacher.dim() == 3 else x.teacher[None]
    scale = x.options.get("channel_scale")
    f = F.normalize(x.features if scale is None else x.features * scale[:, None], dim=-1)
    probs = torch.softmax(
        F.normalize(codes, dim=-1) @ F.normalize(teacher, dim=-1)[:, None].mT / x.options.get("temperature", 0.1), -1
    )
    c = F.normalize(probs, dim=-1)
    sizes, grads = [], 0.0
    B = f.shape[0]
    for entry in x.partners:
        vectors = [entry] if not isinstance(entry, str) else [torch.arange(B)] if entry == "self" else None
        vectors = vectors or [(torch.arange(B) + shift) % B for shift in range(1, B)]
        bias = x.thresholds.abs().max()
        size = 0.0
        for j in vectors:
            s = f @ f[j].mT
            force = (
                s.abs() + s.mean(2, keepdim=True).abs() + s.mean().abs() + bias
            )  # every term of W - b, none cancelling
            size = size + (force * (1 + c @ c[:, j].mT)).mean((1, 2, 3)) / len(vectors)
        sizes.append(size)
        grads = grads + torch.autograd.grad(size.sum() * 3.0, codes, retain_graph=True)[0].abs()
    return torch.stack(sizes, -1).detach(), grads.reshape(inputs.codes.shape)


def assert_within_budget(got: Tensor, same_dtype: Tensor, truth: Tensor, eps: float, size: Tensor, what: str) -> None:
    """Asserts error <= 2 x (error of the dense formulas in the same dtype) + 2 eps x (size of the terms)."""
    error = (got.double() - truth.double()).abs().max().item()
    allowed = 2 * (same_dtype.double() - truth.double()).abs().max().item() + 2 * eps * size.abs().max().item()
    if not error <= allowed:
        raise AssertionError(f"{what}: error {error:.3g} is above its budget {allowed:.3g}")


def assert_same_direction(got: Tensor, truth: Tensor, tolerance: float, what: str) -> None:
    """Asserts relative norm, cosine and signed bias, which a missing term or a wrong factor would change."""
    got, truth = got.double().flatten(), truth.double().flatten()
    norm = truth.norm().item()
    if norm == 0.0:
        if got.norm().item() != 0.0:
            raise AssertionError(f"{what}: should be zero, norm {got.norm().item():.3g}")
        return
    relative = (got - truth).norm().item() / norm
    cosine = F.cosine_similarity(got, truth, dim=0).item()
    bias = abs(torch.dot(got - truth, truth).item()) / norm**2
    if not (relative <= tolerance and cosine >= 1 - tolerance and bias <= tolerance):
        raise AssertionError(
            f"{what}: relative {relative:.3g}, cosine {cosine:.9f}, bias {bias:.3g}, allowed {tolerance:.3g}"
        )
