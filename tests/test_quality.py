"""quality.py: the maps of statistics, rows of a tiny set, what a second run replaces, all ways to group."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import domains
import quality

HOW = (domains.CHOSEN, domains.CLASSES, domains.BEST)
ABOUT = dict.fromkeys(quality.KEY, "x") | {"set": "a", "scale": "fit", "margin": 0}


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


def test_every_way_to_group_a_set_and_a_resumed_run(labelled, tmp_path, capsys, monkeypatch):
    out = tmp_path / "domains.jsonl"
    flags = ["--backbone", "filterbank", "--size", "64", "--eval-size", "64", "--seeds", "2", "--steps", "4"]
    command = ["domains", "--data", str(labelled.parent), "--sets", labelled.name, "--out", str(out), *flags]
    quality.main(command)
    rows = domains.read(out)
    assert [(row["method"], row["number"]) for row in rows] == 2 * domains.ORDER
    for row in rows:
        assert all(0 <= row[name] <= 100 for name in ("accuracy", "miou", "fitted_miou", "majority_miou", "boundary_f"))
        assert 1 <= row["perplexity"] <= row["groups"] + 1e-3
        assert row["majority_accuracy"] >= row["accuracy"] >= row["fitted_accuracy"] - 1e-9
    by_way = {(row["method"], row["number"]): row for row in rows}
    one = by_way[domains.ONE, "one"]
    assert (one["groups"], one["perplexity"], one["boundary_f"]) == (1, 1.0, 0.0)
    tree = [by_way[domains.TREE, how] for how in HOW]
    assert tree[2]["miou"] >= max(row["miou"] for row in tree)
    assert [row["groups"] for row in tree[:2]] == [by_way[domains.TRAINED, how]["groups"] for how in HOW[:2]]
    assert tree[1]["groups"] == by_way[domains.LINKAGE, domains.CLASSES]["groups"] == 2
    assert by_way[domains.LINKAGE, domains.BEST]["miou"] >= by_way[domains.LINKAGE, domains.CLASSES]["miou"]

    cut_off = out.read_bytes()
    out.write_bytes(cut_off + b'{"set": "half a li')
    monkeypatch.setattr(domains.Domain, "open", None)  # nothing is left to measure
    capsys.readouterr()
    quality.main(command)
    assert domains.read(out) == rows
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| tree, untrained |") for line in lines) == 6


def test_rows_that_were_cut_off_give_way_to_the_next(tmp_path):
    out = tmp_path / "domains.jsonl"
    domains.append(out, [{"set": "a", "seed": 0}])
    out.write_bytes(out.read_bytes() + b'{"set": "half')
    domains.append(out, [{"set": "a", "seed": 1}])
    assert [(row["set"], row["seed"]) for row in domains.read(out)] == [("a", 0), ("a", 1)]


def test_the_table_has_regret_against_the_best_number():
    figures = dict.fromkeys(
        ["accuracy", "fitted_miou", "majority_miou", "boundary_f", "perplexity", "groups", "seconds"], 1.0
    )
    rows = [
        {"set": name, "seed": seed, "method": domains.TREE, "number": number, **figures, "miou": miou}
        for name, extra in (("a", 0), ("b", 4))
        for seed in (0, 1)
        for number, miou in ((domains.CHOSEN, 20.0 + seed), (domains.BEST, 21.0 + extra + seed))
    ]
    lines = domains.table(rows).splitlines()
    assert lines[2].startswith("| tree, untrained | chosen | 20.5 |")
    assert lines[2].endswith("| 3.0 |")
    assert lines[3].endswith("| 0.0 |")
    assert domains.by_set(rows).splitlines()[2] == "| tree, untrained | chosen | 20.5 ± 0.7 | 20.5 ± 0.7 | 20.5 ± 0.7 |"
