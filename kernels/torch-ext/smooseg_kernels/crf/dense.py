"""The Gaussian filters as written: a matrix of all pairs in float64, the oracle of the tests for small pictures."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LARGEST_PIXELS = 4096  # a matrix of 128 MiB


class MatrixFilter:
    """The filter of any points [N,d], with its matrix in memory. Computes in float64 whatever comes."""

    def __init__(self, points: Tensor):
        self.matrix = gaussian_matrix(points.double()[None])[0]

    def __call__(self, values: Tensor) -> Tensor:
        return (self.matrix @ values.double()).to(values.dtype)


def gaussian_matrix(points: Tensor) -> Tensor:
    """Takes points [B,N,d] to exp(-|p_i - p_j|^2 / 2), [B,N,N]."""
    return torch.exp(-0.5 * functools.reduce(torch.add, ((x[:, :, None] - x[:, None]) ** 2 for x in points.unbind(2))))


def gaussian_sums(points: Tensor, values: Tensor) -> Tensor:
    """Takes points [B,N,d] and values [B,N,K] to sums [B,N,K]."""
    return gaussian_matrix(points) @ values


def require_small(pixels: int) -> None:
    if pixels > LARGEST_PIXELS:
        raise ValueError(
            f'impl="dense" writes a matrix of pixels x pixels, and takes pictures to {LARGEST_PIXELS} pixels, '
            f'got {pixels}: use impl="auto"'
        )
