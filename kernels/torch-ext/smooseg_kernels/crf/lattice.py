"""Gaussian sums over N points in O(N d^2), approximately: the permutohedral lattice (Adams, Baek and Davis, 2010).

This is the form for every device, in PyTorch. A point spreads its value over the d+1 lattice points around it, the
lattice is blurred by 1 2 1 along its d+1 axes, and the point reads its sum from the same lattice points. All three are
gathers in a fixed order, so the same call gives the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

LARGEST_KEY = 1 << 62


class Permutohedral:
    """The filter of points fp64 [N,d], d from 1 to 8, for values of a dtype; points count in standard deviations.

    k_ij is about exp(-|p_i - p_j|^2 / 2). Only lattice points next to a point exist, and a blur reads 0 from the
    others, so sums of isolated points come out low, and the matrix is symmetric only to the order of the blurs.
    """

    def __init__(self, points: Tensor, dtype: torch.dtype):
        d = points.shape[1]
        keys, weights, strides = corners(points)
        vertices, self.corners = torch.unique(keys, return_inverse=True)  # [M], [N,d+1]
        order = self.corners.flatten().argsort(stable=True)
        self.splat = (
            order.div(d + 1, rounding_mode="floor"),
            starts(self.corners.flatten()[order], len(vertices)),
            weights.flatten()[order].to(dtype),
        )
        self.blurs = [blur(vertices, strides, axis, dtype) for axis in range(d + 1)]
        # the integral of the Gaussian over the volume of a lattice cell
        self.weights = (weights * (math.sqrt(d + 1) * (4 * math.pi / 3) ** (d / 2))).to(dtype)

    def __call__(self, values: Tensor) -> Tensor:
        for rows, offsets, weights in (self.splat, *self.blurs):
            values = embedding_bag(rows, values, offsets, mode="sum", per_sample_weights=weights)
        return embedding_bag(self.corners, values, mode="sum", per_sample_weights=self.weights)


def corners(points: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Finds the lattice points around points fp64 [N,d]: int64 keys [N,d+1], weights [N,d+1] and the keys' strides.

    The lattice has all vectors of d+1 integers that add up to 0 and leave the same remainder r when divided by d+1. An
    entry is (d+1) q + r; the key is r plus the sum over the first d entries of q times the stride of its place.
    """
    d = points.shape[1]
    period = d + 1
    places = torch.arange(period, device=points.device)
    elevated = elevate(points)
    quotients = torch.round(elevated / period)
    order = (elevated - quotients * period).sort(dim=1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
    # quotients must add up to 0: the entries that were rounded by most go to the next multiple
    ranks += quotients.sum(1, keepdim=True).long()
    turn = (ranks < 0).long() - (ranks > d).long()
    ranks += turn * period
    quotients += turn
    falling = (elevated / period - quotients).sort(dim=1, descending=True).values
    steps = (falling[:, :-1] - falling[:, 1:]).flip(1)
    weights = torch.cat((1 - steps.sum(1, keepdim=True), steps), 1)

    low = quotients.amin(0) - 2  # a corner is 1 lower at most, and a neighbour another 1 lower or higher
    sizes = [int(size) for size in (quotients.amax(0) - low + 2).tolist()[:d]]
    if period * math.prod(sizes) > LARGEST_KEY:
        raise ValueError("points reach too far for the keys of a lattice: divide them by larger sigmas")
    strides = [period * math.prod(sizes[:i]) for i in range(d)] + [0]
    steps_down = torch.tensor(strides, device=points.device)
    # the corner of remainder r has the entries of rank above d - r one period lower
    by_rank = steps_down.expand_as(ranks).gather(1, ranks.argsort(1))
    lowered = torch.cat((torch.zeros_like(by_rank[:, :1]), by_rank.flip(1).cumsum(1)[:, :-1]), 1)
    first = ((quotients - low).long() * steps_down).sum(1, keepdim=True)
    return first - lowered + places, weights, strides


def elevate(points: Tensor) -> Tensor:
    """Takes points [N,d] to the plane of sum 0 in d+1 dimensions, scaled for a filter of standard deviation 1."""
    d = points.shape[1]
    columns = []
    total = torch.zeros_like(points[:, 0])
    for i in range(d - 1, -1, -1):
        entry = points[:, i] * ((d + 1) * math.sqrt(2.0 / 3) / math.sqrt((i + 1.0) * (i + 2.0)))
        columns.append(total - (i + 1) * entry)
        total = total + entry
    return torch.stack((total, *columns[::-1]), 1)


def blur(vertices: Tensor, strides: list[int], axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Lists which of the sorted keys [M] each lattice point reads along an axis: rows, offsets [M] and weights."""
    M, d = len(vertices), len(strides) - 1
    remainder = vertices % (d + 1)
    step = torch.where(remainder < d, 1 - strides[axis], sum(strides) - strides[axis] - d)
    place = torch.searchsorted(vertices, vertices + step).clamp(max=M - 1)
    here = torch.arange(M, device=vertices.device)
    exists = vertices[place] == vertices + step
    low, high = here[exists], place[exists]
    readers, rows = torch.cat((here, low, high)), torch.cat((here, high, low))
    order = readers.argsort(stable=True)
    weights = torch.full(readers.shape, 0.25, dtype=dtype, device=vertices.device)
    weights[:M] = 0.5
    return rows[order], starts(readers[order], M), weights[order]


def starts(numbers: Tensor, count: int) -> Tensor:
    """Finds where each of 0 to count-1 begins in a sorted list."""
    return torch.searchsorted(numbers, torch.arange(count, device=numbers.device))
