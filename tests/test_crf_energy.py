"""The CRF energy against its formula, its gradients, and its layer."""

import pytest
import torch

import smooseg_kernels as sk

KERNELS = dict(gaussian=(2.0, 3.0), bilateral=(4.0, 0.3, 10.0))


def picture(B=2, K=3, h=5, w=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(B, 3, h, w, generator=generator, dtype=dtype)
    probs = torch.randn(B, K, h, w, generator=generator, dtype=dtype).softmax(1)
    number = torch.arange(h * w)
    places = torch.stack((number // w, number % w), 1).to(dtype).expand(B, -1, -1)
    return images, probs, places


@pytest.mark.parametrize("impl", ["dense", "torch"])
def test_it_is_the_formula(impl):
    images, probs, x = picture()
    c, p = images.flatten(2).mT, probs.flatten(2).mT.requires_grad_()
    near = torch.cdist(x, x) ** 2
    k = 10 * torch.exp(-near / 32 - torch.cdist(c, c) ** 2 / (2 * 0.3**2)) + 3 * torch.exp(-near / 8)
    want = -((k - 0.4) * (p @ p.mT)).mean()
    got = sk.crf_energy(x, c, p, shift=0.4, impl=impl, **KERNELS)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(1.7 * got, p), torch.autograd.grad(1.7 * want, p))


def test_the_layer_takes_pixels_or_draws_them():
    images, probs, x = picture()
    layer, every = (sk.layers.CRFLoss(shift=0.4, samples=n, **KERNELS) for n in (11, None))
    c, p = images.flatten(2).mT, probs.flatten(2).mT
    torch.testing.assert_close(every(images, probs), sk.crf_energy(x, c, p, shift=0.4, **KERNELS))
    pixels = torch.tensor([3, 30, 8])
    part = sk.crf_energy(x[:, pixels], c[:, pixels], p[:, pixels], shift=0.4, **KERNELS)
    torch.testing.assert_close(layer(images, probs, pixels), part)
    torch.manual_seed(5)
    drawn = layer(images, probs)
    torch.manual_seed(5)
    torch.testing.assert_close(drawn, layer(images, probs, torch.randperm(35)[:11]))
    assert "samples=11" in repr(layer)


def test_gradients_of_any_order_and_of_half_precision():
    images, probs, x = picture(h=2, w=3)
    c, p = images.flatten(2).mT, probs.flatten(2).mT.requires_grad_()

    def function(p):
        return sk.crf_energy(x, c, p, impl="torch", **KERNELS)

    assert torch.autograd.gradcheck(function, p)
    assert torch.autograd.gradgradcheck(function, p)
    half = p.detach().half().requires_grad_()
    energy = sk.crf_energy(x.float(), c.float(), half, **KERNELS)
    assert energy.dtype == torch.float32
    got, want = torch.autograd.grad(energy, half)[0], torch.autograd.grad(function(p), p)[0]
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-5)


WRONG = {
    "positions must have shape \\[B, N, d\\]": dict(positions=torch.zeros(3, 2)),
    "colors must have shape \\[2, 4, C\\], got \\[2, 5, 3\\]": dict(colors=torch.zeros(2, 5, 3)),
    "colors is a constant": dict(colors=torch.zeros(2, 4, 3, requires_grad=True)),
    "probs must have shape \\[2, 4, K\\]": dict(probs=torch.zeros(2, 3, 5)),
    "at most 8 coordinates together, got 2 and 7": dict(colors=torch.zeros(2, 4, 7)),
    "gaussian must be 2 numbers": dict(gaussian=(1.0,)),
    "bilateral must have sigmas above 0": dict(bilateral=(1.0, 0.0, 2.0)),
    "shift must be finite": dict(shift=float("inf")),
    'impl must be "auto"': dict(impl="cuda"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    rows = dict(positions=torch.zeros(2, 4, 2), colors=torch.zeros(2, 4, 3), probs=torch.zeros(2, 4, 5))
    with pytest.raises((ValueError, TypeError), match=message):
        sk.crf_energy(**{**rows, **KERNELS, **WRONG[message]})


def test_wrong_pixels_are_named():
    images, probs, _ = picture()
    layer = sk.layers.CRFLoss(**KERNELS)
    with pytest.raises(TypeError, match="pixels must be an int64 tensor"):
        layer(images, probs, torch.zeros(3))
    with pytest.raises(ValueError, match="pixels must hold pixel numbers 0 to 34, got 0 to 35"):
        layer(images, probs, torch.arange(36))
    with pytest.raises(ValueError, match="samples must be 1 or more"):
        sk.layers.CRFLoss(samples=0, **KERNELS)
