"""Partner numbers out of range: the nearest image takes their place where they are not read (traced, vmap, kernels)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from objective_inputs import make_inputs
from pair_cases import make_pairs

import smooseg_kernels as sk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["dense", "torch", *(["triton"] if importlib.util.find_spec("triton") else [])]
# of four images; just and far beyond both ends, and the last numbers that are in range
OUTSIDE = [([-1, 4, 3, 0], [0, 3, 3, 0]), ([2, 1, 99, -99], [2, 1, 3, 0]), ([4, 4, -1, -1], [3, 3, 0, 0])]


def same_results(function, given, nearest, arguments=()):
    """Compares the traced function, given numbers out of range, with the nearest ones where these are checked."""
    traced = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, expected = (
        f(torch.tensor(numbers, device=DEVICE), *arguments) for f, numbers in ((traced, given), (function, nearest))
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for argument in arguments:
        gradients = (torch.autograd.grad(values[0].sum(), argument, retain_graph=True)[0] for values in (got, expected))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("given", "nearest"), OUTSIDE)
def test_of_the_objective(given, nearest, impl):
    x = make_inputs(B=4, P=9, D=12, H=2, dtype=torch.float32)
    constants = [t.to(DEVICE) for t in (x.features, x.student, x.teacher)]

    def loss(partners, codes):
        table = torch.stack((partners, partners.flip(0)))
        return sk.smooseg_loss(constants[0], codes * 1.0, *constants[1:], table, [0.1, 0.3], impl=impl)

    same_results(loss, given, nearest, [x.codes.to(DEVICE).requires_grad_()])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("given", "nearest"), OUTSIDE)
def test_of_the_energies_alone(given, nearest, impl):
    x = make_inputs(B=4, P=9, D=12, dtype=torch.float32)
    features, weight = (
        x.features.to(DEVICE),
        torch.rand(4, 9, device=DEVICE) * torch.tensor([[1], [0], [1], [1]], device=DEVICE),
    )

    def energy(partner, probs):
        entries = ["self", partner]
        return sk.smoothness_energy(features, probs * 1.0, entries, [0.1, 0.3], patch_weight=weight, impl=impl)

    same_results(energy, given, nearest, [torch.rand(4, 9, 5, device=DEVICE).requires_grad_()])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("clamp", [(0.0, 0.8), (None, None)], ids=str)
@pytest.mark.parametrize(("given", "nearest"), OUTSIDE)
def test_of_energies_of_pairs(given, nearest, clamp, impl):
    """More images on the i side than there are to meet: it is these that count."""
    x = make_pairs(B=6, N=4, P_i=5, P_j=6, D=8, Z=5, dtype=torch.float32, device=DEVICE)

    def energy(partner, codes_i, codes_j):
        met = torch.cat((partner, partner[:2]))
        return sk.pair_energy(
            x.features_i, codes_i * 1.0, x.features_j, codes_j * 1.0, 0.1, partner=met, clamp=clamp, impl=impl
        )

    same_results(energy, given, nearest, [x.codes_i.requires_grad_(), x.codes_j.requires_grad_()])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("given", "nearest"), OUTSIDE)
def test_of_the_statistics(given, nearest, impl):
    features = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def statistics(partner):
        return sk.similarity_statistics(features, [partner, "all"], bins=16, neighbours=3, impl=impl)

    same_results(statistics, given, nearest)


@pytest.mark.parametrize("impl", ["dense", "torch"])
def test_under_vmap(impl):
    x = make_inputs(B=4, P=9, D=12, dtype=torch.float32)

    def energy(partner):
        return sk.smoothness_energy(x.features, x.codes.abs(), [partner], [0.1], impl=impl).energy

    given, nearest = (torch.tensor(numbers) for numbers in zip(*OUTSIDE))
    torch.testing.assert_close(torch.func.vmap(energy)(given), torch.stack([energy(partner) for partner in nearest]))


def test_of_a_layer():
    """A layer hands partners on without clamping them itself."""
    layer = sk.layers.SmoothnessLoss(0.1, 0.3)
    features, probs = torch.randn(4, 6, 3, 3, device=DEVICE), torch.rand(4, 5, 3, 3, device=DEVICE)
    for given, nearest in OUTSIDE:
        same_results(lambda partner: layer(features, probs, partner), given, nearest)
