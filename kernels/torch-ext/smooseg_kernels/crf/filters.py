"""The Gaussian filters of a dense CRF, behind one interface, and the filter of a regular grid."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

SMALLEST_PROBABILITY = 1e-5  # smaller ones count as it


class Filter(Protocol):
    """A linear map with a symmetric matrix k, that of one Gaussian kernel over the N pixels of one picture.

    Calling it takes values [N,C], fp32 or fp64 and contiguous, to [N,C] of the same dtype and device: the sums over j
    of k_ij values_j, with i itself included and nothing normalised; k_ij = exp(-|p_i - p_j|^2 / 2), up to a constant
    factor near 1 that is the same for all i, j. C changes from call to call (1 for the norm, K in every iteration).
    A filter may keep what it works out for its points, and must not keep or change `values`.

    A method is a function that takes points p, fp32 or fp64 [N,d], already divided by their sigmas, to a Filter.
    `mean_field` knows nothing else of it.
    """

    def __call__(self, values: Tensor) -> Tensor: ...


class Normalised:
    """The filter n_i k_ij n_j with n = (sum_j k_ij)^(-1/2) of a filter k, for values like these [N,C]."""

    def __init__(self, filter: Filter, like: Tensor):
        self.filter = filter
        self.norm = filter(torch.ones_like(like[:, :1])).rsqrt()

    def __call__(self, values: Tensor) -> Tensor:
        return self.filter(values * self.norm).mul_(self.norm)


class GridGaussian:
    """The filter of positions on a regular grid: exact to rounding, two passes of a short convolution.

    The Gaussian of a distance on a grid is a product of one Gaussian along the rows and one along the columns. Taps
    below a quarter of eps are dropped, which leaves those up to floor(sigma sqrt(-2 ln(eps / 4))) pixels away: 5.88
    sigma in fp32. All that is dropped adds up to less than 1e-8 of the kernel's sum in fp32, below half a rounding.
    """

    def __init__(self, height: int, width: int, sigma: float):
        self.height, self.width, self.sigma = height, width, sigma

    def __call__(self, values: Tensor) -> Tensor:
        grid = values.view(self.height, self.width, -1)
        return self.along(self.along(grid, 1), 0).reshape(values.shape)

    def along(self, grid: Tensor, axis: int) -> Tensor:
        """Convolves [H,W,C] along axis 0 or 1; zeros lie outside."""
        size = grid.shape[axis]
        reach = min(size - 1, math.floor(self.sigma * math.sqrt(-2.0 * math.log(torch.finfo(grid.dtype).eps / 4))))
        sums = grid.clone()
        for step in range(1, reach + 1):
            tap = math.exp(-0.5 * (step / self.sigma) ** 2)
            near, far = grid.narrow(axis, 0, size - step), grid.narrow(axis, step, size - step)
            sums.narrow(axis, 0, size - step).add_(far, alpha=tap)
            sums.narrow(axis, step, size - step).add_(near, alpha=tap)
        return sums


def bilateral_points(image: Tensor, sigma: float, sigma_color: float, dtype: torch.dtype) -> Tensor:
    """Takes a picture uint8 [H,W,3] to points [N,5]: column, row and colour, each divided by its sigma."""
    height, width, _ = image.shape
    row, column = torch.meshgrid(
        torch.arange(height, dtype=dtype, device=image.device),
        torch.arange(width, dtype=dtype, device=image.device),
        indexing="ij",
    )
    place = torch.stack((column, row), 2) / sigma
    return torch.cat((place, image.to(dtype) / sigma_color), 2).flatten(0, 1)


def positions(height: int, width: int, sigma: float, device: torch.device) -> Tensor:
    """Lists the pixels' columns and rows, fp64 [N,2], divided by sigma."""
    row, column = (torch.arange(size, dtype=torch.float64, device=device) / sigma for size in (height, width))
    return torch.stack((column.expand(height, -1), row[:, None].expand(-1, width)), 2).view(-1, 2)
