"""How alike patches are before training, over a whole feature store: exact means, histograms of W, and what thresholds make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import smooseg_kernels as sk

from ..config import Thresholds
from ..features.sample import BATCH
from ..features.store import FeatureStore
from ..system.progress import Bar

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
BINS, REACH = 1500, 1.5  # bins 0.002 wide, over W - M from -REACH to REACH
# multiplications that the histogram of each kind may take where nobody asked for more: about a third of a second of one thread
WORK = 2e10
BESIDE_PRODUCT = 150  # what counting a pair takes beside its product, in the same unit
BESIDE_SQUARE = 1e7  # and what a square takes beside its pairs, in calls: of tiny squares there may be many
PATCHES = BATCH * 784  # looked at together; by squares alone, 10,000 tiny ones would take seconds of calls
SLOW_BYTES = 2**30  # of features, from which on the pass over them has a progress line


@dataclass(frozen=True)
class Spread:
    """The distribution of W = cos - its mean over j + M over pairs of patches of one kind: within squares, or across them."""

    mean: (
        float  # M over every pair of the whole store, and so the mean of any histogram of W, whichever squares it is of
    )
    counts: Tensor  # int64 [BINS] of W - M between -REACH and REACH

    @property
    def pairs(self) -> int:
        return int(self.counts.sum())

    @property
    def limits(self) -> tuple[float, float]:
        return self.mean - REACH, self.mean + REACH

    @property
    def std(self) -> float:
        middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * REACH / BINS) - REACH
        return float(((self.counts * middles.square()).sum() / max(self.pairs, 1)).sqrt())

    def quantiles(self, shares: Sequence[float]) -> tuple[float, ...]:
        """Exact to the width of a bin."""
        return tuple(sk.histogram_quantiles(self.counts, shares, self.limits).tolist())

    def pulled(self, threshold: float) -> float:
        """The share of pairs above `threshold`, which it pulls together; it pushes the others apart. Exact to those in one bin."""
        place = min(max((threshold - self.limits[0]) * BINS / (2 * REACH), 0.0), float(BINS))
        whole = min(int(place), BINS - 1)
        below = float(self.counts[:whole].sum()) + (place - whole) * float(self.counts[whole])
        return 1.0 - below / max(self.pairs, 1)


@dataclass(frozen=True)
class Similarity:
    """`squares` of a store, of which `counted`, drawn at random, are in the histograms, each with `partners` others across."""

    squares: int
    counted: int
    partners: int
    within: Spread
    across: Spread

    def line(self) -> str:
        """What exactly was counted."""
        which = "all of them" if self.counted == self.squares else f"{self.counted} of them, drawn at random"
        others = "another" if self.partners == 1 else f"{self.partners} others"
        return (
            f"means over every pair of patches of {self.squares} squares; spread from {self.within.pairs / 1e6:.3g} million pairs "
            f"within {which}, and {self.across.pairs / 1e6:.3g} million of each with {others}"
        )


@dataclass(frozen=True)
class Closeness:
    """W of patch pairs of one kind, and what a threshold b makes of it."""

    mean: float
    std: float
    quantiles: tuple[float, ...]  # at QUANTILES
    threshold: float  # b, absolute
    pulled: float  # share of the pairs with W > b

    @property
    def force(self) -> float:
        """mean(W) - b: above 0 the average pair is pulled together, below 0 pushed apart."""
        return self.mean - self.threshold

    def line(self) -> str:
        spread = "  ".join(f"{100 * q:g} % {value:+.3f}" for q, value in zip(QUANTILES, self.quantiles))
        return (
            f"mean {self.mean:+.3f}  std {self.std:.3f}  [{spread}]  threshold {self.threshold:+.3f} pulls {100 * self.pulled:.3g} %  "
            f"net force {self.force:+.3f}"
        )


def closeness(found: Similarity, thresholds: Thresholds) -> tuple[Closeness, Closeness]:
    """(within, across) with their thresholds."""

    def of(spread: Spread, threshold: float) -> Closeness:
        b = threshold + spread.mean if thresholds.relative else threshold
        return Closeness(spread.mean, spread.std, spread.quantiles(QUANTILES), b, spread.pulled(b))

    return of(found.within, thresholds.within), of(found.across, thresholds.across)


def warning(within: Closeness, across: Closeness) -> str | None:
    """Why labels may turn into kinds of images, or None."""
    if within.force * across.force >= 0:
        return None
    tendency = "pull an image's patches together and push different images apart: labels may turn into kinds of images in a long run"
    if within.force < 0:
        tendency = "push an image's patches apart and pull different images together"
    return (
        f"net forces differ in sign (within {within.force:+.3f}, across {across.force:+.3f}): on average they {tendency}; "
        "--granularity has no such tendency"
    )


@torch.no_grad()
def similarity(
    store: FeatureStore,
    device: torch.device,
    *,
    largest: int | None = None,
    partners: int = 1,
    impl: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Similarity:
    """W over a store of at least 2 squares, from one pass over it.

    Of the features as they are: in training a mask hides a share p of each square's channels, which leaves M within as it is and brings M
    across to about 1 - p of it.

    M is exact: sums of unit rows give the mean of all P^2 pairs of every square with itself (within), and of every two different squares
    (across), N (N - 1) P^2 pairs, in time O(N P D). The histograms are of whole squares drawn at random, each with itself and with
    `partners` others drawn at random (fewer in a small store); of all squares where no more than `largest` pairs of patches of a kind
    come of it, by default what WORK allows, and of two at least. Rows short of 1e-10 have cosine 0 to all, themselves too. Depends on
    `seed` and the store alone, on one machine.
    """
    if device.type != "cuda":  # others lack some of the integer types that counting takes
        device = torch.device("cpu")
    N, P, D = len(store), store.P, store.D
    if largest is None:
        largest = int(WORK / (D + BESIDE_PRODUCT + BESIDE_SQUARE / (P * P)))
    counted = min(N, max(2, largest // (P * P * partners)))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    each = max(BATCH, PATCHES // P)
    drawn = [
        part.tolist() for part in order[:counted].tensor_split(-(-counted // each))
    ]  # of two squares at least: nobody is left alone
    partners = min(partners, min(map(len, drawn)) - 1)
    rest = [part.tolist() for part in order[counted:].sort().values.split(each)]
    sums, squares, counts = torch.zeros(D, dtype=torch.float64), 0.0, torch.zeros(2, BINS, dtype=torch.int64)
    with Bar(total=N, desc="closeness", unit="square", disable=not progress or store.nbytes < SLOW_BYTES) as bar:
        for number, rows in enumerate(drawn + rest):
            f = store.rows(rows).to(device)
            u = mean_unit_rows(f).double().cpu()
            sums += u.sum(0)
            squares += float(u.square().sum())
            if number < len(drawn):
                counts += histograms(f, partners, impl)
            bar.update(len(rows))
    within, across = squares / N, float(sums.square().sum() - squares) / (N * (N - 1))
    return Similarity(N, counted, partners, Spread(within, counts[0]), Spread(across, counts[1]))


def mean_unit_rows(f: Tensor) -> Tensor:
    """[B,P,D] -> [B,D]; the rows themselves are never made unit, which would take more passes over them."""
    norms = f.norm(dim=-1)
    return (torch.where(norms < 1e-10, 0.0, 1.0 / norms)[:, None] @ f)[:, 0] / f.shape[1]


def histograms(f: Tensor, partners: int, impl: str) -> Tensor:
    """int64 [2,BINS] of W - M within the features [B,P,D] of squares in random order, and of each with the `partners` next ones."""
    here = torch.arange(len(f), device=f.device)
    others = [here.roll(-step) for step in range(1, partners + 1)]
    zero = torch.zeros(1 + len(others), device=f.device)
    found = sk.similarity_statistics(
        f, ["self", *others], bins=BINS, limits=(-REACH, REACH), mean=zero, impl=impl
    ).histogram.cpu()
    return torch.stack((found[0], found[1:].sum(0)))
