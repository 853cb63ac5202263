"""Partner numbers out of range: the nearest image takes their place where they are not read (traced, vmap, kernels)."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch
from objective_inputs import make_inputs
from pair_cases import make_pairs

import smooseg_kernels as sk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["dense", "torch", *(["triton"] if importlib.util.find_spec("triton") else [])]
# partners of four images; just and far beyond both ends, and the last numbers that are in range
OUTSIDE = [([-1, 4, 3, 0], [0, 3, 3, 0]), ([2, 1, 99, -99], [2, 1, 3, 0]), ([4, 4, -1, -1], [3, 3, 0, 0])]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles the same few functions for other arguments, and the compiler gives up after eight."""
    torch._dynamo.reset()


def assert_taken_as_the_nearest(function, impl, arguments=()):
    """Compares the traced function, given numbers out of range, with the dense form of the nearest ones, untraced."""
    traced = torch.compile(functools.partial(function, impl=impl), backend="aot_eager", fullgraph=True)
    for given, nearest in OUTSIDE:
        got, expected = (
            f(torch.tensor(numbers, device=DEVICE), *arguments)
            for f, numbers in ((traced, given), (functools.partial(function, impl="dense"), nearest))
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        gradients = (torch.autograd.grad(values[0].sum(), arguments) for values in (got, expected)) if arguments else ()
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("impl", IMPLS)
def test_of_the_objective(impl):
    x = make_inputs(B=4, P=9, D=12, H=2, dtype=torch.float32)
    features, student, teacher = (t.to(DEVICE) for t in (x.features, x.student, x.teacher))

    def loss(partners, codes, impl):
        table = torch.stack((partners, partners.flip(0)))
        return sk.smooseg_loss(features, codes * 1.0, student, teacher, table, [0.1, 0.3], impl=impl)

    assert_taken_as_the_nearest(loss, impl, [x.codes.to(DEVICE).requires_grad_()])


@pytest.mark.parametrize("impl", IMPLS)
def test_of_the_energies_alone(impl):
    """One image has no weight, so that the count of pairs depends on the partners."""
    features = make_inputs(B=4, P=9, D=12, dtype=torch.float32).features.to(DEVICE)
    weight = (torch.rand(4, 9) * torch.tensor([[1], [0], [1], [1]])).to(DEVICE)

    def energy(partner, probs, impl):
        entries = ["self", partner]
        return sk.smoothness_energy(features, probs * 1.0, entries, [0.1, 0.3], patch_weight=weight, impl=impl)

    probs = torch.rand(4, 9, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    assert_taken_as_the_nearest(energy, impl, [probs])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("clamp", [(0.0, 0.8), (None, None)], ids=str)
def test_of_energies_of_pairs(clamp, impl):
    """The i side has more images than the j side, whose count is the bound."""
    x = make_pairs(B=6, N=4, P_i=5, P_j=6, D=8, Z=5, dtype=torch.float32, device=DEVICE)

    def energy(partner, codes_i, codes_j, impl):
        met = torch.cat((partner, partner[:2]))
        return sk.pair_energy(
            x.features_i, codes_i * 1.0, x.features_j, codes_j * 1.0, 0.1, partner=met, clamp=clamp, impl=impl
        )

    arguments = [x.codes_i.requires_grad_(), x.codes_j.requires_grad_()]
    assert_taken_as_the_nearest(energy, impl, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_the_statistics(impl):
    features = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def statistics(partner, impl):
        return sk.similarity_statistics(features, [partner, "all"], bins=16, neighbours=3, impl=impl)

    assert_taken_as_the_nearest(statistics, impl)


@pytest.mark.parametrize("impl", ["dense", "torch"])
def test_under_vmap(impl):
    x = make_inputs(B=4, P=9, D=12, dtype=torch.float32)

    def energy(partner):
        return sk.smoothness_energy(x.features, x.codes.abs(), [partner], [0.1], impl=impl).energy

    given, nearest = (torch.tensor(numbers) for numbers in zip(*OUTSIDE))
    torch.testing.assert_close(torch.func.vmap(energy)(given), torch.stack([energy(partner) for partner in nearest]))


def test_of_a_layer():
    """A layer passes partners on without clamping them itself."""
    features, probs = torch.randn(4, 6, 3, 3, device=DEVICE), torch.rand(4, 5, 3, 3, device=DEVICE)

    def terms(partner, impl):
        return sk.layers.SmoothnessLoss(0.1, 0.3, impl=impl)(features, probs, partner)

    assert_taken_as_the_nearest(terms, "auto")
