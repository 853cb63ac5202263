"""The closeness of patches before training over a feature store: exact means, histograms of W, effect of thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import smooseg_kernels as sk

from ..config import Thresholds
from ..features.sample import BATCH
from ..features.store import FeatureStore
from ..system.progress import SILENT_S, Bar

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
BINS, REACH = 1500, 1.5  # bins 0.002 wide, over W - M from -REACH to REACH
# default cost of the histograms of each kind, in multiplications: about a third of a second of one thread
WORK = 2e10
PAIR_WORK = 150  # cost of counting a pair, on top of its product
SQUARE_WORK = 1e7  # cost of the calls for a square, on top of its pairs: there may be many tiny squares
PATCHES = BATCH * 784  # counted together; square by square, 10,000 tiny ones would take seconds of calls


@dataclass(frozen=True)
class Distribution:
    """The distribution of W = cos - its mean over j + M over one kind of pairs: within squares, or across them."""

    mean: float  # M over every pair of the store, and so the mean of W over any squares
    counts: Tensor  # int64 [BINS] of W - M between -REACH and REACH

    @property
    def pairs(self) -> int:
        return int(self.counts.sum())

    @property
    def limits(self) -> tuple[float, float]:
        return self.mean - REACH, self.mean + REACH

    @property
    def edges(self) -> np.ndarray:
        """float64 [BINS + 1] of the bins."""
        return np.linspace(*self.limits, BINS + 1)

    @property
    def std(self) -> float:
        middles = (self.edges[1:] + self.edges[:-1]) / 2
        return float(np.average((middles - self.mean) ** 2, weights=self.counts) ** 0.5)

    def quantiles(self, shares: Sequence[float]) -> tuple[float, ...]:
        """Return quantiles of W, exact to the width of a bin."""
        return tuple(sk.histogram_quantiles(self.counts, shares, self.limits).tolist())

    def pulled(self, threshold: float) -> float:
        """Return the share of pairs above `threshold`, which pulls them together and pushes the others apart."""
        below = np.interp(threshold, self.edges, [0, *self.counts.cumsum(0)])  # bins count in proportion
        return float(1 - below / self.pairs)


@dataclass(frozen=True)
class Similarity:
    """Closeness over `squares` of a store; histograms of `counted` random ones, each with itself and with another."""

    squares: int
    counted: int
    within: Distribution
    across: Distribution

    def line(self) -> str:
        """Say exactly which pairs were counted."""
        which = "all of them" if self.counted == self.squares else f"{self.counted} of them, drawn at random"
        return (
            f"means over every pair of patches of {self.squares} squares; quantiles over {self.within.pairs / 1e6:.3g} "
            f"million pairs within {which}, and {self.across.pairs / 1e6:.3g} million of each with another"
        )


@dataclass(frozen=True)
class Closeness:
    """W of one kind of patch pairs, and the effect of a threshold b on it."""

    mean: float
    std: float
    quantiles: tuple[float, ...]  # at QUANTILES
    threshold: float  # b, absolute
    pulled: float  # share of the pairs with W > b

    @property
    def force(self) -> float:
        """mean(W) - b: the average pair is pulled together above 0, and pushed apart below."""
        return self.mean - self.threshold

    def line(self) -> str:
        """Write all figures in one line."""
        quantiles = "  ".join(f"{100 * q:g} % {value:+.3f}" for q, value in zip(QUANTILES, self.quantiles))
        return (
            f"mean {self.mean:+.3f}  std {self.std:.3f}  [{quantiles}]  "
            f"threshold {self.threshold:+.3f} pulls {100 * self.pulled:.3g} %  net force {self.force:+.3f}"
        )


def closeness(measured: Similarity, thresholds: Thresholds) -> tuple[Closeness, Closeness]:
    """Apply the thresholds, an excess over M if they are relative -> (within, across)."""

    def apply(kind: Distribution, threshold: float) -> Closeness:
        b = threshold + thresholds.relative * kind.mean
        return Closeness(kind.mean, kind.std, kind.quantiles(QUANTILES), b, kind.pulled(b))

    return apply(measured.within, thresholds.within), apply(measured.across, thresholds.across)


def warning(within: Closeness, across: Closeness) -> str | None:
    """Say why labels may come to stand for whole images; None if they have no such tendency."""
    if within.force * across.force >= 0:
        return None
    pulled, pushed = ("the patches of an image", "different images")[:: 1 if within.force > 0 else -1]
    return (
        f"net forces differ in sign (within {within.force:+.3f}, across {across.force:+.3f}): on average they pull "
        f"{pulled} together and push {pushed} apart; --granularity has no such tendency"
    )


@torch.no_grad()
def similarity(
    store: FeatureStore,
    device: torch.device,
    *,
    largest: int | None = None,
    impl: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Similarity:
    """Measure W over a store of at least 2 squares in one pass.

    Takes the features as they are: in training a mask hides a share p of each square's channels, which keeps M within
    and brings M across to about 1 - p of it.

    M is exact: sums of unit rows give the mean of all P^2 pairs of every square with itself (within), and of every two
    different squares (across), N (N - 1) P^2 pairs, in time O(N P D). Histograms count random squares, each with itself
    and with a random other: all squares if that makes at most `largest` pairs of a kind, by default as many as WORK
    allows, and at least two. Patches without data take no part; every square counts alike in M. Rows shorter than 1e-10
    have cosine 0 to every row. On one machine the result depends on `seed` and the store alone.
    """
    if device.type != "cuda":  # others lack integer types that counting needs
        device = torch.device("cpu")
    N, P, D = len(store), store.P, store.D
    if largest is None:
        largest = int(WORK / (D + PAIR_WORK + SQUARE_WORK / (P * P)))
    counted = min(N, max(2, largest // (P * P)))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    batch = max(BATCH, PATCHES // P)
    # batches of at least two squares, so that each has a partner
    counted_batches = order[:counted].tensor_split(-(-counted // batch))
    sums, squares, counts = torch.zeros(D, dtype=torch.float64), 0.0, torch.zeros(2, BINS, dtype=torch.int64)
    with Bar(total=N, desc="closeness", unit="square", disable=not progress, delay=SILENT_S) as bar:
        for number, rows in enumerate((*counted_batches, *order[counted:].sort().values.split(batch))):
            f, valid = store.rows(rows).to(device), store.valid(rows)
            weight = None if valid is None else valid.to(device, torch.float32)
            u = mean_unit_rows(f, weight).double().cpu()
            sums += u.sum(0)
            squares += float(u.square().sum())
            if number < len(counted_batches):
                counts += histograms(f, weight, impl)
            bar.update(len(rows))
    within, across = squares / N, float(sums.square().sum() - squares) / (N * (N - 1))
    return Similarity(N, counted, Distribution(within, counts[0]), Distribution(across, counts[1]))


def mean_unit_rows(f: Tensor, weight: Tensor | None) -> Tensor:
    """Average the unit rows of f [B,P,D], or the weighted ones, -> [B,D], without storing them."""
    norms = f.norm(dim=-1)
    inverse = torch.where(norms < 1e-10, 0.0, 1.0 / norms)
    if weight is None:
        return (inverse[:, None] @ f)[:, 0] / f.shape[1]
    return ((inverse * weight)[:, None] @ f)[:, 0] / weight.sum(1, keepdim=True)


def histograms(f: Tensor, weight: Tensor | None, impl: str) -> Tensor:
    """Count W - M of squares f [B,P,D] in random order, int64 [2,BINS]: within, and with the next one.

    weight: of the patches, 1 or 0, [B,P]; None for all 1.
    """
    pairs: list[str | Tensor] = ["self", torch.arange(len(f), device=f.device).roll(-1)]
    zero = torch.zeros(2, device=f.device)
    statistics = sk.similarity_statistics(
        f, pairs, bins=BINS, limits=(-REACH, REACH), patch_weight=weight, mean=zero, impl=impl
    )
    return statistics.histogram.cpu()
