"""How many groups to cut the tree of fine groups into, chosen without labels.

Cut into USUAL groups, the tree shows how many things of some size there are: groups of less than LEAST_SHARE of the
area do not count, and no more groups are wanted than explain ENOUGH of the variance. Near that number stability decides
(Ben-Hur, Elisseeff and Guyon, PSB 2002): the images are split into halves, a tree is grown from each, and both are cut
into k groups; a k that the data do not support gives two different partitions. Counting needs a tempered tree
(segment/tree): plain average linkage splits off crumbs, and hardly any of its groups counts.

On the five labelled sets and three backbones that it was chosen on, the choice costs 4.1 points of mIoU against the
best cut of 2 to 16; 8 groups everywhere cost 5.5, 6 groups 4.6 (benchmarks/results/LOG.md has the rules that lost).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FEWEST, MOST = 2, 16  # groups that can be chosen
USUAL = 8  # groups among which the large ones are counted
LEAST_SHARE = 0.025  # of the area, that a group needs to count
REFERENCE = 16  # groups whose explained variance counts as all of it
ENOUGH = 0.9  # share of it that no number has to exceed
PULL = 1.6  # agreement that a number loses for each squared unit of ln(number / wanted)
CANDIDATES = 3
PARTS = 8  # of the images, that are put together to halves; a power of two


class Number(NamedTuple):
    """A number of groups and what speaks for it.

    groups: the choice. others: up to two other candidates, best first, that differ by at least 2. agreement: of two
    halves of the images at each number, mean normalised mutual information over the splits, 0..1; empty without splits.
    sure: share of the halves whose own tree gives the same number, give or take one; 0 without splits.
    """

    groups: int
    others: tuple[int, ...]
    agreement: dict[int, float]
    sure: float


def choose_number(
    cuts: Sequence[np.ndarray],
    closeness: np.ndarray,
    shares: np.ndarray,
    halves: Sequence[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]] = (),
) -> Number:
    """Choose the number of groups of a tree over K0 fine groups.

    Args:
        cuts: cuts[k - 1] is the group of every fine group where the tree has k groups, int [K0], numbered from 0; k
            from 1 to REFERENCE, or to the most that the tree has.
        closeness: the cosine summed over all pairs of patches between two fine groups and divided by the number of all
            pairs, [K0,K0]. It must not be centred.
        shares: of the patches in each fine group, [K0]; 1 in all.
        halves: for every split of the images into two halves, the cuts of the trees of both, over the same fine groups.
    """
    most = min([MOST, len(cuts), *(len(half) for split in halves for half in split)])
    numbers = np.arange(FEWEST, most + 1)
    if len(numbers) < 2:
        return Number(most, (), {}, 0.0)
    wanted = min(large_groups(cuts, shares), explaining(cuts, closeness, shares))
    curves = np.array([agreement_curve(one, other, shares, numbers) for one, other in halves])
    mean = curves.mean(0) if len(curves) else np.zeros(len(numbers))
    groups, *others = separate(numbers, scores(mean, numbers, wanted))
    choices = [
        numbers[np.argmax(scores(curve, numbers, min(large_groups(half, shares), explaining(half, closeness, shares))))]
        for curve, split in zip(curves, halves)
        for half in split
    ]
    sure = float(np.mean([abs(choice - groups) <= 1 for choice in choices])) if choices else 0.0
    agreement = dict(zip(numbers.tolist(), mean.tolist())) if len(curves) else {}
    return Number(groups, tuple(others), agreement, sure)


def scores(agreement: np.ndarray, numbers: np.ndarray, wanted: int) -> np.ndarray:
    """How good each of `numbers` is: agreement [len(numbers)], less for a number far from the wanted one."""
    return smoothed(agreement) - PULL * np.log(numbers / wanted) ** 2


def large_groups(cuts: Sequence[np.ndarray], shares: np.ndarray) -> int:
    """How many of USUAL groups, or of the most that there are, hold at least LEAST_SHARE of the patches."""
    return int((np.bincount(cuts[min(USUAL, len(cuts)) - 1], shares) >= LEAST_SHARE).sum())


def explaining(cuts: Sequence[np.ndarray], closeness: np.ndarray, shares: np.ndarray) -> int:
    """The least number of groups that explains ENOUGH of the variance that REFERENCE groups explain."""
    explained = np.array([explained_variance(cut, closeness, shares) for cut in cuts[:REFERENCE]])
    gained = explained - explained[0]
    return int(np.argmax(gained >= ENOUGH * gained[-1])) + 1


def explained_variance(cut: np.ndarray, closeness: np.ndarray, shares: np.ndarray) -> float:
    """sum over groups g of n_g |m_g|^2 / N, m_g the mean unit feature of its n_g of N patches."""
    member = np.eye(int(cut.max()) + 1)[cut]
    within, sizes = ((member.T @ closeness) * member.T).sum(1), shares @ member
    return float((within[sizes > 0] / sizes[sizes > 0]).sum())


def agreement_curve(
    one: Sequence[np.ndarray], other: Sequence[np.ndarray], shares: np.ndarray, numbers: np.ndarray
) -> np.ndarray:
    """Normalised mutual information of two trees' cuts at each of `numbers`, weighted by the shares."""
    return np.array([mutual_information(one[k - 1], other[k - 1], shares) for k in numbers])


def mutual_information(one: np.ndarray, other: np.ndarray, shares: np.ndarray) -> float:
    """I(one; other) over the mean of their entropies: 1 where the partitions are the same, and where both are one
    group."""
    joint = np.zeros((int(one.max()) + 1, int(other.max()) + 1))
    np.add.at(joint, (one, other), shares)
    first, second, both = (entropy(part) for part in (joint.sum(1), joint.sum(0), joint.ravel()))
    return 2 * (first + second - both) / (first + second) if first + second > 1e-12 else 1.0


def entropy(shares: np.ndarray) -> float:
    """In nats."""
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def smoothed(curve: np.ndarray) -> np.ndarray:
    """The mean of each value and its two neighbours; the ends count twice."""
    padded = np.pad(curve, 1, mode="edge")
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def separate(numbers: np.ndarray, scores: np.ndarray) -> list[int]:
    """The CANDIDATES numbers of the best scores that differ by at least 2; the first has the best score of all."""
    chosen: list[int] = []
    for number in numbers[np.argsort(-scores, kind="stable")].tolist():
        if all(abs(number - before) > 1 for before in chosen):
            chosen.append(number)
    return chosen[:CANDIDATES]


def splits(parts: int = PARTS) -> list[np.ndarray]:
    """Which of `parts` parts of the images are in the first half, bool [parts], for parts - 1 splits into equal halves.

    The rows of a Hadamard matrix: any two splits have a quarter of the parts in common in each pair of halves.
    """
    return [np.array([(part & row).bit_count() % 2 == 0 for part in range(parts)]) for row in range(1, parts)]
