"""Label-free figures about the labels of a trained head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import smooseg_kernels as sk

from ..features.sample import Batch
from ..segment.model import Heads


@dataclass(frozen=True)
class Health:
    """Figures about the labels that a head gives to N unlabelled squares."""

    shares: tuple[float, ...]  # [K] of all patches
    perplexity: float  # exp(H(label)), the effective number of labels in use: 1 to K
    labels_per_image: float  # mean over images of exp(H(label | image))
    image_information: float  # I(image; label) / H(label): 0 if all images have one mix, 1 if a label tells the image
    agreement: float  # share of patches with one label from teacher and student
    modularity: float  # modularity of the closeness graph, see `Moments.modularity`
    explained_variance: float  # share of the frozen features' variance, see `Moments.explained_variance`
    modularity_x_explained: float  # their product

    def figures(self) -> dict[str, float]:
        """Return every figure, with the largest share in place of all shares."""
        figures = dataclasses.asdict(self)
        return {"largest_share": max(figures.pop("shares")), **figures}


class Moments:
    """Sums of the frozen features' unit rows f over each label; both figures follow in time linear in the N rows.

    Rows shorter than 1e-10 count as 0. Sums are float64, of batches in float32.
    """

    def __init__(self, K: int, D: int):
        self.sums = torch.zeros(K, D, dtype=torch.float64)  # S_k, of the rows with label k
        self.counts = torch.zeros(K, dtype=torch.float64)  # n_k
        self.squares = torch.zeros(K, dtype=torch.float64)  # sum of |f|^2: the rows that are not 0

    def add(self, unit: Tensor, labels: Tensor) -> None:
        """Add unit [N,D], rows of length 1 or 0, with their labels int64 [N]."""
        # [N,K]: matrix products rerun bit for bit, atomic sums do not
        member = F.one_hot(labels, len(self.counts)).to(unit.dtype)
        self.sums += (member.mT @ unit).cpu()
        self.counts += member.sum(0, dtype=torch.float64).cpu()
        self.squares += (member.mT @ unit.square().sum(1)).cpu()

    def modularity(self) -> float:
        """Q = sum over labels k of [ L_k / 2m - (d_k / 2m)^2 ], at most 1 (Newman, PNAS 103:8577, 2006).

        The graph joins any two different patches i != j, of one image or of two, by the weight w_ij = f_i . f_j.
        Negative closeness keeps its sign: it lowers L_k, the weight inside label k (both directions), and the degrees,
        whose sum over a label is d_k; 2m is the weight of the whole graph. With S the sum of all rows and z_k the
        number of rows of k that are not 0: L_k = |S_k|^2 - z_k, d_k = S_k . S - z_k, 2m = |S|^2 - sum z_k. Returns 0
        where 2m <= 0, as for centred features, which give no expectation by chance.
        """
        all_rows = self.sums.sum(0)
        total = float(all_rows @ all_rows - self.squares.sum())
        if total <= 1e-9 * float(self.squares.sum()):
            return 0.0
        inside, degrees = self.sums.square().sum(1) - self.squares, self.sums @ all_rows - self.squares
        return float((inside / total - (degrees / total).square()).sum())

    def explained_variance(self) -> float:
        """BSS / TSS of f in 0..1: sum_k n_k |S_k / n_k - S / N|^2 over sum_i |f_i - S / N|^2; 0 if all rows agree."""
        mean = self.sums.sum(0).square().sum() / self.counts.sum()  # N |S / N|^2
        between = (self.sums.square().sum(1) / self.counts.clamp(min=1.0)).sum() - mean
        total = self.squares.sum() - mean
        return float(between / total) if total > 1e-9 * self.squares.sum() else 0.0


def unit_rows(features: Tensor) -> Tensor:
    """Normalise features [...,D] of any float type to float32 rows of length 1, or 0 if shorter than 1e-10."""
    f = features.float()
    norms = f.norm(dim=-1, keepdim=True)
    return torch.where(norms < 1e-10, 0.0, f / norms)


@torch.no_grad()
def health(heads: Heads, batches: Iterable[Batch], groups: Sequence[np.ndarray] | None = None) -> list[Health]:
    """Measure every head in one pass over `batches` on the heads' device. Patches without data count nothing.

    groups: the group of every prototype of each head, int64 [K], where prototypes are merged.
    """
    H, K, D = len(heads), heads.student.shape[1], heads.dim
    tables = [torch.arange(K) if groups is None else torch.from_numpy(groups[h]) for h in range(H)]
    tables = [table.to(heads.student.device) for table in tables]
    K = max(int(table.max()) + 1 for table in tables)
    counts: list[list[Tensor]] = [[] for _ in range(H)]
    agree, moments = [0] * H, [Moments(K, D) for _ in range(H)]
    for features, valid in batches:
        unit = unit_rows(features).flatten(0, 1) if valid is None else unit_rows(features)[valid]
        for h, codes in enumerate(heads.codes(features)):
            labels = tables[h][sk.assign(codes, heads.teacher[h])]
            same, member = labels == tables[h][sk.assign(codes, heads.student[h])], F.one_hot(labels, K)
            if valid is not None:
                same, member, labels = same & valid, member * valid[..., None], labels[valid]
            agree[h] += int(same.sum())
            counts[h].append(member.sum(1))
            moments[h].add(unit, labels.flatten())
    return [_health(torch.cat(counts[h]).cpu().double(), agree[h], moments[h]) for h in range(H)]


def _health(counts: Tensor, agree: int, moments: Moments) -> Health:
    """Take the figures from counts [N,K] of the labels in each image, and of patches labelled alike by the student."""
    per_image = counts / counts.sum(1, keepdim=True)
    shares = per_image.mean(0)
    overall, inside = float(entropy(shares)), entropy(per_image)  # H(label), H(label | image)
    modularity, explained = moments.modularity(), moments.explained_variance()
    return Health(
        shares=tuple(shares.tolist()),
        perplexity=math.exp(overall),
        labels_per_image=float(inside.exp().mean()),
        image_information=float((overall - inside.mean()) / overall) if overall > 1e-9 else 0.0,
        agreement=agree / float(counts.sum()),
        modularity=modularity,
        explained_variance=explained,
        modularity_x_explained=modularity * explained,
    )


def entropy(p: Tensor) -> Tensor:
    """Return the entropy over the last axis, in nats."""
    return torch.special.entr(p).sum(-1)
