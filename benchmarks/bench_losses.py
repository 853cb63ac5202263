"""Losses as trainers of the family call them, against the equations of their papers written with P x P matrices.

Form "dense" is those equations in plain PyTorch, not the package's own oracle. STEGO (arXiv 2203.08414) has the clamp
and the logged means, EAGLE (arXiv 2403.01482) a shift that is the batch's mean closeness, HP and CAUSE a contrast with
positives by labels or by the closeness of features, STEGO and DepthG a CRF energy of points.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import floors
import problems
import pytest
import torch
import torch.nn.functional as F
from floors import PairProblem, Problem
from torch import Tensor

import smooseg_kernels as sk

FORMS = ["dense", "torch", "triton"]
SHAPES = {f"b{B}_p{P}": PairProblem(B=B, P=P) for B in (16, 32) for P in (121, 784, 1600)}
DEFAULT = ("b16_p121", "b16_p784")  # the others with --bench-full
CRF = {"n1000": Problem(B=16, P=1000, D=5, Z=0, K=27, T=0)}
GROUPS, SHIFT, CLOSE, TEMPERATURE = 27, 0.2, 0.4, 0.1  # CLOSE lies between the cosines within and across groups
GAUSSIAN, BILATERAL, CRF_SHIFT = (3.0, 3.0), (67.0, 3.0, 4.0), 0.1
WEIGHTS = (1.7, -0.6, 0.9)  # gradients that arrive at the outputs
ERROR = 1e-4


class Rows(NamedTuple):
    features: Tensor  # [B,P,D]; positions and colours of points for the CRF
    codes: Tensor  # [B,P,Z]; probabilities for the CRF
    labels: Tensor  # int64 [B,P]

    def first(self, images: int) -> "Rows":
        return Rows(*(x.detach()[:images] for x in self))

    def double(self) -> "Rows":
        return Rows(self.features.double(), self.codes.double(), self.labels)


def next_image(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device).roll(1)


def dense_pairs(x: Rows, shift: float | None) -> tuple[Tensor, ...]:
    f, c, partner = F.normalize(x.features, dim=-1), F.normalize(x.codes, dim=-1), next_image(x.codes)
    s, likeness = f @ f[partner].mT, c @ c[partner].mT
    closeness, clamped = s.mean(), likeness.clamp(min=0)
    w = s - s.mean(2, keepdim=True) + closeness - (closeness if shift is None else shift)
    energy = -(clamped * w).mean()
    return (energy,) if shift is None else (energy, likeness.mean(), clamped.mean(), closeness)


def pairs(x: Rows, impl: str) -> tuple[Tensor, ...]:
    """All outputs of an energy with a constant shift."""
    if impl == "dense":
        return dense_pairs(x, SHIFT)
    rows = (x.features, x.codes, x.features, x.codes, SHIFT)
    out = sk.pair_energy(*rows, partner=next_image(x.codes), clamp=(0.0, None), means=True, impl=impl)
    return out.energy, out.similarity, out.clamped, out.closeness


def batch_shift(x: Rows, impl: str) -> tuple[Tensor, ...]:
    """An energy under the batch's mean closeness as its shift."""
    if impl == "dense":
        return dense_pairs(x, None)
    rows = (x.features, x.codes, x.features, x.codes, 0.0)
    out = sk.pair_energy(*rows, partner=next_image(x.codes), clamp=(0.0, None), means=True, impl=impl)
    return (out.energy + out.closeness * out.clamped,)


def dense_contrast(x: Rows, related: Tensor) -> tuple[Tensor, ...]:
    c, itself = F.normalize(x.codes, dim=-1), torch.eye(x.codes.shape[1], dtype=torch.bool, device=x.codes.device)
    s, related = (c @ c.mT / TEMPERATURE).masked_fill(itself, -torch.inf), related & ~itself
    count = related.sum(2)
    loss = s.logsumexp(2) - torch.where(related, s, 0.0).sum(2) / count.clamp(min=1)
    return (torch.where(count > 0, loss, 0.0).sum() / (count > 0).sum(),)  # without a wait for the card


def contrast_labels(x: Rows, impl: str) -> tuple[Tensor, ...]:
    if impl == "dense":
        return dense_contrast(x, x.labels[:, :, None] == x.labels[:, None, :])
    options = {"labels_i": x.labels, "labels_j": x.labels, "temperature": TEMPERATURE}
    return (sk.contrastive_loss(x.codes, x.codes, exclude_self=True, impl=impl, **options).loss,)


def contrast_features(x: Rows, impl: str) -> tuple[Tensor, ...]:
    if impl == "dense":
        f = F.normalize(x.features, dim=-1)
        return dense_contrast(x, f @ f.mT > CLOSE)
    options = {"features_i": x.features, "features_j": x.features, "threshold": CLOSE, "temperature": TEMPERATURE}
    return (sk.contrastive_loss(x.codes, x.codes, exclude_self=True, impl=impl, **options).loss,)


def crf_energy(x: Rows, impl: str) -> tuple[Tensor, ...]:
    places, colors = x.features[..., :2].contiguous(), x.features[..., 2:5].contiguous()
    if impl != "dense":
        kernels = {"gaussian": GAUSSIAN, "bilateral": BILATERAL, "shift": CRF_SHIFT}
        return (sk.crf_energy(places, colors, x.codes, impl=impl, **kernels),)
    accurate = torch.promote_types(places.dtype, torch.float32)
    apart = (
        torch.cdist(p, p, compute_mode="donot_use_mm_for_euclid_dist")
        for p in (places.to(accurate), colors.to(accurate))
    )
    far, unlike = (distance**2 for distance in apart)
    (near, near_weight), (reach, likeness, both_weight) = GAUSSIAN, BILATERAL
    kernel = both_weight * torch.exp(-far / (2 * reach**2) - unlike / (2 * likeness**2))
    kernel = kernel + near_weight * torch.exp(-far / (2 * near**2))
    return (-((kernel - CRF_SHIFT) * (x.codes @ x.codes.mT)).mean(),)


def patches(problem: PairProblem | Problem, dtype: torch.dtype, device: str, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    B, P, D, Z = problem.B, problem.P, problem.D, problem.Z
    group = torch.randint(0, GROUPS, (B, P), generator=generator)

    def clustered(channels: int, noise: float) -> Tensor:
        centres = torch.randn(GROUPS, channels, generator=generator)
        return (centres[group] + noise * torch.randn(B, P, channels, generator=generator)).to(device, dtype)

    return Rows(clustered(D, 0.7), clustered(Z, 0.5), group.to(device))


def points(problem: PairProblem | Problem, dtype: torch.dtype, device: str, seed: int) -> Rows:
    """Points of a picture of 224 px with colours of two dozen shades, and probabilities."""
    generator = torch.Generator().manual_seed(seed)
    B, P = problem.B, problem.P
    group = torch.randint(0, GROUPS, (B, P), generator=generator)
    colors = (10.0 * torch.randn(GROUPS, 3, generator=generator))[group] + torch.randn(B, P, 3, generator=generator)
    places = torch.randint(0, 224, (B, P, 2), generator=generator).float()
    probs = torch.softmax(2 * torch.randn(B, P, problem.K, generator=generator), -1)
    return Rows(torch.cat((places, colors), 2).to(device, dtype), probs.to(device, dtype), group.to(device))


def pair_counts(problem: PairProblem) -> tuple[int, int]:
    return floors.pairs_floor(problem), floors.pairs_flops(problem)


def label_counts(problem: PairProblem) -> tuple[int, int]:
    return pair_counts(replace(problem, D=0))


def crf_counts(problem: Problem) -> tuple[int, int]:
    """Points and probabilities are read forward and backward; a pair has two kernels and K products, each pass."""
    rows = problem.B * problem.P * problem.element
    return rows * (2 * 5 + 3 * problem.K), 2 * problem.B * problem.P**2 * (3 * 5 + 3 * 2 + 2 + 2 * 2 * problem.K)


class Loss(NamedTuple):
    outputs: Callable[[Rows, str], tuple[Tensor, ...]]  # the form "dense" is the formula
    inputs: Callable[..., Rows]
    counts: Callable[..., tuple[int, int]]  # bytes and operations of the floor


LOSSES = {
    "pairs, all outputs": Loss(pairs, patches, pair_counts),
    "pairs, shift of the batch": Loss(batch_shift, patches, pair_counts),
    "contrast by labels": Loss(contrast_labels, patches, label_counts),
    "contrast by features": Loss(contrast_features, patches, pair_counts),
    "crf energy": Loss(crf_energy, points, crf_counts),
}


def evaluate(loss: Loss, x: Rows, impl: str) -> tuple[Tensor, ...]:
    """Returns the outputs and the gradient to the codes."""
    x = x._replace(codes=x.codes.detach().requires_grad_())
    values = loss.outputs(x, impl)
    total = sum(weight * value for weight, value in zip(WEIGHTS, values))
    return (*(value.detach() for value in values), *torch.autograd.grad(total, [x.codes]))


def subject(case, problem, impl, mode, dtype, device, seed=0) -> problems.Subject:
    """One loss with its gradient. The same call on as many images as an oracle holds is compared with float64."""
    loss = LOSSES[case]
    x = loss.inputs(problem, dtype, device, seed)

    def check(outputs):
        assert all(value.isfinite().all() for value in outputs), "outputs are not finite"
        part = x.first(max(1, problems.ORACLE_PAIRS // problem.P**2))
        got = outputs if len(part.codes) == problem.B else evaluate(loss, part, impl)
        allowed = max(ERROR, 4 * torch.finfo(dtype).eps)
        if impl == "dense" and case.startswith("contrast"):
            allowed /= TEMPERATURE  # by which the formula divides cosines that are rounded
        for value, truth in zip(got, evaluate(loss, part.double(), "dense"), strict=True):
            error = (value.double() - truth).norm()
            assert error <= allowed * (truth.norm() if truth.dim() else truth.abs().clamp(min=1)), f"off by {error}"

    return problems.Subject(lambda: evaluate(loss, x, impl), check, *loss.counts(problem))


problems.SUBJECTS |= {case: functools.partial(subject, case) for case in LOSSES}
CELLS = [(case, shape) for case in LOSSES for shape in (CRF if case == "crf energy" else SHAPES)]


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(("case", "shape"), CELLS)
def bench_loss(case, shape, impl, bench):
    if bench.smoke and shape not in ("b16_p121", "n1000"):
        pytest.skip("one size in smoke form")
    bench.unless_full(shape not in (*DEFAULT, *CRF))
    bench.time(case, shape, {**SHAPES, **CRF}[shape], impl, "forward + backward", peak=True)
