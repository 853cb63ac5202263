"""Options of `pair_energy` against the dense oracle: rows, weights, shifts of each image, several partners, means."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from pair_cases import Result, evaluate, make_pairs

import smooseg_kernels as sk
from smooseg_kernels import pair_blocks, products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHIFTS = torch.tensor([0.1, -0.2, 0.3], device=DEVICE, requires_grad=True)
CASES = {
    "means": dict(means=True, clamp=(0.2, 0.8)),
    "means without a centre": dict(means=True, center=False, hinge=True, clamp=(0.0, None)),
    "one shift": dict(threshold=torch.tensor(0.15, requires_grad=True), clamp=(0.0, None)),
    "rows": dict(reduction="none", means=True, clamp=(0.2, 0.8)),
    "weights": dict(weights=True, means=True),
    "weighted rows": dict(weights=True, reduction="none", center=False),
    "shifts": dict(threshold=SHIFTS),
    "shifts and hinge": dict(threshold=SHIFTS, hinge=True, means=True),
    "given mean": dict(mean=0.3, clamp=(None, None)),
    "two partners": dict(partner=torch.tensor([[1, 1, 3], [0, 2, 2]]), means=True, mean=torch.tensor([0.1, 0.2])),
    "without clamp": dict(clamp=(None, None), means=True, weights=True, threshold=SHIFTS),
    "rows of a hinge": dict(clamp=(None, None), hinge=True, reduction="none", means=True),
    "histogram": dict(bins=7, limits=(-0.9, 0.9)),
    "histograms of two partners": dict(partner=torch.tensor([[1, 1, 3], [0, 2, 2]]), bins=40, limits=(-0.5, 0.9)),
}
IMPLS = [("torch", torch.float64), ("torch", torch.float32)]
IMPLS += [("triton", torch.float32)] if importlib.util.find_spec("triton") else []


def result(case: str, impl: str, dtype: torch.dtype, **shape):
    x = make_pairs(
        **{"B": 3, "N": 4, "P_i": 17, "P_j": 33, "D": 20, "Z": 9, **shape}, dtype=dtype, device=DEVICE, clamp=(0.0, 0.8)
    )
    options = {"partner": torch.tensor([1, 1, 3]), **CASES[case]}
    options = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    if options.pop("weights", False):
        generator = torch.Generator().manual_seed(1)
        sides = (x.codes_i, x.codes_j)
        weight_i, weight_j = (torch.rand(*t.shape[:2], generator=generator).to(DEVICE) for t in sides)
        weight_i[2], weight_j[1, :5] = 0.0, 0.0  # an image without weight
        options |= {"weight_i": weight_i, "weight_j": weight_j}
    x.threshold = options.pop("threshold", x.threshold)
    return evaluate(x.with_options(**options), impl)


@pytest.mark.parametrize(("impl", "dtype"), IMPLS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_oracle(case, impl, dtype):
    if impl == "triton" and case == "shifts and hinge":
        with pytest.raises(ValueError, match=r'impl="triton" has no gradient to threshold with hinge=True: use'):
            result(case, impl, dtype)
        return
    compare(result(case, impl, dtype), result(case, "dense", torch.float64), dtype)


@pytest.mark.parametrize("case", ["weights", "two partners", "rows"])
def test_onednn_and_small_blocks_equal_the_oracle(case, monkeypatch):
    for least in ("LEAST_PRODUCTS", "LEAST_SHARED_PRODUCTS"):
        monkeypatch.setattr(products, least, 1)
    monkeypatch.setattr(products, "library_idles", torch.backends.mkldnn.is_available)  # on every processor
    monkeypatch.setattr(pair_blocks, "CPU_PAIRS", 200)  # rows of one image, and fewer in its last block
    compare(result(case, "torch", torch.float32), result(case, "dense", torch.float64), torch.float32)


def test_products_take_any_strides(monkeypatch):
    a, b, met = torch.randn(2, 5, 9)[..., 1:7], torch.randn(3, 4, 8)[..., :6], torch.tensor([2, 0])
    for served in {torch.backends.mkldnn.is_available(), False}:
        monkeypatch.setattr(products, "onednn_serves", lambda a, b, served=served: served)
        want = torch.einsum("nrk,nck->nrc", a, b[met])
        torch.testing.assert_close(products.products(a, b, met), want)
        torch.testing.assert_close(products.products(a, b.mT.contiguous().mT, met), want)
        torch.testing.assert_close(products.products(a, b[:2], out=torch.empty(2, 5, 4)), a @ b[:2].mT)


def compare(got: Result, want: Result, dtype: torch.dtype) -> None:
    for part in ("values", "gradients"):
        expected, found = getattr(want, part), getattr(got, part)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert found[name].shape == value.shape
            scale = float(value.abs().max())
            tolerance = (1e-12 if dtype == torch.float64 else 2e-5) * scale
            torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=tolerance, msg=name)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_more_bins_than_the_kernel_counts():
    x = make_pairs(B=2, P_i=3, P_j=3, D=4, Z=4, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match=r'impl="triton" counts at most 2048 bins, got bins=2049: use impl="torch"'):
        sk.pair_energy(*x.tensors, 0.1, bins=2049, impl="triton")
    assert int(sk.pair_energy(*x.tensors, 0.1, bins=2049).histogram.sum()) == 2 * 3 * 3
    pair_histogram = torch.ops.smooseg.pair_histogram.default
    torch.library.opcheck(pair_histogram, (x.codes_i, x.codes_j, torch.tensor([1, 0], device=DEVICE), 4, -1.0, 1.0))


@pytest.mark.parametrize("shape", [dict(P_i=1, P_j=1, D=1, Z=1), dict(P_i=65, P_j=2, D=5, Z=70)], ids=str)
@pytest.mark.parametrize("impl", ["dense", "torch"])
def test_gradcheck_of_every_output(impl, shape):
    x = make_pairs(B=2, N=2, P_i=min(shape["P_i"], 4), P_j=shape["P_j"], D=shape["D"], Z=min(shape["Z"], 3))
    shifts = torch.tensor([0.1, -0.3], dtype=torch.float64, requires_grad=True)

    for reduction in ("mean", "none"):

        def function(codes_i, codes_j, shifts, reduction=reduction):
            options = dict(clamp=(-0.5, 0.6), means=True, reduction=reduction, partner=x.options["partner"], impl=impl)
            return sk.pair_energy(x.features_i, codes_i, x.features_j, codes_j, shifts, **options)[:3]

        inputs = (x.codes_i.requires_grad_(), x.codes_j.requires_grad_(), shifts)
        assert torch.autograd.gradcheck(function, inputs)


def test_a_shift_of_the_batch_needs_one_call():
    """The energy is linear in the threshold: that of 0 plus b times the clamped mean is that of b."""
    x = make_pairs(P_i=17, P_j=17, clamp=(0.0, None))
    codes = [t.requires_grad_() for t in (x.codes_i, x.codes_j)]
    sides = (x.features_i, codes[0], x.features_j, codes[1])
    first = sk.pair_energy(*sides, 0.0, means=True, impl="torch", **x.options)
    shifted = first.energy + 1.3 * first.closeness * first.clamped
    direct = sk.pair_energy(*sides, 1.3 * first.closeness, impl="dense", **x.options)
    torch.testing.assert_close(shifted, direct.energy)
    for a, b in zip(*(torch.autograd.grad(value, codes) for value in (shifted, direct.energy))):
        torch.testing.assert_close(a, b)


def test_several_negatives_are_several_calls():
    x = make_pairs(B=3, N=4, P_i=5, P_j=6, D=8, Z=4)
    partners, clamp = torch.tensor([[0, 1, 2], [3, 3, 1]]), (0.0, None)
    together = sk.pair_energy(*x.tensors, 0.1, partner=partners, clamp=clamp)
    alone = [sk.pair_energy(*x.tensors, 0.1, partner=partner, clamp=clamp) for partner in partners]
    assert torch.equal(together.energy, torch.stack([one.energy for one in alone]))


def test_layers_show_their_settings_and_take_tensors():
    layer = sk.layers.CorrelationLoss(torch.tensor(0.25), (0.0, None), means=True)
    assert repr(layer) == (
        "CorrelationLoss(threshold=0.25, clamp=(0.0, None), center=True, hinge=False, means=True, impl='auto')"
    )
    smoothness = sk.layers.SmoothnessLoss(0.1, 0.5)
    assert repr(smoothness) == "SmoothnessLoss(within=0.1, across=0.5, center=True, relative=False, impl='auto')"
    f, c, shifts = torch.randn(2, 6, 3, 3), torch.randn(2, 4, 3, 3), torch.rand(2, requires_grad=True)
    out = layer(f, f, c, c, threshold=shifts, partner=torch.tensor([1, 0]), mean=0.2)
    torch.testing.assert_close(torch.autograd.grad(out.energy, shifts)[0].sum(), out.clamped)
    given = smoothness(f, c.softmax(1), "all", within=torch.tensor(0.3), across=0.2, mean=torch.tensor([0.1, 0.2]))
    want = sk.layers.SmoothnessLoss(0.3, 0.2)(f, c.softmax(1), "all", mean=torch.tensor([0.1, 0.2]))
    assert all(torch.equal(a, b) for a, b in zip(given, want))
