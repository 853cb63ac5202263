"""The dense CRF and the Gaussian sums under it, against float64 and against sums over pixels as written."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch.library import opcheck

import smooseg_kernels as sk
from smooseg_kernels.crf import dense, tiled
from smooseg_kernels.crf.boxes import bounding_boxes, farthest, nearby_order
from smooseg_kernels.crf.filters import GridGaussian, positions

HAS_TRITON = importlib.util.find_spec("triton") is not None
FUSED = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def picture(H, W, seed=0):
    """Flat regions with a little noise: uint8 [H,W,3]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 230, (-(-H // 8), -(-W // 8), 3), generator=generator)
    fine = coarse.repeat_interleave(8, 0).repeat_interleave(8, 1)[:H, :W]
    return (fine + torch.randint(0, 25, (H, W, 3), generator=generator)).to(torch.uint8)


def probabilities(K, H, W, seed=0):
    return torch.softmax(2 * torch.randn(K, H, W, generator=torch.Generator().manual_seed(seed)), 0)


def as_written(p, image, iterations, gaussian, bilateral):
    """The equations over lists of pixels, in float64: [K,H,W]."""
    K, H, W = p.shape
    place = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"), 2).view(-1, 2).double()
    color = image.view(-1, 3).double()
    apart = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    unlike = ((color[:, None] - color) ** 2).sum(2)
    spatial = torch.exp(-apart / (2 * gaussian[0] ** 2))
    both = torch.exp(-apart / (2 * bilateral[0] ** 2) - unlike / (2 * bilateral[1] ** 2))
    unary = -p.double().clamp(min=1e-5).log().view(K, -1)
    q = torch.softmax(-unary, 0)
    for _ in range(iterations):
        message = 0.0
        for kernel, weight in ((spatial, gaussian[1]), (both, bilateral[2])):
            n = kernel.sum(1) ** -0.5
            message = message + weight * torch.einsum("i,ij,j,kj->ki", n, kernel, n, q)
        q = torch.softmax(message - unary, 0)
    return q.view(K, H, W)


@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_oracle_is_the_equations(iterations):
    p, image = probabilities(3, 7, 11), picture(7, 11)
    kernels = {"gaussian": (1.5, 2.0), "bilateral": (5, 20, 3)}
    got = sk.dense_crf(p, image, iterations=iterations, **kernels, impl="dense")
    assert got.dtype == torch.float32
    assert (got - as_written(p, image, iterations, *kernels.values())).abs().max() < 1e-6


@pytest.mark.parametrize(("K", "H", "W"), [(1, 5, 3), (2, 1, 23), (27, 37, 29)])
def test_exact_matches_the_oracle(K, H, W):
    p, image = probabilities(K, H, W), picture(H, W)
    got = sk.dense_crf(p, image, method="exact", impl="torch")
    truth = sk.dense_crf(p.double(), image, impl="dense")
    assert (got.shape, got.dtype, got.is_contiguous()) == (p.shape, torch.float32, True)
    assert (got - truth).abs().max() < 1e-5
    assert (got.sum(0) - 1).abs().max() < 1e-5
    fp64 = sk.dense_crf(p.double(), image, method="exact", impl="torch")
    assert fp64.dtype == torch.float64
    assert (fp64 - truth).abs().max() < 1e-12
    half = sk.dense_crf(p.half(), image, method="exact")
    assert half.dtype == torch.float16
    assert (half - sk.dense_crf(p.half().double(), image, impl="dense")).abs().max() < 1e-3


def test_batch_equals_single_pictures_and_keeps_its_input():
    p = torch.stack([probabilities(4, 13, 17, seed) for seed in (0, 1)])
    images = torch.stack([picture(13, 17, seed) for seed in (0, 1)])
    before = p.clone()
    both = sk.dense_crf(p, images, method="exact")
    assert torch.equal(p, before)
    for n in range(2):
        assert torch.equal(both[n], sk.dense_crf(p[n], images[n], method="exact"))
    assert (both - p).abs().max() > 0.3  # the two pictures differ from their inputs, and noise is gone
    assert torch.equal(both, sk.dense_crf(p, images, method="exact"))


def test_a_weight_of_0_leaves_its_kernel_out():
    p, image = probabilities(3, 9, 8), picture(9, 8)
    none = sk.dense_crf(p, image, gaussian=(1, 0), bilateral=(67, 3, 0), method="exact")
    assert (none - p).abs().max() < 1e-6
    one = sk.dense_crf(p, image, bilateral=(67, 3, 0), method="exact")
    assert (one - as_written(p, image, 10, (1, 3), (67, 3, 0))).abs().max() < 1e-5


@pytest.mark.parametrize(("sigma", "dtype"), [(1, torch.float32), (3.7, torch.float32), (1, torch.float64)])
def test_grid_filter_is_the_sum_over_all_pairs(sigma, dtype):
    H, W = 23, 41
    values = torch.rand(H * W, 3, dtype=dtype)
    truth = dense.MatrixFilter(positions(H, W, sigma, values.device))(values.double())
    error = ((GridGaussian(H, W, sigma)(values) - truth).abs() / truth).max()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", ["torch", FUSED])
@pytest.mark.parametrize(("B", "N", "d", "K"), [(2, 1, 1, 1), (1, 67, 8, 3), (2, 71, 5, 65)])
def test_sums_and_gradients_match_float64(impl, B, N, d, K, poisoned):
    torch.manual_seed(0)
    points, values = 2 * torch.randn(B, N, d, device=DEVICE), torch.randn(B, N, K, device=DEVICE)
    upstream = 1.7 * torch.randn(B, N, K, device=DEVICE)

    def run(form, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (points.clone(), values.clone())]
        out = sk.gaussian_sums(*inputs, impl=form)
        return out, *torch.autograd.grad(out, inputs, upstream.to(dtype))

    got, truth = run(impl, torch.float32), run("dense", torch.float64)
    for a, b in zip(got, truth):
        assert (a - b).norm() <= 2e-5 * b.norm() + 1e-5 * (N == 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", FUSED])
def test_values_of_16_bits_are_summed_in_fp32(impl, dtype):
    torch.manual_seed(0)
    points, values = torch.randn(1, 70, 5, device=DEVICE), torch.randn(1, 70, 9, device=DEVICE).to(dtype)
    values.requires_grad_()
    out = sk.gaussian_sums(points, values, impl=impl)
    (gradient,) = torch.autograd.grad(out.sum(), values)
    truth = sk.gaussian_sums(points.double(), values.double(), impl="dense")
    assert (out.dtype, gradient.dtype) == (torch.float32, dtype)
    assert (out - truth).norm() <= (4 * torch.finfo(dtype).eps if impl == "triton" else 1e-6) * truth.norm()


def test_gradients_of_any_order():
    torch.manual_seed(0)
    points, values = (torch.randn(2, 5, n, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    assert torch.autograd.gradcheck(sk.gaussian_sums, (points, values))
    assert torch.autograd.gradgradcheck(sk.gaussian_sums, (points, values))


@pytest.mark.parametrize("impl", ["torch", FUSED])
def test_operators_are_registered_in_full(impl):
    inputs = [torch.randn(2, 6, n, device=DEVICE).requires_grad_() for n in (5, 3)]
    if impl == "torch":
        op = tiled.gaussian_sums
    else:
        from smooseg_kernels.triton.gaussian import gaussian_sums as op
    opcheck(op, (*inputs, 0.0))


def test_compiles_in_one_piece():
    points, values = torch.randn(1, 40, 5), torch.randn(1, 40, 3, requires_grad=True)

    def energy(p, v):
        return (v * sk.gaussian_sums(p, v)).sum()

    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    got, truth = (torch.autograd.grad(f(points, values), values)[0] for f in (compiled, energy))
    assert torch.allclose(got, truth, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", FUSED])
def test_tolerance_bounds_what_is_left_out(impl, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_PAIRS", 1)
    torch.manual_seed(0)
    groups = (torch.arange(320, device=DEVICE) // 64)[None, :, None]  # 3.4 sigmas apart: a Gaussian of 0.003
    points = 2.4 * groups + 0.01 * torch.randn(1, 320, 2, device=DEVICE)
    values = torch.rand(1, 320, 2, device=DEVICE)
    truth = sk.gaussian_sums(points.double(), values.double(), impl="dense")
    exact, rough = (sk.gaussian_sums(points, values, tolerance=t, impl=impl) for t in (0.0, 1e-2))
    assert (exact - truth).abs().max() < 1e-4
    error = (rough - truth).abs()
    assert error.max() > 1e-3
    assert bool((error <= 1e-2 * values.sum(1, keepdim=True)).all())


def test_boxes_and_order():
    torch.manual_seed(0)
    points = 10 * torch.rand(1000, 3)
    order = nearby_order(points, 64)
    assert torch.equal(order.sort().values, torch.arange(1000))
    mixed, near = (bounding_boxes(p.mT[None], 64, 4) for p in (points, points[order]))
    assert near.shape == (1, 16, 2, 4)
    assert not near[..., 3].any()
    assert (near[:, :, 1] - near[:, :, 0]).mean() < 0.7 * (mixed[:, :, 1] - mixed[:, :, 0]).mean()
    assert torch.equal(nearby_order(points[:64], 64), torch.arange(64))
    assert farthest(math.exp(-8), torch.float32) == pytest.approx(4)


P, IMAGE = torch.full((2, 4, 5), 0.5), torch.zeros(4, 5, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"probabilities": P[0]}, ValueError, r"probabilities must have shape \[K, H, W\], got \[4, 5\]"),
        ({"probabilities": P * 3}, ValueError, "probabilities must be 0 to 1, got 1.5 to 1.5"),
        ({"probabilities": P * math.nan}, ValueError, "probabilities must be 0 to 1, got nan"),
        ({"probabilities": P.clone().requires_grad_()}, ValueError, "gets no gradient"),
        ({"image": IMAGE.float()}, TypeError, r"image must be a uint8 tensor \[4, 5, 3\], got torch.float32"),
        ({"image": IMAGE[:3]}, ValueError, r"image must have shape \[4, 5, 3\].* got \[3, 5, 3\]"),
        ({"iterations": -1}, ValueError, "iterations must be 0 or more, got -1"),
        ({"gaussian": 3}, TypeError, r"gaussian must be 2 numbers \(sigma, weight\), got 3"),
        ({"bilateral": (0, 3, 4)}, ValueError, r"bilateral must have sigmas above 0 .* got \(0, 3, 4\)"),
        ({"bilateral": (1, 3, math.inf)}, ValueError, "bilateral, its weight, must be finite, got inf"),
        ({"method": "fast"}, ValueError, "method must be .* got 'fast'"),
        ({"method": "exact", "impl": "cpp"}, ValueError, 'impl must be one of "auto", "triton".* got \'cpp\''),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_dense_crf_names_what_is_wrong(arguments, kind, message):
    with pytest.raises(kind, match=message):
        sk.dense_crf(**{"probabilities": P, "image": IMAGE, **arguments})


def test_the_oracle_refuses_large_pictures():
    with pytest.raises(ValueError, match="to 4096 pixels, got 4225"):
        sk.dense_crf(torch.ones(1, 65, 65), torch.zeros(65, 65, 3, dtype=torch.uint8), impl="dense")


@pytest.mark.parametrize(
    ("points", "values", "options", "message"),
    [
        ((1, 3, 9), (1, 3, 2), {}, "points must have at most 8 coordinates"),
        ((1, 3, 5), (1, 4, 2), {}, r"values must have shape \[1, 3, K\], got \[1, 4, 2\]"),
        ((1, 3, 5), (1, 3, 2), {"tolerance": 1.0}, "tolerance must be 0 or more and below 1, got 1.0"),
        ((1, 3, 5), (1, 3, 2), {"impl": "fast"}, "impl must be .* got 'fast'"),
    ],
)
def test_gaussian_sums_names_what_is_wrong(points, values, options, message):
    with pytest.raises(ValueError, match=message):
        sk.gaussian_sums(torch.rand(points), torch.rand(values), **options)
