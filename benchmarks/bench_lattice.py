"""Refinement on a CPU: the dense CRF in both forms of its lattice, next to pydensecrf2 if installed; the guided filter.

OMP_NUM_THREADS=1 compares one thread each, because pydensecrf2 has no more.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import problems  # noqa: F401  # puts this checkout first
import pytest
import torch
from bench_crf import picture
from bench_extract import photo
from torch import Tensor
from torch.nn.functional import interpolate

import smooseg_kernels as sk
from smooseg_kernels.crf import lattice_form

CLASSES, PATCH = 27, 8
LARGEST_DIFFERENCE = 1e-5  # of the two forms
SMALLEST_AGREEMENT = 0.9999  # of labels
RADIUS, EPS = 24, 1e-4


@pytest.mark.parametrize("picture_of", ["grain", "shades"])
@pytest.mark.parametrize("size", [320, 1024])
def bench_dense_crf(size, picture_of, bench):
    probabilities, image, sizes = problem(size, picture_of, bench)

    def ours(impl: str) -> Tensor:
        return sk.dense_crf(probabilities, image, method="lattice", impl=impl)

    runs = {"torch": lambda: ours("torch")}
    if lattice_form() == "cpp":
        runs["cpp"] = lambda: ours("cpp")
        assert (ours("cpp") - ours("torch")).abs().max() <= LARGEST_DIFFERENCE
        assert agreement(ours("cpp"), ours("torch")) >= SMALLEST_AGREEMENT
    if importlib.util.find_spec("pydensecrf"):
        runs["pydensecrf2"] = lambda: peer(probabilities, image)
        assert agreement(ours("auto"), runs["pydensecrf2"]()) >= SMALLEST_AGREEMENT
    bench.alternating("dense_crf", f"{picture_of} {sizes['width']}px", sizes, runs, "float32", between=lambda: None)


@pytest.mark.parametrize("size", [320, 1024])
def bench_guided_filter(size, bench):
    probabilities, image, sizes = problem(size, "grain", bench)
    grey = image.float().mean(2).to(torch.uint8)
    runs = {
        name: lambda guide=guide: sk.guided_filter(probabilities, guide, radius=RADIUS, eps=EPS)
        for name, guide in (("colour", image), ("grey", grey))
    }
    for run in runs.values():
        assert (run().sum(0) - 1).abs().max() < 1e-3
    bench.alternating("guided_filter", f"{sizes['width']}px", sizes, runs, "float32", between=lambda: None)


def problem(size: int, picture_of: str, bench) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Soft scores in patches [K,size,size] and a picture uint8 [size,size,3]."""
    if bench.device != "cpu":
        pytest.skip("the refinements of a CPU")
    size = 32 if bench.smoke else size
    image = torch.from_numpy(photo(0, size, size)) if picture_of == "grain" else picture(size, 1, "cpu", 0)[1]
    coarse = torch.randn(1, CLASSES, size // PATCH, size // PATCH, generator=torch.Generator().manual_seed(0))
    probabilities = interpolate(coarse, (size, size), mode="bilinear")[0].clamp(-1, 1).mul(2).softmax(0)
    return probabilities, image, {"images": 1, "K": CLASSES, "height": size, "width": size}


def agreement(first: Tensor, second: Tensor) -> float:
    return float((first.argmax(0) == second.argmax(0)).double().mean())


def peer(probabilities: Tensor, image: Tensor) -> Tensor:
    import pydensecrf.densecrf as package

    K, H, W = probabilities.shape
    field = package.DenseCRF2D(W, H, K)
    field.setUnaryEnergy(np.ascontiguousarray(-probabilities.log().flatten(1).numpy()))
    field.addPairwiseGaussian(sxy=1, compat=3)
    field.addPairwiseBilateral(sxy=67, srgb=3, rgbim=np.ascontiguousarray(image.numpy()), compat=4)
    return torch.from_numpy(np.array(field.inference(10))).view(K, H, W)
