"""Inputs, values with gradients, and the error budget for tests and benchmarks of `pair_energy`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from objective_inputs import assert_same_direction, assert_within_budget
from torch import Tensor
from triton_cases import EPS

import smooseg_kernels as sk

UPSTREAM = (1.7, -0.6, 0.9)  # gradients that arrive at energy, similarity and, where it is asked for, clamped


@dataclass
class Pairs:
    features_i: Tensor
    codes_i: Tensor
    features_j: Tensor
    codes_j: Tensor
    threshold: float | Tensor = 0.1
    options: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Pairs:
        tensors = (x.detach().to(dtype) for x in self.tensors)
        return Pairs(*tensors, self.threshold, self.options)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.features_i, self.codes_i, self.features_j, self.codes_j

    def with_options(self, **options) -> Pairs:
        return replace(self, options={**self.options, **options})


def make_pairs(
    B=3, N=None, P_i=17, P_j=97, D=70, Z=9, dtype=torch.float64, device="cpu", seed=0, threshold=0.1, **options
) -> Pairs:
    """Makes clustered features and codes, with similarities on both sides of every bound.

    With N the j side has N images, and `partner` repeats some of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres, meanings = noise(5, D), noise(5, Z)

    def side(images, P):
        group = torch.randint(0, 5, (images, P), generator=generator)
        return centres[group] + 0.6 * noise(images, P, D) + 0.5, 2.0 * meanings[group] + noise(images, P, Z)

    tensors = [x.to(device, dtype) for x in (*side(B, P_i), *side(N or B, P_j))]
    if N is not None:
        options["partner"] = torch.randint(0, N, (B,), generator=generator).to(device)
    return Pairs(*tensors, threshold, options)


@dataclass
class Result:
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def evaluate(pairs: Pairs, impl: str, upstream: tuple[float, ...] = UPSTREAM, **extra) -> Result:
    """Upstream gradients of rows and of several pair sets differ between their elements."""
    leaves = {name: getattr(pairs, name).detach().requires_grad_() for name in ("codes_i", "codes_j")}
    threshold = pairs.threshold
    if isinstance(threshold, Tensor) and threshold.requires_grad:
        threshold = leaves["threshold"] = threshold.detach().requires_grad_()
    sides = (pairs.features_i, leaves["codes_i"], pairs.features_j, leaves["codes_j"])
    out = sk.pair_energy(*sides, threshold, impl=impl, **pairs.options, **extra)
    values = {name: value for name, value in out._asdict().items() if value is not None}
    smooth = [(value, g) for value, g in zip(out, upstream) if value is not None]
    arriving = [g * torch.linspace(1, 2, value.numel()).to(value).view(value.shape) for value, g in smooth]
    gradients = torch.autograd.grad([value for value, _ in smooth], list(leaves.values()), arriving)
    return Result({name: value.detach() for name, value in values.items()}, dict(zip(leaves, gradients)))


class Sizes(NamedTuple):
    """Sizes by which a result is judged."""

    energy: float  # the mean magnitude of the energy's terms, none cancelling another
    gradients: dict[str, Tensor]  # the same of a code's gradient, as a norm [.., P]
    undecided: dict[str, Tensor]  # the part of it from pairs so near a bound of the clamp that rounding decides


def sizes_of(pairs: Pairs, eps: float) -> Sizes:
    f_i, c_i, f_j, c_j = (F.normalize(x.double(), dim=-1) for x in pairs.tensors)
    partner = pairs.options.get("partner")
    partner = torch.arange(len(f_i), device=f_i.device) if partner is None else partner
    closeness, likeness = f_i @ f_j[partner].mT, c_i @ c_j[partner].mT
    force, size = closeness - float(pairs.threshold), closeness.abs() + abs(float(pairs.threshold))
    if pairs.options.get("center", True):
        force = force - closeness.mean(2, keepdim=True) + closeness.mean()
        size = size + closeness.abs().mean(2, keepdim=True) + closeness.abs().mean()
    near = torch.zeros_like(likeness)
    for bound in pairs.options.get("clamp", ()):
        if bound is not None:  # cosines are made of rows of 11 bits at least
            near = near.maximum(((likeness - bound).abs() <= 4 * min(eps, EPS[torch.float16])).double())
    energy, similarity = (abs(g) for g in UPSTREAM[:2])
    lengths = [x.double().norm(dim=-1).clamp(min=1e-3) for x in (pairs.codes_i, pairs.codes_j)]

    def rows(share: Tensor) -> dict[str, Tensor]:
        toward_j = torch.zeros(c_j.shape[:2], dtype=torch.float64, device=f_i.device).index_add_(
            0, partner, share.sum(1)
        )
        return {name: 2 * size / n for name, size, n in zip(("codes_i", "codes_j"), (share.sum(2), toward_j), lengths)}

    gradients, undecided = (energy * size + similarity) / size.numel(), energy * force.abs() * near / size.numel()
    return Sizes(size.mean().item(), rows(gradients), rows(undecided))


def check(pairs: Pairs, impl: str, eps: float) -> Result:
    """Checks values and gradients against float64: within twice the dense error plus 2 eps of the terms' size."""
    got, oracle = evaluate(pairs, impl), evaluate(pairs.to(torch.float64), "dense")
    for value in got.values.values():
        assert value.dtype == torch.promote_types(torch.float32, pairs.codes_i.dtype)
        assert value.shape == ()
    for name, gradient in got.gradients.items():
        assert gradient.dtype == getattr(pairs, name).dtype
    compare(got, evaluate(pairs, "dense"), oracle, sizes_of(pairs, eps), eps)
    return got


def compare(got: Result, same: Result, oracle: Result, sizes: Sizes, eps: float) -> None:
    """Compares the results that there are: a forward pass has no gradients."""
    for name, truth in oracle.values.items():
        assert_within_budget(
            got.values[name], same.values[name], truth, eps, torch.tensor(max(1.0, sizes.energy)), name
        )
    for name, gradient in got.gradients.items():
        truth, what = oracle.gradients[name], f"gradient of {name}"
        rounding, size, undecided = (
            max(eps, torch.finfo(gradient.dtype).eps),
            sizes.gradients[name],
            sizes.undecided[name],
        )
        assert_within_budget(gradient, same.gradients[name], truth, rounding, size + undecided / (2 * rounding), what)
        for rows in (undecided >= 0, undecided == 0):  # all, then those that no rounding decides
            norm = max(truth[rows].norm().item(), 1e-300)
            tolerance = 4 * rounding * max(1.0, size[rows].norm().item() / norm) + undecided[rows].norm().item() / norm
            assert_same_direction(gradient[rows], truth[rows], tolerance, what)
