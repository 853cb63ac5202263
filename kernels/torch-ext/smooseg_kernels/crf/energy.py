"""The pairwise energy of a fully connected CRF, as a loss for label distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..precision import outside_autocast
from ..rows import accumulation_dtype
from .gaussian import LARGEST_DIMENSION, gaussian_sums
from .mean_field import settings


@outside_autocast
def crf_energy(
    positions: Tensor,
    colors: Tensor,
    probs: Tensor,
    *,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
    shift: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Computes the pairwise energy of a fully connected CRF on points of images, without the point-by-point matrix.

    energy = -mean over (image, i, j) of (k_ij - shift) p_i . p_j, with the kernel of Kraehenbuehl and Koltun, NIPS
    2011, arXiv 1210.5644: k_ij = w_1 exp(-|x_i - x_j|^2 / (2 a^2) - |c_i - c_j|^2 / (2 b^2)) + w_2 exp(-|x_i - x_j|^2 /
    (2 g^2)). Its minimum gives near points of one colour one label; pairs whose kernel is below the shift are pushed
    apart. STEGO (Hamilton et al., ICLR 2022, arXiv 2203.08414) and DepthG train on it with points drawn at random. The
    mean counts i = j. Time is O(N^2 (d + C + K)), memory that of the inputs and one tile of pairs.

    Args:
        positions: [B,N,d] finite, d >= 1, in the units of a and g. A constant.
        colors: [B,N,C] finite, d + C at most 8, in the units of b. A constant.
        probs: [B,N,K] label distributions, or rows of any length. Get gradients.
        gaussian: (g, w_2) of the kernel of distance alone; sigma above 0, weight 0 or more.
        bilateral: (a, b, w_1) of the kernel of distance and colour.
        shift: a finite number.
        impl: "auto", "triton", "torch" or "dense", as in `gaussian_sums`.

    Returns:
        [] fp32, or fp64 with any fp64 input. Has gradients of gradients.

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
        RuntimeError: impl="triton" cannot run here.
    """
    checks.float_tensor("positions", positions, ("B", "N", "d"), constant=True)
    B, N, d = positions.shape
    checks.float_tensor("colors", colors, (B, N, "C"), positions, constant=True)
    checks.float_tensor("probs", probs, (B, N, "K"), positions)
    if d + colors.shape[2] > LARGEST_DIMENSION:
        raise ValueError(
            f"positions and colors must have at most {LARGEST_DIMENSION} coordinates together, got {d} and "
            f"{colors.shape[2]}"
        )
    near, near_weight = settings("gaussian", gaussian, ("sigma", "weight"))
    reach, likeness, both_weight = settings("bilateral", bilateral, ("sigma", "sigma of colour", "weight"))
    shift = checks.number("shift", shift)
    dtype = accumulation_dtype(positions, colors, probs)
    x, c, p = positions.to(dtype), colors.to(dtype), probs.to(dtype)
    points = torch.cat((x / reach, c / likeness), 2)
    sums = both_weight * gaussian_sums(points, p, impl=impl) + near_weight * gaussian_sums(x / near, p, impl=impl)
    return ((shift * p.sum(1).square()).sum() - (p * sums).sum()) / (B * N * N)
