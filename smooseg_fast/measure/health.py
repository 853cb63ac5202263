"""Label-free figures: what the labels of a trained head look like."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import smooseg_kernels as sk

from ..segment.model import Heads


@dataclass(frozen=True)
class Health:
    """Of the labels that a head gives to N unlabelled squares."""

    shares: tuple[float, ...]  # [K] of all patches
    perplexity: float  # exp(H(label)), the effective number of labels in use: 1 to K
    labels_per_image: float  # mean over images of exp(H(label | image))
    image_information: (
        float  # I(image; label) / H(label): 0 when every image has the same mix, 1 when a label tells the image
    )
    agreement: float  # share of patches that teacher and student label alike
    modularity: float  # of the closeness graph, see `Moments.modularity`
    explained_variance: float  # of the frozen features, see `Moments.explained_variance`
    modularity_x_explained: float  # their product

    def figures(self) -> dict[str, float]:
        """All but the shares, of which the largest."""
        named = dataclasses.asdict(self)
        return {"largest_share": max(named.pop("shares")), **named}


class Moments:
    """Sums over hard labels of the frozen features' unit rows f, from which both figures follow in time linear in the number N of rows.

    A row shorter than 1e-10 counts as 0. Sums are float64 from batches in float32.
    """

    def __init__(self, K: int, D: int):
        self.sums = torch.zeros(K, D, dtype=torch.float64)  # S_k, of the rows with label k
        self.counts = torch.zeros(K, dtype=torch.float64)  # n_k
        self.squares = torch.zeros(K, dtype=torch.float64)  # sum of |f|^2: the rows that are not 0

    def add(self, unit: Tensor, labels: Tensor) -> None:
        """unit [N,D] rows of length 1 or 0, labels int64 [N] of them."""
        member = F.one_hot(labels, len(self.counts)).to(
            unit.dtype
        )  # [N,K]; products of matrices rerun bit for bit, atomic sums do not
        self.sums += (member.mT @ unit).cpu()
        self.counts += member.sum(0, dtype=torch.float64).cpu()
        self.squares += (member.mT @ unit.square().sum(1)).cpu()

    def modularity(self) -> float:
        """Q = sum over labels k of [ L_k / 2m - (d_k / 2m)^2 ], at most 1 (Newman, PNAS 103:8577, 2006).

        The graph joins any two different patches i != j, of one image or of two, by the weight w_ij = f_i . f_j. Negative closeness keeps
        its sign: it lowers L_k, the weight inside label k (both directions), and the degrees, whose sum over a label is d_k; 2m is the
        weight of the whole graph. With S the sum of all rows and z_k the rows of k that are not 0: L_k = |S_k|^2 - z_k,
        d_k = S_k . S - z_k, 2m = |S|^2 - sum z_k. 0 where 2m <= 0, as for centred features: then chance expects nothing.
        """
        whole = self.sums.sum(0)
        total = float(whole @ whole - self.squares.sum())
        if total <= 1e-9 * float(self.squares.sum()):
            return 0.0
        inside, degrees = self.sums.square().sum(1) - self.squares, self.sums @ whole - self.squares
        return float((inside / total - (degrees / total).square()).sum())

    def explained_variance(self) -> float:
        """BSS / TSS of f, 0 to 1: sum_k n_k |S_k / n_k - S / N|^2 over sum_i |f_i - S / N|^2. 0 where all rows are alike."""
        mean = self.sums.sum(0).square().sum() / self.counts.sum()  # N |S / N|^2
        between = (self.sums.square().sum(1) / self.counts.clamp(min=1.0)).sum() - mean
        total = self.squares.sum() - mean
        return float(between / total) if total > 1e-9 * self.squares.sum() else 0.0


def unit_rows(features: Tensor) -> Tensor:
    """features [...,D] of any float type -> float32 rows of length 1, or 0 where they are shorter than 1e-10."""
    f = features.float()
    norms = f.norm(dim=-1, keepdim=True)
    return torch.where(norms < 1e-10, 0.0, f / norms)


@torch.no_grad()
def health(heads: Heads, batches: Iterable[Tensor]) -> list[Health]:
    """Of every head, from one pass over `batches` of features [B,P,D] on the heads' device."""
    H, K, _ = heads.student.shape
    D = heads.projection.linear.weight.shape[2]
    counts, agree, total, moments = [[] for _ in range(H)], [0] * H, 0, [Moments(K, D) for _ in range(H)]
    for features in batches:
        every, unit = heads.codes(features), unit_rows(features).flatten(0, 1)
        total += len(unit)
        for h, codes in enumerate(every):
            labels = sk.assign(codes, heads.teacher[h])
            agree[h] += int((labels == sk.assign(codes, heads.student[h])).sum())
            seen = torch.zeros(len(labels), K, dtype=torch.int64, device=labels.device)
            counts[h].append(seen.scatter_add_(1, labels, torch.ones_like(labels)))
            moments[h].add(unit, labels.flatten())
    return [_health(torch.cat(counts[h]).cpu().double(), agree[h] / total, moments[h]) for h in range(H)]


def _health(counts: Tensor, agreement: float, moments: Moments) -> Health:
    """counts [N,K] of the labels of each image."""
    per_image = counts / counts.sum(1, keepdim=True)
    shares = per_image.mean(0)
    whole, inside = float(entropy(shares)), entropy(per_image)
    modularity, explained = moments.modularity(), moments.explained_variance()
    return Health(
        shares=tuple(shares.tolist()),
        perplexity=math.exp(whole),
        labels_per_image=float(inside.exp().mean()),
        image_information=float((whole - inside.mean()) / whole) if whole > 1e-9 else 0.0,
        agreement=agreement,
        modularity=modularity,
        explained_variance=explained,
        modularity_x_explained=modularity * explained,
    )


def entropy(p: Tensor) -> Tensor:
    """Of the last axis, in nats."""
    return -(p * p.clamp(min=1e-30).log()).sum(-1)
