"""quality.py: linkage, the maps of statistics, rows of a tiny set, and what a second run replaces."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import quality

ABOUT = dict.fromkeys(quality.KEY, "x") | {"set": "a", "scale": "fit", "margin": 0}


def test_linkage_is_scipys_average_linkage_where_every_group_is_one_row():
    rows = torch.nn.functional.normalize(torch.randn(24, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    tree = linkage(rows.double().numpy(), "average", metric="cosine")
    partitions = quality.average_linkage(rows, rows, 16)
    assert list(partitions) == list(range(16, 1, -1))
    for k, parts in partitions.items():
        expected = fcluster(tree, k, "maxclust")
        assert {frozenset(members) for members in parts} == {
            frozenset(np.flatnonzero(expected == number).tolist()) for number in range(1, k + 1)
        }


def test_linkage_counts_the_rows_of_a_group():
    """Two rows at 0 degrees, one each at 50, 100 and 160: the first two groups merge, and then weigh three rows."""
    centres = torch.tensor([[np.cos(a), np.sin(a)] for a in np.radians([0, 50, 100, 160])], dtype=torch.float32)
    rows = centres[[0, 0, 0, 0, 1, 2, 3]]
    # mean similarity of the row at 100 degrees to five rows (0: -.174 four times, 50: .643) is -.010, to 160: .5
    assert quality.average_linkage(rows, centres, 3) == {3: [[0, 1], [2], [3]], 2: [[0, 1], [2, 3]]}


@pytest.mark.parametrize("name", quality.STATISTICS)
def test_the_maps_of_statistics(name):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 6, generator=g) @ torch.randn(6, 6, generator=g) + 3
    mapped = quality.STATISTICS[name](rows)(rows)
    if name == "raw":
        assert torch.equal(mapped, rows)
        return
    assert mapped.mean(0).abs().max() < 1e-4
    if name == "standardised":
        assert torch.allclose(mapped.std(0), torch.ones(6), atol=1e-4)
    if name == "whitened":
        covariance = torch.cov(mapped.T)
        assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
        assert covariance.diag().max() <= 1  # shrinkage leaves the small variances below one
    if name == "centred":
        assert torch.allclose(torch.cov(mapped.T), torch.cov(rows.T), atol=1e-3)


def test_a_row_for_every_statistic_of_a_set(labelled):
    rows = quality.measure(quality.View(labelled, "filterbank"), ["raw", "centred"], 2)
    assert [row["statistics"] for row in rows] == ["raw", "centred"]
    for row in rows:
        assert (row["backbone"], row["set"], row["sizes"]) == ("filterbank", labelled.name, "224/320")
        shares = [row[name] for name in ("kmeans_accuracy", "kmeans_miou", "linkage_miou", "best_k_miou")]
        assert all(0 < share <= 100 for share in shares)
        assert row["best_k_miou"] >= row["linkage_miou"]
        assert row["images_per_s"] > 0
        assert row["peak_mb"] > 100


def test_a_second_measurement_replaces_the_first(tmp_path):
    path = tmp_path / "results" / "sight.csv"
    quality.write(path, [{**ABOUT, "kmeans_miou": 20.0}, {**ABOUT, "scale": "0.5", "kmeans_miou": 21.0}])
    quality.write(path, [{**ABOUT, "kmeans_miou": 22.0}, {**ABOUT, "set": "b", "kmeans_miou": 23.0}])
    table = pd.read_csv(path, dtype={"scale": str})
    assert sorted(zip(table["set"], table["scale"], table["kmeans_miou"])) == [
        ("a", "0.5", 21.0),
        ("a", "fit", 22.0),
        ("b", "fit", 23.0),
    ]


@pytest.mark.parametrize(("sizes", "scale", "margin"), [((64, 48), ("fit",), 8), ((None, 32), ("native", "0.5"), 0)])
def test_sizes_scales_and_margins_are_those_asked_for(labelled, sizes, scale, margin):
    (row,) = quality.measure(quality.View(labelled, "filterbank", sizes, scale, margin), ["raw"], 1)
    assert row["sizes"] == f"{sizes[0] or 224}/{sizes[1]}"
    assert 0 < row["kmeans_miou"] <= 100


def test_the_table_leaves_out_means_of_incomplete_rows():
    figures = dict(kmeans_miou=20.0, linkage_miou=30.0, best_k_miou=40.0, images_per_s=50.0)
    rows = [{**ABOUT, **figures}, {**ABOUT, "set": "b", **figures, "kmeans_miou": 25.04}]
    lines = quality.table(pd.DataFrame([*rows, {**rows[0], "statistics": "centred"}])).splitlines()
    assert lines[2].endswith("| 20.0 | 25.0 | 22.5 | 30.0 | 40.0 | 50.0 |")
    assert lines[3].endswith("| 20.0 | - | - | - | - | - |")
