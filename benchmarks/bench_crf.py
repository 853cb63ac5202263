"""gaussian_sums over the pixels of a picture, and dense_crf by all pairs of them.

A problem's P are the pixels of one square picture; points have five coordinates, place and colour.
"""

import math

import problems
import pytest
import torch
from floors import Problem

import smooseg_kernels as sk
from smooseg_kernels.crf.filters import bilateral_points

CARD = torch.cuda.is_available()
SAMPLED_ROWS, GATED_SIDE, ERROR = 256, 40, 1e-4


def pixels(side):
    return Problem(B=1, P=side**2, D=5, Z=0, T=0)


SHAPES = {f"{side}px": pixels(side) for side in ((128, 320) if CARD else (64,))}


def picture(side, K, device, seed):
    """Probabilities [K,side,side] and a picture of smooth shades, uint8 [side,side,3]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=generator) * 255
    image = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255)[0].permute(1, 2, 0)
    scores = 2 * torch.randn(K, side, side, generator=generator)
    return torch.softmax(scores, 0).to(device), image.to(torch.uint8).to(device)


def counts(problem, times):
    """Bytes: points, values and sums once. Operations of a pair: 3 d for its exponent, 1 exponential, 2 K products."""
    pairs = problem.B * problem.P**2
    return times * problem.P * (5 * 4 + 2 * 4 * problem.K), times * pairs * (3 * 5 + 1 + 2 * problem.K)


def sums(problem, impl, mode, dtype, device, seed=0):
    side = math.isqrt(problem.P)
    q, image = picture(side, problem.K, device, seed)
    points, values = bilateral_points(image, 67, 3, torch.float32), q.flatten(1).mT.to(dtype).contiguous()

    def run():
        return sk.gaussian_sums(points[None], values[None], impl=impl)[0]

    def check(out):
        rows = torch.randperm(problem.P, generator=torch.Generator().manual_seed(seed))[:SAMPLED_ROWS].to(device)
        apart = sum((x[rows, None] - x) ** 2 for x in points.double().unbind(1))
        truth = torch.exp(-0.5 * apart) @ values.double()
        allowed = max(ERROR, 4 * torch.finfo(dtype).eps) if impl == "triton" else ERROR
        assert ((out[rows] - truth).abs() <= allowed * truth.abs() + 1e-6).all(), "Gaussian sums differ from float64"

    return problems.Subject(run, check, *counts(problem, 1))


def crf(problem, impl, mode, dtype, device, seed=0, iterations=10, method="exact"):
    """The lattice is an approximation, so that its values are not compared with all pairs."""
    side = math.isqrt(problem.P)
    q, image = picture(side, problem.K, device, seed)
    part = slice(0, min(side, GATED_SIDE))

    def run():
        return sk.dense_crf(q, image, iterations=iterations, method=method, impl=impl)

    def check(out):
        if method == "exact":
            got = sk.dense_crf(q[:, part, part], image[part, part], iterations=iterations, method="exact", impl=impl)
            truth = sk.dense_crf(q[:, part, part].double(), image[part, part], iterations=iterations, impl="dense")
            assert (got - truth).abs().max() < ERROR, "the CRF of a part differs from float64"
        assert (out.sum(0) - 1).abs().max() < ERROR, "probabilities do not add up to 1"

    return problems.Subject(run, check, *counts(problem, iterations))


problems.SUBJECTS |= {"gaussian sums": sums, "dense crf": crf}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_gaussian_sums(shape, dtype, impl, bench):
    bench.time("gaussian sums", shape, SHAPES[shape], impl, "forward", dtype=dtype)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_dense_crf(shape, impl, bench):
    bench.time("dense crf", shape, SHAPES[shape], impl, "forward", dtype="float32", iterations=1 if bench.smoke else 10)
