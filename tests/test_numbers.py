"""The number of groups chosen without labels, on blobs whose number is known and on measurements done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage

from smooseg_fast.segment import numbers
from smooseg_fast.segment.numbers import choose_number


def blobs(groups: int, *, fine: int = 48, images: int = 32, noise: float = 0.25, seed: int = 0):
    """Sums [images,K0,D] and counts [images,K0] of unit rows in fine groups around `groups` orthogonal directions."""
    g = np.random.default_rng(seed)
    D = groups + 8
    centres = np.eye(D)[np.arange(fine) % groups] + noise * g.normal(size=(fine, D)) / np.sqrt(D)
    counts = g.integers(20, 60, size=(images, fine)).astype(float)
    drift = 0.1 * g.normal(size=(images, fine, D)) / np.sqrt(D)
    means = centres + drift
    means *= 0.9 / np.linalg.norm(means, axis=-1, keepdims=True)
    return counts[..., None] * means, counts


def cuts_of(sums, counts, most=numbers.MOST):
    """Ward's tree of the fine groups' means, cut into 1 to `most` groups."""
    tree = linkage(sums / counts[:, None], "ward")
    return [np.unique(fcluster(tree, k, "maxclust"), return_inverse=True)[1] for k in range(1, most + 1)]


def arguments(sums, counts):
    parts = np.arange(len(sums)) % numbers.PARTS
    halves = []
    for first in numbers.splits():
        sides = [first[parts], ~first[parts]]
        halves.append(tuple(cuts_of(sums[side].sum(0), counts[side].sum(0)) for side in sides))
    S, n = sums.sum(0), counts.sum(0)
    return dict(cuts=cuts_of(S, n), closeness=S @ S.T / n.sum() ** 2, shares=n / n.sum(), halves=halves)


@pytest.mark.parametrize("groups", [3, 5, 6, 8])
def test_finds_the_number_of_blobs(groups):
    number = choose_number(**arguments(*blobs(groups)))
    assert abs(number.groups - groups) <= 1
    assert number.agreement[groups] > 0.99
    assert number.sure > 0.9


def test_two_other_candidates_that_differ_by_at_least_two():
    number = choose_number(**arguments(*blobs(5, noise=2.0)))
    assert len(number.others) == 2
    candidates = sorted([number.groups, *number.others])
    assert all(numbers.FEWEST <= candidate <= numbers.MOST for candidate in candidates)
    assert min(np.diff(candidates)) >= 2


def test_the_same_data_twice_give_the_same_number():
    assert choose_number(**arguments(*blobs(6))) == choose_number(**arguments(*blobs(6)))


def test_agreement_decides_between_numbers_near_the_explained_one(monkeypatch):
    given = arguments(*blobs(6, noise=2.0))
    halves = [(cuts_that_agree_at(given["cuts"], 9), given["cuts"])]
    monkeypatch.setattr(numbers, "PULL", 0.0)
    assert choose_number(**{**given, "halves": halves}).groups == 9


def cuts_that_agree_at(cuts, number):
    """Cuts that agree with `cuts` at the number and its neighbours alone."""
    return [cut if abs(k - number) <= 1 else np.arange(len(cut)) % k for k, cut in enumerate(cuts, 1)]


def test_crumbs_do_not_count():
    """Eight blobs, of which three hold 1 % of the patches each."""
    sums, counts = blobs(8)
    weight = np.where(np.arange(48) % 8 < 3, 0.05, 1.0)
    number = choose_number(**arguments(sums * weight[:, None], counts * weight))
    assert number.groups < choose_number(**arguments(sums, counts)).groups
    assert abs(number.groups - 5) <= 1


def test_without_halves_enough_groups_are_enough():
    given = arguments(*blobs(5))
    number = choose_number(given["cuts"], given["closeness"], given["shares"])
    assert number.groups == 5 < numbers.large_groups(given["cuts"], given["shares"])
    assert (number.agreement, number.sure) == ({}, 0.0)


@pytest.mark.parametrize("fine", [1, 2, 3])
def test_a_tree_of_hardly_any_fine_groups(fine):
    cuts = [np.minimum(np.arange(fine), k) for k in range(fine)]
    number = choose_number(cuts, np.eye(fine) / fine**2, np.full(fine, 1 / fine))
    assert number.groups == (fine if fine < 3 else number.groups)
    assert 1 <= number.groups <= fine


def test_groups_that_are_all_alike_are_few():
    cuts = [np.minimum(np.arange(20), k) for k in range(20)]
    number = choose_number(cuts, np.full((20, 20), 0.8 / 400), np.full(20, 1 / 20))
    assert number.groups == numbers.FEWEST


def test_explained_variance_by_hand():
    """Two groups of two unit rows each: means (1,0) and (.6,.8), between them (.8,.4)."""
    sums, counts = np.array([[2.0, 0.0], [1.2, 1.6]]), np.array([2.0, 2.0])
    closeness, shares = sums @ sums.T / 16, counts / 4
    assert numbers.explained_variance(np.array([0, 1]), closeness, shares) == pytest.approx(1.0)
    assert numbers.explained_variance(np.array([0, 0]), closeness, shares) == pytest.approx(0.8)


def test_large_groups_by_hand():
    shares = np.array([0.5, 0.2, 0.2, 0.06, 0.02, 0.02])
    cuts = [np.minimum(np.arange(6), k) for k in range(6)]
    assert numbers.large_groups(cuts, shares) == 4
    assert numbers.large_groups(cuts[:5], shares) == 5  # the last two together have 4 %


def test_mutual_information_by_hand():
    quarter = np.full(4, 0.25)
    halves = np.array([0, 0, 1, 1])
    assert numbers.mutual_information(halves, 1 - halves, quarter) == pytest.approx(1.0)
    assert numbers.mutual_information(halves, np.array([0, 1, 0, 1]), quarter) == pytest.approx(0.0)
    # entropies ln 2 and ln 4, information ln 2
    assert numbers.mutual_information(halves, np.arange(4), quarter) == pytest.approx(2 / 3)


def test_splits_are_equal_halves_and_all_different():
    splits = numbers.splits()
    assert len(splits) == numbers.PARTS - 1
    assert all(first.sum() == numbers.PARTS // 2 for first in splits)
    assert len({min(tuple(first), tuple(~first)) for first in splits}) == len(splits)
    for one in splits:
        for other in splits:
            assert (one & other).sum() == (numbers.PARTS // 2 if one is other else numbers.PARTS // 4)
