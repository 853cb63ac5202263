"""`smooseg sweep`: what is learnt together, the table, a sweep that resumes, and values that training refuses."""

from __future__ import annotations

import csv
import json

import pytest
from PIL import Image

from smooseg_fast import sweep
from smooseg_fast.command import run

SMALL = ("size=64", "eval_size=64", "backbone=filterbank", "prototypes=6")


def call(folder, *settings, seeds=2):
    return run(sweep.main, ["--data", str(folder), "--seeds", str(seeds), "--out", "swept", "--set", *SMALL, *settings])


def test_seeds_and_granularities_are_learnt_together_and_other_settings_apart(labelled, capsys):
    assert call(labelled, "granularity=0,0.1", "steps=2,3") == 0
    out = capsys.readouterr().out
    runs = {path.name for path in (labelled.parent / "swept").iterdir() if path.is_dir()}
    assert runs == {"steps=2", "steps=3"}
    with open("swept/sweep.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["steps"], row["granularity"], row["seed"]) for row in rows} == {
        (steps, granularity, seed) for steps in "23" for granularity in ("0.0", "0.1") for seed in "01"
    }
    assert all(0 < float(row[figure]) <= 1 for row in rows for figure in sweep.LABELLED)
    record = json.loads((labelled.parent / "swept/sweep.json").read_text())
    assert len(record["heads"]) == 8
    for mean in record["means"]:
        alike = [row for row in record["heads"] if all(row[name] == mean[name] for name in ("steps", "granularity"))]
        assert mean["seeds"] == len(alike) == 2
        assert mean["miou"] == pytest.approx(sum(row["miou"] for row in alike) / 2)
        assert mean["miou_std"] == pytest.approx(abs(alike[0]["miou"] - alike[1]["miou"]) / 2**0.5)
    assert Image.open("swept/sweep.png").size[0] > 200
    assert len([line for line in out.splitlines() if line.startswith("64 ")]) == 4  # the first setting is size=64


def test_a_sweep_resumes_and_takes_more_settings(labelled, capsys, monkeypatch):
    assert call(labelled, "steps=2", seeds=1) == 0
    first = json.loads((labelled.parent / "swept/sweep.json").read_text())["heads"]
    before = (labelled.parent / "swept/run/checkpoint.safetensors").stat().st_mtime_ns
    assert call(labelled, "steps=2", seeds=1) == 0
    assert (labelled.parent / "swept/run/checkpoint.safetensors").stat().st_mtime_ns == before
    assert json.loads((labelled.parent / "swept/sweep.json").read_text())["heads"] == first


def test_a_set_without_labels_is_compared_by_figures_without_labels(folder):
    assert call(folder, "steps=1", seeds=1) == 0
    (row,) = json.loads((folder.parent / "swept/sweep.json").read_text())["heads"]
    assert "miou" not in row
    assert row["perplexity"] >= 1


def test_values_are_those_of_training():
    values = sweep.values_of(
        ["granularity=0,0.06", "lr-prototypes=1e-3", "deterministic=False,true", "prototypes=None,32"]
    )
    assert values == {
        "granularity": [0.0, 0.06],
        "lr_prototypes": [0.001],
        "deterministic": [False, True],
        "prototypes": [None, 32],
    }
    assert [name for name, _ in sweep.combinations(values)] == [
        "deterministic=False_prototypes=None",
        "deterministic=False_prototypes=32",
        "deterministic=True_prototypes=None",
        "deterministic=True_prototypes=32",
    ]
    assert all(settings["granularity"] == (0.0, 0.06) for _, settings in sweep.combinations(values))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stepps=2", "--set stepps=2: names no setting; did you mean steps"),
        ("steps", "--set steps: names no setting"),
        ("steps=two", "--steps: must be a whole number, got 'two'"),
        ("steps=-1", "--steps: must be at least 0, got -1"),
        ("steps=2,2", "--set steps=2,2: has a value twice"),
        ("heads=3", "--set heads=3: is given by --seeds"),
        ("verbose=yes", "--set verbose=yes: must be True or False, got yes"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_learnt(labelled, capsys, word, message):
    assert call(labelled, word) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (labelled.parent / "swept").exists()


def test_a_setting_that_is_given_twice(labelled, capsys):
    assert call(labelled, "steps=2", "steps=3") == 2
    assert capsys.readouterr().err.startswith("error: --set steps=3: steps is given twice")
