"""Counts by hand, matchings against brute force, and scores against masks compared pixel by pixel."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest

from smooseg_fast.measure.scores import hungarian, majority, percent, scores_table


def random_counts(K, C, seed):
    counts = np.random.default_rng(seed).integers(0, 50, (K, C))
    return np.where(counts < 12, 0, counts)  # zeros, so that empty overlaps and now and then empty rows occur


def best_assignment(counts):
    """Most pixels that any one-to-one mapping can make right, by trying them all."""
    if counts.shape[0] > counts.shape[1]:
        counts = counts.T
    return max(
        sum(counts[i, c] for i, c in enumerate(columns))
        for columns in permutations(range(counts.shape[1]), counts.shape[0])
    )


def pixelwise(counts, mapping):
    """(accuracy, IoU [C]) from explicit truth maps, the way the definition reads."""
    K, C = counts.shape
    labels = np.repeat(np.repeat(np.arange(K), C), counts.ravel())
    truth = np.repeat(np.tile(np.arange(C), K), counts.ravel())
    mapped = np.array(mapping)[labels]
    iou = [
        np.nan
        if not (truth == c).any()
        else ((mapped == c) & (truth == c)).sum() / ((mapped == c) | (truth == c)).sum()
        for c in range(C)
    ]
    return (mapped == truth).mean(), np.array(iou)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("K", "C"), [(1, 1), (1, 4), (4, 1), (3, 3), (5, 5), (6, 3), (3, 6)], ids=lambda v: str(v))
def test_hungarian_is_the_best_one_to_one_mapping(K, C, seed):
    counts = random_counts(K, C, seed)
    counts[0, 0] += 1  # at least one pixel
    scores = hungarian(counts)
    used = [c for c in scores.mapping if c >= 0]
    assert len(set(used)) == len(used)
    assert scores.accuracy == pytest.approx(best_assignment(counts) / counts.sum())
    accuracy, iou = pixelwise(counts, scores.mapping)
    assert scores.accuracy == pytest.approx(accuracy)
    np.testing.assert_allclose(scores.iou, iou)
    assert scores.miou == pytest.approx(np.nanmean(iou))
    assert scores.pixels == counts.sum()
    assert scores.matching == "hungarian"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("K", "C"), [(1, 4), (4, 1), (5, 5), (9, 3)], ids=lambda v: str(v))
def test_majority_gives_every_cluster_its_largest_class(K, C, seed):
    counts = random_counts(K, C, seed)
    counts[0, 0] += 1
    scores = majority(counts)
    assert scores.accuracy == pytest.approx(counts.max(1).sum() / counts.sum())
    accuracy, iou = pixelwise(counts, scores.mapping)
    assert scores.accuracy == pytest.approx(accuracy)
    np.testing.assert_allclose(scores.iou, iou)
    assert scores.matching == "majority"


def test_more_clusters_than_classes_count_every_pixel():
    counts = np.array([[50, 0], [0, 30], [20, 0]])
    one_to_one, many_to_one = hungarian(counts), majority(counts)
    assert one_to_one.mapping == (0, 1, -1)
    assert one_to_one.accuracy == 0.8  # the third cluster's 20 pixels are wrong, not forgotten
    assert one_to_one.iou == pytest.approx((50 / 70, 1.0))
    assert many_to_one.mapping == (0, 1, 0)
    assert many_to_one.accuracy == many_to_one.miou == 1.0


def test_fewer_clusters_than_classes():
    counts = np.array([[60, 5, 10], [0, 25, 0]])
    scores = hungarian(counts)
    assert scores.mapping == (0, 1)
    assert scores.iou == pytest.approx((60 / 75, 25 / 30, 0.0))  # present without a cluster: 0, and in the mean
    assert scores.miou == pytest.approx((60 / 75 + 25 / 30) / 3)


def test_absent_class_is_left_out_of_the_mean():
    scores = hungarian(np.array([[8, 0, 2], [0, 0, 10], [5, 0, 0]]))
    assert np.isnan(scores.iou[1])
    assert scores.mapping == (0, 2, -1)  # no pixel shared with class 1: not called so
    assert scores.miou == pytest.approx((8 / 15 + 10 / 12) / 2)
    assert scores.accuracy == pytest.approx(18 / 25)
    assert scores.class_pixels == (13, 0, 12)


def test_ties_and_empty_clusters_of_majority():
    assert majority(np.array([[3, 3], [0, 0], [1, 2]])).mapping == (0, -1, 1)


def test_one_pixel_of_one_cluster_and_one_class():
    scores = hungarian(np.array([[1]]))
    assert (scores.mapping, scores.accuracy, scores.miou) == ((0,), 1.0, 1.0)
    assert scores.as_dict(["sky"])["clusters"] == [{"cluster": 0, "class": "sky"}]
    assert scores_table({"x": scores}, ["sky"]).splitlines()[2].split() == ["sky", "100.0", "100.0"]


def test_a_combining_mark_takes_no_column():
    lines = scores_table(
        {"x": majority(np.eye(2, dtype=int))}, ["stre\u0301et", "street"]
    ).splitlines()  # é as two characters
    assert len(lines[2]) == len(lines[3]) + 1


@pytest.mark.filterwarnings("error")
def test_nothing_labelled():
    for scores in (hungarian(np.zeros((2, 3), int)), majority(np.zeros((2, 3), int))):
        assert scores.pixels == 0
        assert scores.mapping == (-1, -1)
        assert np.isnan([scores.accuracy, scores.miou, *scores.iou]).all()
        assert "-" in scores_table({"x": scores}, ["a", "b", "c"])


def test_large_counts_do_not_overflow():
    counts = np.full((2, 2), 10**12) + np.eye(2, dtype=np.int64)
    assert hungarian(counts).mapping == (0, 1)
    assert hungarian(counts.astype(np.uint32) // 2).pixels == int(
        (counts.astype(np.uint32) // 2).astype(np.int64).sum()
    )


def test_as_dict_is_json_with_names():
    scores = hungarian(np.array([[8, 0, 2], [0, 0, 10], [5, 0, 0]]))
    read = json.loads(json.dumps(scores.as_dict(["sky", "Straße", "sky"]), allow_nan=False))
    assert read["matching"] == "hungarian"
    assert read["pixels"] == 25
    assert read["accuracy"] == pytest.approx(0.72)
    assert [c["name"] for c in read["classes"]] == ["sky", "Straße", "sky"]  # the same name twice loses nothing
    assert read["classes"][1] == {"name": "Straße", "pixels": 0, "iou": None}
    assert read["clusters"][1:] == [{"cluster": 1, "class": "sky"}, {"cluster": 2, "class": None}]
    with pytest.raises(ValueError, match="longer"):
        scores.as_dict(["a", "b"])


def test_table_by_hand():
    counts = np.array([[50, 0, 0], [0, 0, 30], [20, 0, 0]])
    text = scores_table({"hungarian": hungarian(counts), "majority": majority(counts)}, ["sky", "道路", "tree"])
    assert text == "\n".join(
        [
            "class     share  hungarian  majority",
            "------------------------------------",
            "sky        70.0       71.4     100.0",
            "道路          -          -         -",
            "tree       30.0      100.0     100.0",
            "------------------------------------",
            "mean IoU              85.7     100.0",
            "accuracy              80.0     100.0",
        ]
    )


def test_percent():
    assert [percent(v) for v in (0.0, 0.12345, 1.0, float("nan"))] == ["0.0", "12.3", "100.0", "-"]
