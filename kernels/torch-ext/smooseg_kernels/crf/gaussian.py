"""The front door of the Gaussian sum over all pairs of points, and the filter that it makes."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import checks
from ..derivatives import refuse_forward_mode, refuse_transforms
from ..dispatch import HAS_TRITON, implementation
from ..operators import as_arguments
from ..precision import outside_autocast
from ..rows import accumulation_dtype
from . import dense, tiled
from .boxes import nearby_order

LARGEST_DIMENSION = 8
LEAF = 64  # points that a block of the implementations holds
IMPLS = ("auto", "triton", "torch", "dense")


@outside_autocast
def gaussian_sums(points: Tensor, values: Tensor, *, tolerance: float = 0.0, impl: str = "auto") -> Tensor:
    """Sums values over all pairs of points with Gaussian weights: out_i = sum_j exp(-|p_i - p_j|^2 / 2) v_j.

    The sum includes j = i, and nothing is normalised. Time is O(N^2 (d + K)); memory next to the inputs is the output
    and one tile of pairs, or the pair matrix with "dense". The matrix is symmetric, so the gradient to values is the
    same sum of the upstream gradient, and a quadratic form sum_ij k_ij x_i . x_j is (x * gaussian_sums(p, x)).sum().

    Args:
        points: [B,N,d] finite, d at most 8, each coordinate divided by its sigma beforehand. Gets gradients, for which
            the backward pass sums 2 K d columns more.
        values: [B,N,K]. Gets gradients.
        tolerance: 0 to 1, a constant. Gaussians below it may be left out, in blocks of neighbouring rows whose bounding
            boxes are that far apart; out_i is then off by at most tolerance * sum_j |v_j|. With 0, only Gaussians below
            1e-26 (fp64: 1e-260) count as 0. Order the rows by place to leave out many. "dense" leaves out none.
        impl: "auto", "triton" (fp32, fp16, bf16), "torch" or "dense". "auto" picks "triton" where both inputs are on a
            GPU, neither is fp64 and Triton is installed; else "torch". With 16-bit values "triton" rounds the Gaussians
            to that type too; sums are fp32.

    Returns:
        [B,N,K] fp32, or fp64 with any fp64 input. Gradients of any order; only "dense" runs inside torch.func.

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
        RuntimeError: impl="triton" cannot run here.
    """
    checks.float_tensor("points", points, ("B", "N", "d"))
    B, N, d = points.shape
    if d > LARGEST_DIMENSION:
        raise ValueError(f"points must have at most {LARGEST_DIMENSION} coordinates, got shape {list(points.shape)}")
    checks.float_tensor("values", values, (B, N, "K"), points)
    tolerance = checks.number("tolerance", tolerance, "a number from 0 to 1, a constant of this function")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be 0 or more and below 1, got {tolerance}")
    if impl not in IMPLS:
        raise ValueError(f'impl must be "auto", "triton", "torch" or "dense", got {impl!r}')
    if impl == "auto":
        impl = "triton" if triton_serves(points, values) else "torch"
    dtype = accumulation_dtype(points, values)
    if impl == "dense":
        return dense.gaussian_sums(points.to(dtype), values.to(dtype))
    cut = as_arguments(checks.varying(tolerance, dtype, points.device))
    if impl == "triton":
        return fused(points, values).gaussian_sums(points.to(dtype), values, *cut)
    refuse_forward_mode(impl, points, values)
    refuse_transforms(impl, points, values)
    return tiled.gaussian_sums(points.to(dtype), values.to(dtype), *cut)


def triton_serves(*tensors: Tensor) -> bool:
    return HAS_TRITON and all(t.is_cuda and accumulation_dtype(t) != torch.float64 for t in tensors)


def fused(*tensors: Tensor) -> ModuleType:
    """Returns the module of Triton's kernel, or says why it cannot serve."""
    module = implementation("triton", (1, 1), *tensors)
    return module.gaussian


class AllPairs:
    """The filter of points [N,d] that sums over all pairs of them.

    It leaves out blocks of pairs that together weigh less than half a rounding of a pixel's own weight, which is 1. To
    make these many, it walks the points in the order of a k-d tree.
    """

    def __init__(self, points: Tensor, impl: str):
        self.order, self.impl = nearby_order(points, LEAF), impl
        self.points = points[self.order][None]
        self.tolerance = torch.finfo(points.dtype).eps / 2 / len(points)

    def __call__(self, values: Tensor) -> Tensor:
        sums = gaussian_sums(self.points, values[self.order][None], tolerance=self.tolerance, impl=self.impl)[0]
        return torch.empty_like(sums).index_copy_(0, self.order, sums)
