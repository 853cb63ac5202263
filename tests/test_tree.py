"""The merge tree against the dense energy of every pair of patches, in float64."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import smooseg_kernels as sk
from smooseg_fast.segment.tree import Moments, Pairs, Tree
from smooseg_kernels.rows import unit_rows

B, P, D, K = 4, 37, 11, 9
SETS = ["within", "across", "all", "objective"]


def problem(weighted=False, seed=0, empty=(), zero_rows=3):
    """Features [B,P,D], labels [B,P] without the `empty` fine groups, and patch weights with an image of none."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(B, P, D, generator=g, dtype=torch.float64) + 0.3
    features[0, :zero_rows] = 0.0
    groups = torch.tensor([k for k in range(K) if k not in empty])
    centres = torch.randn(K, D, generator=g, dtype=torch.float64)
    labels = groups[(features @ centres[groups].mT).argmax(-1)]
    weight = torch.rand(B, P, generator=g, dtype=torch.float64) if weighted else None
    if weighted:
        weight[2], weight[0, 5] = 0.0, 0.0
    return features, labels, weight


def moments_of(features, labels, weight, batch=3):
    moments = Moments(K, D)
    for start in range(0, len(features), batch):
        part = slice(start, start + batch)
        moments.add(unit_rows(features[part]), labels[part], None if weight is None else weight[part])
    return moments


def dense_energy(pair_set, features, labels, weight, threshold, center=True):
    """The energy of hard labels by the front door's dense form, and for the set "all" as written."""
    probs = F.one_hot(labels, K).double()
    if pair_set == "all":
        weight = torch.ones(B, P, dtype=torch.float64) if weight is None else weight
        kept = weight.sum(1) > 0
        f, c, w = unit_rows(features)[kept], probs[kept], weight[kept]
        w = w / w.sum(1, keepdim=True)
        energy, n = 0.0, int(kept.sum())
        mean = ((f * w[..., None]).sum((0, 1)) / n).square().sum()
        for one in range(n):
            for other in range(n):
                s = f[one] @ f[other].mT
                s = s - (s * w[other]).sum(1, keepdim=True) + mean if center else s
                d = 1.0 - c[one] @ c[other].mT
                energy += float((w[one][:, None] * w[other] * (s - threshold) * d).sum()) / n**2
        return energy
    partners = {"within": ["self"], "across": ["all"], "objective": ["self", "all"]}[pair_set]
    terms = sk.smoothness_energy(
        features,
        probs,
        partners,
        torch.full((len(partners),), threshold, dtype=torch.float64),
        relative=pair_set == "objective",
        center=center,
        patch_weight=weight,
        impl="dense",
    )
    return float(terms.energy.sum())


def partitions(tree):
    """The labels [K0] after 0, 1, ... merges, and the two nodes that each merge joins."""
    labels = np.arange(len(tree))
    yield labels, None
    for merge, pair in enumerate(tree.children):
        labels = labels.copy()
        labels[tree.members[len(tree) + merge]] = len(tree) + merge
        yield labels, pair


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("pair_set", SETS)
def test_every_merge_changes_the_dense_energy_by_the_formula(pair_set, center, weighted):
    features, labels, weight = problem(weighted, empty=(2, 7))
    moments, threshold = moments_of(features, labels, weight), 0.07
    tree = Tree.grow(moments.pairs(pair_set, 0.5 if center else 0.0), moments.shares)
    energies, changes = [], []
    for partition, pair in partitions(tree):
        energies.append(dense_energy(pair_set, features, compact(partition)[labels], weight, threshold, center))
        assert tree.pairs.energy(partition, threshold) == pytest.approx(energies[-1], abs=1e-12)
        if pair is not None:
            pairs = tree.pairs.weight[np.ix_(tree.members[pair[0]], tree.members[pair[1]])].sum()
            height = tree.heights[len(changes)]
            changes.append(-2 * pairs * (height - threshold) if pairs > 0 else 0.0)
    assert np.diff(energies) == pytest.approx(changes, abs=1e-12)


def compact(partition):
    return torch.from_numpy(np.unique(partition, return_inverse=True)[1])


@pytest.mark.parametrize("pair_set", SETS)
@pytest.mark.parametrize("seed", range(3))
def test_no_further_merge_lowers_the_energy_at_a_cut(pair_set, seed):
    features, labels, weight = problem(weighted=seed == 1, seed=seed, empty=(4,) if seed else ())
    moments = moments_of(features, labels, weight)
    tree = Tree.grow(moments.pairs(pair_set), moments.shares)
    finite = tree.heights[np.isfinite(tree.heights)]
    for threshold in (finite[:-1] + finite[1:]) / 2:
        partition = tree.cut(threshold=threshold)
        energy, groups = tree.pairs.energy(partition, threshold), partition.max() + 1
        for one in range(groups):
            for other in range(one + 1, groups):
                merged = np.where(partition == other, one, partition)
                assert tree.pairs.energy(merged, threshold) >= energy - 1e-14
        # and merging up to here paid at every step
        assert energy <= tree.pairs.energy(np.arange(K), threshold) + 1e-14


def test_moments_of_parts_add_up():
    features, labels, weight = problem(weighted=True)
    parts = [moments_of(features[part], labels[part], weight[part]) for part in (slice(0, 2), slice(2, None))]
    total, whole = parts[0] + parts[1], moments_of(features, labels, weight)
    assert total.images == whole.images
    assert total.shares == pytest.approx(whole.shares)
    for pair_set in SETS:
        assert total.pairs(pair_set).closeness == pytest.approx(whole.pairs(pair_set).closeness, abs=1e-14)


def test_temper_lets_crumbs_merge_sooner():
    means = np.array([[0.9, 0.5, 0.4], [0.5, 0.9, 0.4], [0.4, 0.4, 0.9]])
    shares = [0.5, 0.49, 0.01]
    assert grown(means, shares).children.tolist() == [[0, 1], [3, 2]]
    weight = np.outer(shares, shares)
    tempered = Tree.grow(unit_pairs(means * weight, weight), np.array(shares), temper=0.15)
    assert tempered.children.tolist() == [[1, 2], [0, 3]]
    assert tempered.heights[0] == pytest.approx(1 - 0.6 * (0.49 * 0.01 / 0.5) ** 0.15)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_share_of_the_image_means_taken_off(weighted):
    """Against all pairs of patches: the mean squared distance of two fine groups, halved, and the energy of merges."""
    features, labels, weight = problem(weighted, zero_rows=0)
    moments, share = moments_of(features, labels, weight), 0.25
    pairs = moments.centred(share)
    w = torch.ones(B, P, dtype=torch.float64) if weight is None else weight
    w = w[w.sum(1) > 0] / w[w.sum(1) > 0].sum(1, keepdim=True)
    kept = slice(None) if weight is None else [0, 1, 3]
    unit, flat = unit_rows(features[kept]), labels[kept].flatten()
    rows = (unit - share * (unit * w[..., None]).sum(1, keepdim=True)).flatten(0, 1)
    member = F.one_hot(flat, K).double() * (w / len(w)).flatten()[:, None]
    closeness = (member.mT @ rows @ rows.mT @ member).numpy()
    assert pairs.closeness == pytest.approx(closeness, abs=1e-14)
    distance = torch.cdist(rows, rows).square() / 2
    sizes = member.sum(0)
    expected = (member.mT @ distance @ member / torch.outer(sizes, sizes)).numpy()
    means = pairs.closeness / pairs.weight
    assert (pairs.lengths[:, None] + pairs.lengths) / 2 - means == pytest.approx(expected, abs=1e-12)
    assert moments.centred(0.0).closeness == pytest.approx(moments.pairs("all", 0.0).closeness, abs=1e-14)
    # lengths of merged groups are means of their patches, so every height is a distance of all patches
    tree = Tree.grow(pairs, moments.shares)
    for height, (one, other) in zip(tree.heights, tree.children):
        sides = [member[:, torch.from_numpy(tree.members[node])].sum(1) for node in (one, other)]
        mean = sides[0] @ distance @ sides[1] / (sides[0].sum() * sides[1].sum())
        assert height == pytest.approx(1 - float(mean), abs=1e-12)


def test_same_data_same_tree_and_heights_never_rise():
    features, labels, weight = problem(weighted=True)
    first, again = (moments_of(features, labels, weight) for _ in range(2))
    one, two = (Tree.grow(moments.pairs(), moments.shares) for moments in (first, again))
    assert (one.children == two.children).all()
    assert (one.heights == two.heights).all()
    assert (np.diff(one.heights) <= 0).all()


def test_scipys_average_linkage_agrees_on_plain_cosines():
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    f = unit_rows(torch.randn(17, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    moments = Moments(17, 5)
    moments.add(f[None], torch.arange(17)[None])
    tree = Tree.grow(moments.pairs("all", centring=0.0), moments.shares)
    distance = (1 - f @ f.mT).numpy()[np.triu_indices(17, 1)]
    steps = hierarchy.linkage(distance, "average")
    assert 1 - tree.heights == pytest.approx(steps[:, 2])
    assert (np.sort(tree.children, 1) == np.sort(steps[:, :2], 1)).all()


def test_centring_by_one_is_the_cosine_of_features_without_their_mean():
    features, labels, _ = problem(zero_rows=0)
    flat, flat_labels = unit_rows(features).reshape(1, -1, D), labels.reshape(1, -1)
    raw, centred = Moments(K, D), Moments(K, D)
    raw.add(flat, flat_labels)
    centred.add(flat - flat.mean(1), flat_labels)
    difference = raw.pairs("all", 1.0).closeness - centred.pairs("all", 0.0).closeness
    assert difference == pytest.approx(raw.pairs().mean * raw.pairs().weight, abs=1e-14)
    assert all(raw.pairs("all", a).mean == pytest.approx(raw.pairs().mean) for a in (0.0, 0.3, 1.0))


def unit_pairs(closeness, weight):
    return Pairs(closeness, weight, np.ones(len(weight)))


def grown(means, shares):
    """A tree of fine groups with these mean closenesses and shares, all in one image."""
    shares = np.array(shares)
    weight = shares[:, None] * shares
    return Tree.grow(unit_pairs(np.array(means) * weight, weight), shares)


def test_a_group_keeps_its_number_when_the_tree_is_cut_elsewhere():
    features, labels, _ = problem()
    moments = moments_of(features, labels, None)
    tree = Tree.grow(moments.pairs(), moments.shares)
    cuts = [tree.cut(groups) for groups in range(1, K + 1)]
    for before, after in itertools.pairwise(cuts):
        moved = before != after  # the smaller part of the one group that splits, and nothing else
        assert set(after[moved]) == {after.max()}
        assert after.max() == before.max() + 1
        (split,) = set(before[moved])
        assert tree.shares[moved].sum() <= tree.shares[after == split].sum()
    assert (tree.cut(threshold=-1.0) == 0).all()
    assert (tree.cut(threshold=2.0) == cuts[-1]).all()
    assert all((tree.cut(threshold=tree.heights[K - g]) == cuts[g - 1]).all() for g in range(2, K + 1))


def test_crumbs_join_the_nearest_group_and_are_not_counted():
    means = np.full((5, 5), 0.1)
    means[:2, :2] = means[2:4, 2:4] = 0.9  # 0 with 1, 2 with 3; 4 is alone and small, nearest to 2
    means[0, 2] = means[2, 0] = means[0, 3] = means[3, 0] = means[1, 2:4] = means[2:4, 1] = 0.3
    means[4, 2] = means[2, 4] = means[4, 3] = means[3, 4] = 0.25
    means[4, :2] = means[:2, 4] = -0.2
    tree = grown(means, [0.3, 0.2, 0.25, 0.24, 0.01])
    assert tree.cut(2).tolist() == [0, 0, 0, 0, 1]
    assert tree.cut(3).tolist() == [0, 0, 2, 2, 1]
    assert tree.cut(2, least_share=0.05).tolist() == [0, 0, 1, 1, 1]
    assert len(tree.splits(0.05)) == 3
    assert len(tree.splits()) == 4
    assert tree.cut(threshold=0.0, least_share=0.05).tolist() == [0] * 5
    with pytest.raises(ValueError, match="1 to 4, got 5"):
        tree.cut(5, least_share=0.05)


def test_fine_groups_without_patches_change_nothing():
    features, labels, _ = problem(empty=(0, 5))
    moments = moments_of(features, labels, None)
    tree = Tree.grow(moments.pairs(), moments.shares)
    assert np.isposinf(tree.heights).sum() == 2
    assert len(tree.splits()) == K - 3
    without = Moments(K - 2, D)
    without.add(unit_rows(features), compact(labels.numpy().ravel()).view(B, P))
    fewer = Tree.grow(without.pairs(), without.shares)
    kept = [k for k in range(K) if k not in (0, 5)]
    assert fewer.heights == pytest.approx(tree.heights[2:])
    for groups in range(1, K - 1):
        assert (tree.cut(groups)[kept] == fewer.cut(groups)).all()


def test_groups_that_never_meet_merge_last():
    closeness = np.array([[0.2, 0.0, 0.1], [0.0, 0.3, 0.0], [0.1, 0.0, 0.2]])
    weight = np.array([[0.2, 0.0, 0.1], [0.0, 0.4, 0.0], [0.1, 0.0, 0.2]])
    tree = Tree.grow(unit_pairs(closeness, weight), np.array([0.3, 0.4, 0.3]))
    assert tree.heights.tolist() == [1.0, -np.inf]
    assert tree.cut(threshold=-5.0).tolist() == [0, 1, 0]


def test_one_fine_group_and_impossible_cuts():
    tree = grown([[1.0]], [1.0])
    assert tree.cut(1).tolist() == tree.cut(threshold=0.3).tolist() == [0]
    for arguments in ({}, {"groups": 1, "threshold": 0.1}):
        with pytest.raises(ValueError, match="number of groups or a threshold"):
            tree.cut(**arguments)
    moments = Moments(2, 3)
    moments.add(torch.eye(3)[None, :2], torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="need 2 images"):
        moments.pairs("objective")
