"""The dense CRF on a CPU: both forms of its lattice, and pydensecrf2 where it is installed, on a picture of grain."""

from __future__ import annotations

import importlib.util

import numpy as np
import problems  # noqa: F401  # puts this checkout first
import pytest
import torch
from bench_extract import photo
from torch import Tensor

import smooseg_kernels as sk
from smooseg_kernels.crf import lattice_form
from smooseg_kernels.crf.filters import bilateral_points
from smooseg_kernels.crf.lattice import Permutohedral
from smooseg_kernels.crf.mean_field import mean_field

CLASSES, PATCH = 27, 8
SMALLEST_AGREEMENT = 0.9999  # of labels


@pytest.mark.parametrize("size", [320, 1024])
def bench_dense_crf(size, bench):
    if bench.device != "cpu":
        pytest.skip("the lattice of a CPU")
    size = 32 if bench.smoke else size
    image = torch.from_numpy(photo(0, size, size))
    coarse = torch.randn(1, CLASSES, size // PATCH, size // PATCH, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")[0]
    probabilities = smooth.clamp(-1, 1).mul(2).softmax(0)

    def ours(impl: str) -> Tensor:
        return sk.dense_crf(probabilities, image, method="lattice", impl=impl)

    runs = {"torch": lambda: ours("torch")}
    if lattice_form() == "cpp":
        runs["cpp"] = lambda: ours("cpp")
        assert agreement(ours("cpp"), ours("torch")) >= SMALLEST_AGREEMENT
    if importlib.util.find_spec("pydensecrf"):
        runs["pydensecrf2"] = lambda: peer(probabilities, image)
        assert agreement(with_lattices_alone(probabilities, image), runs["pydensecrf2"]()) >= SMALLEST_AGREEMENT
    sizes = {"images": 1, "K": CLASSES, "height": size, "width": size}
    bench.alternating("dense_crf", f"{size}px", sizes, runs, "float32", between=lambda: None)


def agreement(first: Tensor, second: Tensor) -> float:
    return float((first.argmax(0) == second.argmax(0)).double().mean())


def with_lattices_alone(probabilities: Tensor, image: Tensor) -> Tensor:
    """The model of pydensecrf2, which approximates the Gaussian of distance too; dense_crf sums it exactly."""
    place = bilateral_points(image, 1, 1, torch.float32)[:, :2].contiguous()
    filters = [(Permutohedral(place), 3.0), (Permutohedral(bilateral_points(image, 67, 3, torch.float32)), 4.0)]
    return mean_field(probabilities.log().flatten(1).T.contiguous(), filters, 10).T.reshape_as(probabilities)


def peer(probabilities: Tensor, image: Tensor) -> Tensor:
    import pydensecrf.densecrf as package

    K, H, W = probabilities.shape
    field = package.DenseCRF2D(W, H, K)
    field.setUnaryEnergy(np.ascontiguousarray(-probabilities.log().flatten(1).numpy()))
    field.addPairwiseGaussian(sxy=1, compat=3)
    field.addPairwiseBilateral(sxy=67, srgb=3, rgbim=image.numpy(), compat=4)
    return torch.from_numpy(np.array(field.inference(10))).view(K, H, W)
