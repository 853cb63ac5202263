"""Every granularity at once: the merge tree of fine groups, cut by number, by threshold, or with a least share.

With hard labels the smoothness energy of a pair set is E(b) = sum over pairs of fine groups k, l with different labels
of A_kl - b N_kl. A_kl is the closeness W summed over the pairs of patches between k and l, N_kl the weight of those
pairs. Merging k and l changes E by -(A_kl + A_lk - b (N_kl + N_lk)), so it pays exactly when their mean closeness
A_kl / N_kl exceeds b. Merging the two of the largest mean again and again (average linkage) therefore gives one tree
whose cut at the height b is, for every b, a partition from which no merge lowers the energy. Heights never rise,
because the mean with a merged group lies between the means with its two parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PairSet = Literal["within", "across", "all", "objective"]
NOTHING = 1e-9  # share of the pairs below which two groups never meet across images: rounding leaves no clean 0


@dataclass(frozen=True)
class Pairs:
    """All pairs of patches of a pair set, summed over fine groups.

    closeness: A, the sum of W, symmetric float64 [K0,K0]. weight: N, the weight of the pairs, alike; 1 in all (2 for
    the set "objective"). lengths: the mean squared length of the rows of each fine group, float64 [K0]; 1 for unit
    rows, where a row of length 0 counts as one of them.
    """

    closeness: np.ndarray
    weight: np.ndarray
    lengths: np.ndarray

    def energy(self, labels: np.ndarray, threshold: float) -> float:
        """The smoothness energy at b = threshold when fine group k has label labels[k], int [K0]."""
        apart = labels[:, None] != labels
        return float((self.closeness - threshold * self.weight)[apart].sum())

    @property
    def mean(self) -> float:
        """The mean closeness M of the pair set, over all pairs of patches; 0 for the set "objective"."""
        return float(self.closeness.sum() / self.weight.sum())


class Moments:
    """Sums over the patches of each fine group, image by image, from which the pairs of every pair set follow.

    Every image counts alike: its patch weights are scaled to add up to 1, and images without weight count nothing.
    Sums over images are float64; those over the patches of an image have the features' dtype.
    """

    def __init__(self, K: int, D: int):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.images = 0
        self.sums, self.sizes = zeros(K, D), zeros(K)  # s_k and n_k of all images, [K,D] and [K]
        self._rows = zeros(K, D)  # n_k u summed over images, u the mean feature of an image
        self._gram, self._row_means, self._weight = zeros(K, K), zeros(K, K), zeros(K, K)  # within images

    def add(self, unit: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Add images: unit [B,P,D], rows of length 1 or 0; labels int64 [B,P]; patch weights [B,P] >= 0."""
        member = F.one_hot(labels, len(self.sizes)).to(unit.dtype)
        total = member.new_full((len(unit), 1), unit.shape[1])
        if weight is not None:
            member, total = member * weight[..., None].to(unit.dtype), weight.sum(1, keepdim=True, dtype=unit.dtype)
        # matrix products rerun bit for bit, atomic sums do not
        sums, sizes = (member.mT @ unit).double().cpu(), member.sum(1, dtype=torch.float64).cpu()
        total = total.double().cpu()
        scale = torch.where(total > 0, 1.0 / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        sums, sizes = sums * scale[..., None], sizes * scale
        mean = sums.sum(1)
        self.images += int((total > 0).sum())
        self.sums += sums.sum(0)
        self.sizes += sizes.sum(0)
        self._rows += sizes.mT @ mean
        self._gram += torch.einsum("bkd,bld->kl", sums, sums)
        self._row_means += torch.einsum("bkd,bd,bl->kl", sums, mean, sizes)
        self._weight += sizes.mT @ sizes

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of images."""
        total = Moments(*self.sums.shape)
        for name, value in vars(self).items():
            setattr(total, name, value + vars(other)[name])
        return total

    def of(self, kept: np.ndarray) -> Moments:
        """The moments of some of the fine groups, int64 [n]; the others must be empty."""
        rows, part = torch.from_numpy(kept), Moments(len(kept), self.sums.shape[1])
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value = value[rows][:, rows] if value.shape == self._gram.shape else value[rows]
            setattr(part, name, value)
        return part

    @property
    def shares(self) -> np.ndarray:
        """The share of every fine group, float64 [K0]; 1 in all."""
        return (self.sizes / self.sizes.sum()).numpy()

    def pairs(self, pair_set: PairSet = "all", centring: float = 0.5) -> Pairs:
        """The pairs of a pair set.

        Args:
            pair_set: "within" images; "across", every ordered pair of different images; "all", both, where each pair of
                images counts alike; "objective", within plus across, each minus its mean, as training adds them with
                relative thresholds: heights are then granularities.
            centring: share a of the row means that leaves closeness: W_ij = S_ij - a (r_i + r_j) + 2 a M. 0.5 is what
                the objective does (its one-sided S_ij - r_i + M is summed over both orders of a pair), 0 the plain
                cosine, 1 the cosine of features whose image's mean is taken off. M stays in every case.

        Raises:
            ValueError: without an image that has weight; "across" and "objective" need two.
        """
        fewest = 2 if pair_set in ("across", "objective") else 1
        if self.images < fewest:
            raise ValueError(f"pairs {pair_set} need {fewest} images that have weight, got {self.images}")
        if pair_set == "objective":
            within, across = (self.pairs(part, centring) for part in ("within", "across"))
            first, second = (part.closeness - part.mean * part.weight for part in (within, across))
            return Pairs(first + second, within.weight + across.weight, within.lengths)
        B = self.images
        gram, row_means = self.sums @ self.sums.mT, self.sums @ self._rows.mT
        weight = torch.outer(self.sizes, self.sizes)
        if pair_set == "within":
            gram, row_means, weight, count = self._gram, self._row_means, self._weight, B
        elif pair_set == "across":
            meets = weight - self._weight > NOTHING * weight
            parts = (gram - self._gram, row_means - self._row_means, weight - self._weight)
            gram, row_means, weight = (torch.where(meets, part, 0.0) for part in parts)
            count = B * (B - 1)
        else:
            count = B * B
        centred = gram - centring * (row_means + row_means.mT - 2 * gram.sum() / count * weight)
        closeness, weight = ((part + part.mT) / (2 * count) for part in (centred, weight))
        return Pairs(closeness.numpy(), weight.numpy(), np.ones(len(weight)))

    def centred(self, share: float) -> Pairs:
        """All pairs, of rows from which this share of the mean row of their image is taken off.

        W_ij is the product of x_i - share * m and x_j - share * m', with m and m' the mean rows of the images. These
        rows are no longer of length 1, so their mean squared lengths count. With a share of 0: `pairs("all", 0)`.

        Raises:
            ValueError: without an image that has weight.
        """
        if not self.images:
            raise ValueError("pairs need an image that has weight")
        cross, count = self.sums @ self._rows.mT, self.images**2
        closeness = self.sums @ self.sums.mT - share * (cross + cross.mT) + share**2 * self._rows @ self._rows.mT
        squares = self.sizes - 2 * share * self._row_means.sum(1) + share**2 * self._row_means.sum(0)
        weight = torch.outer(self.sizes, self.sizes) / count
        lengths = torch.where(self.sizes > 0, squares / self.sizes.clamp(min=NOTHING), 1.0)
        return Pairs(((closeness + closeness.mT) / (2 * count)).numpy(), weight.numpy(), lengths.numpy())


@dataclass(frozen=True)
class Tree:
    """The merge tree of K0 fine groups. Nodes 0..K0-1 are the fine groups, node K0 + i comes from merge i.

    Fine groups without any patch merge first, at +inf, and groups that never meet last, at -inf: both change no energy.
    """

    pairs: Pairs
    shares: np.ndarray  # of the fine groups, float64 [K0]; 1 in all
    children: np.ndarray  # the two nodes of each merge, int64 [K0-1,2]
    heights: np.ndarray  # at each merge, the mean closeness of the two as `grow` has it, float64 [K0-1], never rising
    temper: float

    @classmethod
    def grow(cls, pairs: Pairs, shares: np.ndarray, temper: float = 0.0) -> Tree:
        """Average linkage of the fine groups. Deterministic; of equal heights, the groups of lowest number merge.

        temper: 0 for the mean closeness m of unit rows itself. In general the height of a merge is 1 - d (p q / (p +
            q))^temper: d = (u + v) / 2 - m is half the mean squared distance of patches of the two, with u and v their
            mean squared lengths, and p and q are their shares. Above 0, small groups merge sooner; with 1 it is nearly
            Ward's. Only with 0 and unit rows does no merge lower the energy at the height of a cut.
        """
        children, heights = linkage(pairs, shares, temper)
        return cls(pairs, shares, children, heights, temper)

    def __len__(self) -> int:
        return len(self.shares)

    @cached_property
    def members(self) -> np.ndarray:
        """Whether fine group k lies in node n: bool [2 K0 - 1, K0]."""
        members = np.zeros((2 * len(self) - 1, len(self)), bool)
        members[: len(self)] = np.eye(len(self), dtype=bool)
        for node, pair in enumerate(self.children, len(self)):
            members[node] = members[pair].any(0)
        return members

    @cached_property
    def node_shares(self) -> np.ndarray:
        """The share of every node, float64 [2 K0 - 1]."""
        return self.members @ self.shares

    def splits(self, least_share: float = 0.0) -> np.ndarray:
        """Merges between two groups of at least this share, int64, from the last one: undoing the first N - 1 of them
        leaves N groups. Groups below it are crumbs, which stay with their nearest group."""
        large = self.node_shares[self.children].min(1, initial=np.inf) >= max(least_share, np.finfo(float).tiny)
        return np.flatnonzero(large)[::-1]

    def cut(self, groups: int | None = None, *, threshold: float | None = None, least_share: float = 0.0) -> np.ndarray:
        """The group of every fine group, int64 [K0], numbered from 0.

        A group keeps its number wherever the tree is cut: when it splits, its larger part keeps the number, and the
        smaller gets the next. Partitions are nested.

        Args:
            groups: their number, 1 to the number of `splits` + 1.
            threshold: the height b of the cut; without a least share, no merge of the groups lowers the energy at b.
            least_share: groups below this share are no groups: each joins the nearest of the groups that the one it
                would merge with has split into.

        Raises:
            ValueError: without exactly one of groups and threshold, and for a number that the tree does not have.
        """
        if (groups is None) == (threshold is None):
            raise ValueError("give the number of groups or a threshold")
        splits = self.splits(least_share)
        if groups is None:
            undone = splits[self.heights[splits] <= threshold]
        elif 1 <= groups <= len(splits) + 1:
            undone = splits[: groups - 1]
        else:
            raise ValueError(f"groups must be 1 to {len(splits) + 1}, got {groups}")
        root = 2 * len(self) - 2
        numbers, crumbs = {root: 0}, {root: list[int]()}  # of the nodes that are groups
        for merge in range(len(self) - 2, undone.min(initial=len(self)) - 1, -1):
            node = len(self) + merge
            if node not in numbers:  # inside a crumb
                continue
            large, small = sorted(self.children[merge].tolist(), key=lambda child: -self.node_shares[child])
            number, hanging = numbers.pop(node), crumbs.pop(node)
            numbers[large], crumbs[large] = number, []
            if merge in undone:
                numbers[small], crumbs[small] = len(numbers), []
                for crumb in hanging:
                    crumbs[max((large, small), key=lambda part: self.closeness(crumb, part))].append(crumb)
            else:
                crumbs[large] = [*hanging, small]
        labels = np.empty(len(self), np.int64)
        for node, number in numbers.items():
            labels[self.members[[node, *crumbs[node]]].any(0)] = number
        return labels

    def closeness(self, one: int, other: int) -> float:
        """The mean closeness between the patches of two nodes; -inf if no pair of them is in the pair set."""
        block = np.ix_(self.members[one], self.members[other])
        weight = self.pairs.weight[block].sum()
        return float(self.pairs.closeness[block].sum() / weight) if weight > 0 else -np.inf


def linkage(pairs: Pairs, shares: np.ndarray, temper: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Merges the two groups of the largest height until one is left -> children [K0-1,2] and heights [K0-1]."""
    closeness, weight, shares, squares = (
        pairs.closeness.copy(),
        pairs.weight.copy(),
        shares.copy(),
        pairs.lengths * shares,
    )
    K = len(weight)
    nodes, alive, tiny = list(range(K)), np.ones(K, bool), np.finfo(float).tiny
    empty = ~(weight.sum(1) > 0)
    children, heights, height = np.empty((K - 1, 2), np.int64), np.empty(K - 1), np.inf
    for merge in range(K - 1):
        means = np.divide(closeness, weight, out=np.full((K, K), -np.inf), where=weight > 0)
        lengths = squares / np.maximum(shares, tiny)
        small = shares[:, None] * shares / np.maximum(shares[:, None] + shares, tiny)
        means = 1.0 - ((lengths[:, None] + lengths) / 2 - means) * np.maximum(small, tiny) ** temper
        means[empty] = means[:, empty] = np.inf
        candidates = np.flatnonzero(np.triu(alive[:, None] & alive, 1))
        low, high = divmod(int(candidates[means.flat[candidates].argmax()]), K)
        # rounding, or temper, may lift a height above the one before it
        height = heights[merge] = min(height, means[low, high])
        children[merge] = nodes[low], nodes[high]
        for table in (closeness, weight):
            table[low] += table[high]
            table[:, low] += table[:, high]
        shares[low] += shares[high]
        squares[low] += squares[high]
        nodes[low], alive[high] = K + merge, False
        empty[low] &= empty[high]
    return children, heights
