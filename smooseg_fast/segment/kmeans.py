"""Spherical k-means and principal directions: the start of learning, and the baseline to compare with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Clusters(NamedTuple):
    centres: Tensor  # [K,D] unit rows
    inertia: float  # mean over rows of 1 - cos(row, its centre)


def spherical_kmeans(rows: Tensor, K: int, *, starts: int, seed: int = 0, iterations: int = 50) -> Clusters:
    """Cluster rows [N,D] of any length, K <= N: the best of `starts` runs by inertia, each from a k-means++ start.

    Deterministic for a seed on one device.
    """
    rows = F.normalize(rows.float(), dim=-1)
    runs = (
        lloyd(rows, plus_plus(rows, K, torch.Generator().manual_seed((seed * 1009 + start) % 2**63)), iterations)
        for start in range(starts)
    )
    return min(runs, key=lambda clusters: clusters.inertia)


def plus_plus(rows: Tensor, K: int, generator: torch.Generator) -> Tensor:
    """Draw starting centres [K,D], each with a probability that grows with its distance to earlier ones (k-means++)."""
    chosen = [rows[int(torch.randint(len(rows), (), generator=generator))]]
    distance = torch.full((len(rows),), 2.0, device=rows.device)
    for _ in range(K - 1):
        distance = torch.minimum(distance, 1.0 - rows @ chosen[-1]).clamp(min=0.0)
        # inverts the cumulative distribution, in float64 on the CPU: multinomial refuses more than 2^24 rows, and a
        # GPU's cumulative sum does not rerun bit for bit
        ladder = distance.cpu().double().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * ladder[-1]
        chosen.append(rows[torch.searchsorted(ladder, draw).clamp(max=len(rows) - 1)])
    return torch.stack(chosen)


def lloyd(rows: Tensor, centres: Tensor, iterations: int) -> Clusters:
    """Improve unit `centres` [K,D] of unit rows [N,D] until no label changes, at most `iterations` times."""
    labels = None
    for _ in range(iterations):
        best, now = (rows @ centres.T).max(1)
        if labels is not None and torch.equal(now, labels):
            break
        labels = now
        sums = torch.zeros_like(centres).index_add_(0, labels, rows)
        empty = sums.norm(dim=1) < 1e-10
        if empty.any():  # empty clusters take the rows farthest from their centres
            sums[empty] = rows[best.topk(int(empty.sum()), largest=False).indices]
        centres = F.normalize(sums, dim=-1)
    return Clusters(centres, float(1.0 - (rows @ centres.T).max(1).values.double().mean()))


def principal_directions(rows: Tensor, count: int) -> Tensor:
    """Return the leading right singular vectors [count,D] of rows [N,D], orthonormal, with zero rows beyond D.

    Rows are not centred: of all maps to `count` channels these keep the inner products of rows, and so their cosines,
    best (Eckart and Young).
    """
    rows = rows.double()
    top = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1).T[:count]
    # singular vectors come with either sign: fix it, so that machines agree
    top = top * top.gather(1, top.abs().argmax(1, keepdim=True)).sign()
    return F.pad(top, (0, 0, 0, count - len(top))).float()
