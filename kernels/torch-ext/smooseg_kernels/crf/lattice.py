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
MOST_SUMMED = 128  # numbers that one sum adds before it is added to others
Bags = tuple[Tensor, Tensor, Tensor]  # rows of values, where each sum begins in them, weights of the rows


class Permutohedral:
    """The filter of points fp64 [N,d], d from 1 to 8, for values of a dtype; points count in standard deviations.

    k_ij is about exp(-|p_i - p_j|^2 / 2). Only lattice points next to a point exist, and a blur reads 0 from the
    others, so sums of isolated points come out low, and the matrix is symmetric only to the order of the blurs. No sum
    adds more than MOST_SUMMED numbers to one, so that fp32 keeps its digits where thousands of points share a cell.
    """

    def __init__(self, points: Tensor, dtype: torch.dtype):
        N, d = points.shape
        keys, weights, strides = corners(points)
        ordered, order = keys.flatten().sort(stable=True)
        vertices, counts = torch.unique_consecutive(ordered, return_counts=True)  # [M]
        corner_of = torch.empty_like(order).scatter_(0, order, torch.repeat_interleave(counts))
        parts = (counts + MOST_SUMMED - 1).div(MOST_SUMMED, rounding_mode="floor")
        numbers = torch.repeat_interleave(parts)  # the lattice point of every part
        place = torch.arange(len(numbers), device=points.device) - starts(parts)[numbers]
        offsets = starts(counts)[numbers] + place * MOST_SUMMED
        # the integral of the Gaussian over the volume of a lattice cell
        volume = math.sqrt(d + 1) * (4 * math.pi / 3) ** (d / 2)
        rows = order.div(d + 1, rounding_mode="floor")
        self.bags = [bags(rows, offsets, weights.flatten()[order], dtype)]
        if len(numbers) > len(vertices):
            ones = weights.new_ones(len(numbers))
            self.bags.append(bags(torch.arange(len(numbers), device=points.device), starts(parts), ones, dtype))
        self.bags += [blur(vertices, strides, axis, dtype) for axis in range(d + 1)]
        self.bags.append(bags(corner_of, range_of(N, d + 1, points.device), weights.flatten() * volume, dtype))

    @classmethod
    def normalised(cls, points: Tensor, dtype: torch.dtype) -> Permutohedral:
        """Builds the filter n_i k_ij n_j with n = (sum_j k_ij)^(-1/2), which is computed in fp64."""
        lattice = cls(points, torch.float64)
        norm = lattice(torch.ones_like(points[:, :1])).rsqrt()
        (rows, offsets, weights), *others, (corner_of, firsts, slices) = lattice.bags
        splat = (rows, offsets, weights * norm[rows, 0])
        read = (corner_of, firsts, slices.view(-1, points.shape[1] + 1).mul(norm).flatten())
        lattice.bags = [(rows, offsets, weights.to(dtype)) for rows, offsets, weights in (splat, *others, read)]
        return lattice

    def __call__(self, values: Tensor) -> Tensor:
        for rows, offsets, weights in self.bags:
            values = embedding_bag(rows, values, offsets, mode="sum", per_sample_weights=weights)
        return values


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
    order = torch.empty_like(ranks).scatter_(1, ranks, places.expand_as(ranks))
    falling = (elevated / period - quotients).gather(1, order)
    steps = (falling[:, :-1] - falling[:, 1:]).flip(1)
    weights = torch.cat((1 - steps.sum(1, keepdim=True), steps), 1)

    low = quotients.amin(0) - 2  # a corner is 1 lower at most, and a neighbour another 1 lower or higher
    sizes = [int(size) for size in (quotients.amax(0) - low + 2).tolist()[:d]]
    if period * math.prod(sizes) > LARGEST_KEY:
        raise ValueError("points reach too far for the keys of a lattice: divide them by larger sigmas")
    strides = [period * math.prod(sizes[:i]) for i in range(d)] + [0]
    steps_down = torch.tensor(strides, device=points.device)
    # the corner of remainder r has the entries of rank above d - r one period lower
    by_rank = steps_down[order]
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


def blur(vertices: Tensor, strides: list[int], axis: int, dtype: torch.dtype) -> Bags:
    """Lists which of the sorted keys [M] each lattice point reads along an axis: itself, the one before, the next."""
    M, d = len(vertices), len(strides) - 1
    remainder = vertices % (d + 1)
    next_keys = vertices + torch.where(remainder < d, 1 - strides[axis], sum(strides) - strides[axis] - d)
    place = torch.searchsorted(vertices, next_keys).clamp_(max=M - 1)
    here = torch.arange(M, device=vertices.device)
    exists = vertices[place] == next_keys
    low, high = here[exists], place[exists]
    rows = here[:, None].repeat(1, 3)  # a neighbour that does not exist has weight 0
    weights = torch.tensor([0.5, 0.0, 0.0], dtype=dtype, device=vertices.device).repeat(M, 1)
    rows[low, 1], rows[high, 2] = high, low
    weights[low, 1], weights[high, 2] = 0.25, 0.25
    return bags(rows.flatten(), range_of(M, 3, vertices.device), weights.flatten(), dtype)


def bags(rows: Tensor, offsets: Tensor, weights: Tensor, dtype: torch.dtype) -> Bags:
    """Prepares weighted sums of rows for `embedding_bag`; numbers of 32 bits, where they suffice, are read faster."""
    small = len(rows) < 1 << 31  # no number of a row is larger
    return (rows.int(), offsets.int(), weights.to(dtype)) if small else (rows, offsets, weights.to(dtype))


def range_of(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * step, step, device=device)


def starts(counts: Tensor) -> Tensor:
    """Finds where each of several lists of so many begins when they stand one after the other."""
    return counts.cumsum(0) - counts
