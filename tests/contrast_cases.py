"""Inputs, values with gradients, and the error budget for tests and benchmarks of `contrastive_loss`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from objective_inputs import assert_same_direction, assert_within_budget
from torch import Tensor

import smooseg_kernels as sk

# of log_sum, positive and the loss
UPSTREAM = (0.7, -1.3, 1.7)


@dataclass
class Contrast:
    codes_i: Tensor
    codes_j: Tensor
    options: dict

    def to(self, dtype: torch.dtype) -> Contrast:
        options = {
            k: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for k, x in self.options.items()
        }
        return Contrast(self.codes_i.detach().to(dtype), self.codes_j.detach().to(dtype), options)


KINDS = ("labels", "threshold", "rows", "either side", "band")


def make_contrast(
    kind="labels", B=2, N=17, M=29, D=21, Z=9, dtype=torch.float64, device="cpu", seed=0, temperature=0.2, **options
) -> Contrast:
    """Makes clustered features and codes. `kind` is one of KINDS; no cosine of features lies near a threshold."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres, meanings = noise(6, D), noise(6, Z)
    groups = [torch.randint(0, 6, (B, P), generator=generator) for P in (N, M)]
    features = [(centres[g] + 0.5 * noise(*g.shape, D) + 0.3).to(dtype) for g in groups]
    codes = [(2.0 * meanings[g] + noise(*g.shape, Z)).to(device, dtype) for g in groups]
    options |= {"temperature": temperature}
    if kind == "labels":
        labels = [torch.where(torch.rand(g.shape, generator=generator) < 0.1, -1, g).to(device) for g in groups]
        return Contrast(*codes, options | dict(zip(("labels_i", "labels_j"), labels)))
    cosines = F.normalize(features[0].double(), dim=-1) @ F.normalize(features[1].double(), dim=-1).mT
    high, low = between(cosines, 0.85), between(cosines, 0.5)
    options |= {"threshold": high}
    if kind in ("rows", "either side"):
        options["threshold"] = torch.stack([torch.stack([between(row, 0.8) for row in image]) for image in cosines])
    if kind == "either side":
        options["threshold_j"] = torch.stack([torch.stack([between(row, 0.9) for row in image.T]) for image in cosines])
    if kind == "band":
        options["negative_threshold"] = low
    options |= dict(zip(("features_i", "features_j"), features))
    moved = {k: x.to(device) if torch.is_tensor(x) else x for k, x in options.items()}
    for name in ("threshold", "threshold_j", "negative_threshold"):
        if name in moved:
            moved[name] = moved[name].to(torch.float64 if dtype == torch.float64 else torch.float32)
    return Contrast(*codes, moved)


def between(values: Tensor, quantile: float) -> Tensor:
    """Returns the middle of the widest gap between neighbours near a quantile, so that rounding decides no pair."""
    ordered = values.flatten().sort().values
    if len(ordered) < 3:
        return ordered.mean() - 0.1
    place = int(quantile * (len(ordered) - 1))
    near = ordered[max(0, place - 12) : place + 12]
    gap = near.diff()
    return near[gap.argmax()] + gap.max() / 2


class Result(NamedTuple):
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def evaluate(case: Contrast, impl: str, upstream=UPSTREAM, **options) -> Result:
    codes = [x.detach().requires_grad_() for x in (case.codes_i, case.codes_j)]
    out = sk.contrastive_loss(*codes, impl=impl, **{**case.options, **options})
    values = (out.log_sum, out.positive, out.loss)
    given = [
        torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).view(value.shape) * g
        for value, g in zip(values, upstream)
    ]
    if len(upstream) == 1:  # of the loss alone
        values, given = (out.loss,), [torch.full_like(out.loss, upstream[0])]
    gradients = torch.autograd.grad(values, codes, given)
    return Result({k: v.detach() for k, v in out._asdict().items()}, dict(zip(("codes_i", "codes_j"), gradients)))


def check(case: Contrast, impl: str, eps: float, **options) -> Result:
    """Checks values and gradients against float64: within twice the dense error plus 4 eps of the logits' size."""
    got, same = (evaluate(case, form, **options) for form in (impl, "dense"))
    compare(got, same, evaluate(case.to(torch.float64), "dense", **options), eps, case.options["temperature"])
    for name, gradient in got.gradients.items():
        assert gradient.dtype == getattr(case, name).dtype
    return got


def compare(got: Result, same: Result, oracle: Result, eps: float, temperature: float) -> None:
    largest = 1.0 / float(temperature)  # logit: its rounding is a relative error of a share of the softmax
    for name, truth in oracle.values.items():
        if name == "count":
            assert torch.equal(got.values["count"], truth)
        else:
            size = torch.tensor(2.0 * (largest + 5.0))
            assert_within_budget(got.values[name], same.values[name], truth, eps, size, name)
    for name, gradient in got.gradients.items():
        truth, rounding = oracle.gradients[name], max(eps, torch.finfo(gradient.dtype).eps)
        size = 4.0 * (1.0 + eps / rounding * largest) * truth.abs().max()
        assert_within_budget(gradient, same.gradients[name], truth, rounding, size, f"gradient of {name}")
        tolerance = 8 * (rounding + eps * largest)
        assert_same_direction(gradient, truth, tolerance, f"gradient of {name}")
