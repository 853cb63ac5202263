"""The projection in Triton against its formula in float64: values, gradients, masks, several heads, odd sizes."""

import pytest
import torch
import torch.nn.functional as F

from smooseg_kernels.dispatch import fused_projection

projection = pytest.importorskip("smooseg_kernels.triton.projection")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not projection.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1"
)
# B, P, D, Z, H: tails of rows, of channels and of codes; more blocks of rows than a program takes at a time
SIZES = [(3, 37, 46, 10, 2), (2, 50, 64, 16, 1), (2, 70, 20, 70, 1)]
NAMES = ("codes", "linear", "bias", "hidden", "hidden bias", "outer")
# of 16 bits, relative, a third above what was measured; the interpreter cuts where a card rounds
ERRORS = dict(zip(NAMES, (1e-2, 3e-3, 3e-3, 1.4e-2, 8e-3, 1e-2)))
FP32 = dict.fromkeys(NAMES, 6e-7)  # measured: 2.7e-7


def inputs(B, P, D, Z, H, *, linear_mask=True, hidden_mask=True):
    g = torch.Generator().manual_seed(0)
    shapes = (H, Z, D), (H, Z), (H, D, D), (H, D), (H, Z, D)
    weights = [torch.randn(*s, generator=g) / (D**0.5 if len(s) == 3 else 1) for s in shapes]
    masks = [(torch.rand(B, D, generator=g) > 0.2) * 1.25 if mask else None for mask in (linear_mask, hidden_mask)]
    features, upstream = torch.randn(B, P, D, generator=g), 1.7 * torch.randn(H, B, P, Z, generator=g)
    on_device = [[None if x is None else x.to(DEVICE) for x in group] for group in (masks, weights)]
    return features.to(DEVICE), *on_device, upstream.to(DEVICE)


def formula(features, masks, weights, upstream):
    f, upstream = features.double(), upstream.double()
    weights = [weight.double().requires_grad_() for weight in weights]
    linear, bias, hidden, hidden_bias, outer = weights
    of_linear, of_hidden = (f if mask is None else f * mask.double()[:, None] for mask in masks)
    curved = F.silu(torch.einsum("bpd,hed->hbpe", of_hidden, hidden) + hidden_bias[:, None, None])
    codes = torch.einsum("bpd,hzd->hbpz", of_linear, linear) + torch.einsum("hbpe,hze->hbpz", curved, outer)
    codes = codes + bias[:, None, None]
    return dict(zip(NAMES, (codes.detach(), *torch.autograd.grad(codes, weights, upstream))))


def fused(features, masks, weights, upstream):
    weights = [weight.clone().requires_grad_() for weight in weights]
    codes = projection.Projection.apply(features, *masks, *weights)
    return dict(zip(NAMES, (codes.detach(), *torch.autograd.grad(codes, weights, upstream.to(codes.dtype)))))


def compare(got, truth, errors):
    for name, value in truth.items():
        error = (got[name].double() - value).norm() / value.norm()
        assert error <= errors[name], f"{name} is off by {error:.1e}"


@pytest.mark.skipif(DEVICE == "cuda", reason="a card multiplies fp32 in tf32")
@pytest.mark.parametrize(
    ("sizes", "linear_mask", "hidden_mask"),
    [(SIZES[0], True, True), (SIZES[0], False, True), (SIZES[1], True, False), (SIZES[2], False, False)],
)
def test_the_formula(sizes, linear_mask, hidden_mask, monkeypatch):
    monkeypatch.setattr(projection, "PRODUCTS", torch.float32)  # nothing but fp32's own rounding is left
    case = inputs(*sizes, linear_mask=linear_mask, hidden_mask=hidden_mask)
    compare(fused(*case), formula(*case), FP32)


@pytest.mark.parametrize(
    ("sizes", "dtype"), [(SIZES[0], torch.bfloat16), (SIZES[1], torch.float16), (SIZES[2], torch.bfloat16)]
)
def test_sixteen_bits(sizes, dtype):
    features, *rest = inputs(*sizes)
    case = features.to(dtype), *rest
    got, again = fused(*case), fused(*case)
    assert got["codes"].dtype == torch.bfloat16
    assert all(got[name].dtype == torch.float32 for name in NAMES[1:])
    assert all(torch.equal(value, again[name]) for name, value in got.items())
    compare(got, formula(*case), ERRORS)


def test_what_it_serves():
    half = torch.empty(1, 2, 3, dtype=torch.float16, device=DEVICE)
    assert fused_projection(half, 64) is projection.Projection
    assert fused_projection(half.float(), 64) is None
    assert fused_projection(half, projection.WIDEST_CODES + 1) is None
