"""How alike the patches of a set are: exact means of all of it, what is counted of it, the command and its files."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from smooseg_fast import similarity, train
from smooseg_fast.command import run
from smooseg_fast.config import Thresholds
from smooseg_fast.features.store import Contents, FeatureStore, Shard
from smooseg_fast.measure import closeness as measured
from smooseg_fast.measure.closeness import BINS, REACH, Closeness, Distribution, closeness, warning
from smooseg_fast.show.charts import BLUE, MARK
from smooseg_fast.show.histograms import Histogram, histograms_picture

CPU = torch.device("cpu")
BIN = 2 * REACH / BINS


def make_store(N=19, P=12, D=6, seed=0) -> tuple[FeatureStore, torch.Tensor]:
    """A store in two shards, and its unit rows in float64; neighbours in it are alike, and one row is 0."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(N, P, D, generator=g) + torch.linspace(0, 3, N)[:, None, None] * torch.randn(
        1, 1, D, generator=g
    )
    features[1, 2] = 0.0
    features = features.half()
    shards = []
    for rows in (features[:5], features[5:]):
        names = tuple(f"{i}.png" for i in range(len(rows)))
        shards.append(Shard(Contents((0, 0), (3, P // 3), names, tuple((0, 0) for _ in names), (), 0), rows, 0))
    return FeatureStore(shards), F.normalize(features.double(), dim=-1, eps=1e-10)


def closer(f, j):
    """W - M of unit rows with their partners."""
    s = f @ f[j].mT
    return s - s.mean(2, keepdim=True)


def test_means_are_of_all_squares_whatever_is_counted():
    store, f = make_store()
    every = torch.einsum("npd,mqd->nm", f, f) / 12**2
    N = len(every)
    within, across = float(every.diagonal().mean()), float((every.sum() - every.trace()) / (N * (N - 1)))
    for largest, counted in ((10**9, N), (5 * 144, 5), (1, 2)):
        found = measured.similarity(store, CPU, largest=largest, progress=False)
        assert (found.squares, found.counted) == (N, counted)
        assert found.within.mean == pytest.approx(within, abs=1e-7)
        assert found.across.mean == pytest.approx(across, abs=1e-7)
        assert found.within.pairs == found.across.pairs == counted * 144
    assert "5 of them, drawn at random" in measured.similarity(store, CPU, largest=5 * 144, progress=False).line()


def test_histograms_of_the_whole_set():
    store, f = make_store()
    found = measured.similarity(store, CPU, progress=False)
    w = (closer(f, torch.arange(len(f))) + found.within.mean).flatten().sort().values
    assert found.within.std == pytest.approx(float(w.std()), abs=BIN)
    for q in (0.01, 0.25, 0.5, 0.9):
        assert found.within.quantiles([q])[0] == pytest.approx(float(w[math.ceil(q * len(w)) - 1]), abs=BIN)
    for b in (-0.3, 0.1, 0.6):
        assert w[w > b + BIN].numel() <= found.within.pulled(b) * len(w) <= w[w > b - BIN].numel()
    assert found.within.pulled(-9.0) == 1.0
    assert found.within.pulled(9.0) == 0.0


def test_across_pairs_are_of_different_squares_drawn_at_random(monkeypatch):
    store, f = make_store()
    asked = []
    real = measured.sk.similarity_statistics

    def watched(features, entries, **options):
        asked.append((features, entries))
        return real(features, entries, **options)

    monkeypatch.setattr(measured.sk, "similarity_statistics", watched)
    found = measured.similarity(store, CPU, progress=False)
    assert found.across.pairs == 19 * 144
    pairs = set()
    for features, (own, *others) in asked:
        assert own == "self"
        rows = [int((f - F.normalize(each.double(), dim=-1)).abs().sum((1, 2)).argmin()) for each in features]
        for other in others:
            pairs |= {(n, rows[j]) for n, j in zip(rows, other.tolist())}
    assert len(pairs) == 19
    assert all(n != j for n, j in pairs)
    assert sum(abs(n - j) == 1 for n, j in pairs) < 0.5 * len(
        pairs
    )  # neighbours in a folder are often neighbours in time


def test_the_same_again_and_another_seed():
    store, _ = make_store()
    first, again, other = (
        measured.similarity(store, CPU, largest=700, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert torch.equal(first.within.counts, again.within.counts)
    assert torch.equal(first.across.counts, again.across.counts)
    assert not torch.equal(first.across.counts, other.across.counts)
    assert first.within.mean == again.within.mean


def test_two_squares_are_enough():
    store, f = make_store(N=2)
    found = measured.similarity(store, CPU, progress=False)
    assert found.across.mean == pytest.approx(float((f[0].mean(0) * f[1].mean(0)).sum()), abs=1e-7)


def test_thresholds_and_their_warning():
    kind = Distribution(0.2, torch.bincount(torch.tensor([700, 720, 800, 810]), minlength=BINS))
    found = measured.Similarity(9, 9, kind, Distribution(0.1, kind.counts))
    within, across = closeness(found, Thresholds(-0.02, 0.5, relative=False))
    assert (within.threshold, across.threshold) == (-0.02, 0.5)
    assert within.force == pytest.approx(0.22)
    assert (within.pulled, across.pulled) == (1.0, 0.0)
    assert "net forces differ in sign" in warning(within, across)
    relative = closeness(found, Thresholds(0.06, 0.06, relative=True))
    assert [kind.threshold for kind in relative] == pytest.approx([0.26, 0.16])
    assert [kind.force for kind in relative] == pytest.approx([-0.06, -0.06])
    assert [kind.pulled for kind in relative] == [0.5, 0.5]
    assert warning(*relative) is None
    assert re.search(r"threshold \+0\.260 pulls 50 %  net force -0\.060", relative[0].line())
    assert "push the patches of an image apart" in warning(Closeness(0, 1, (), 0.5, 0), Closeness(0, 1, (), -0.5, 0))


def call(*args):
    return run(similarity.main, [str(a) for a in args])


def test_the_command_on_a_folder(folder, capsys):
    assert call("--data", folder, "--size", "64", "--granularity", "0.06", "-0.1") == 0
    out = capsys.readouterr().out
    found = json.load(open("runs/photos/similarity/similarity.json"))
    assert Image.open("runs/photos/similarity/similarity.png").size[0] > 1000
    assert found["squares"] == found["squares_counted"] == 18  # slide: three of each photo
    for kind in ("within", "across"):
        counts = found[kind]["histogram"]["counts"]
        assert sum(counts) == found[kind]["pairs"] == 18 * 64**2
        low, high = found[kind]["histogram"]["low"], found[kind]["histogram"]["high"]
        middles = low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)
        assert np.average(middles, weights=counts) == pytest.approx(found[kind]["mean"], abs=0.002)
        assert f"{found[kind]['mean']:+.3f}" in out
        assert found[kind]["mean"] == pytest.approx(found["thresholds"][0][kind]["threshold"] - 0.06)
    first, second = found["thresholds"]
    assert first["name"] == "granularity 0.06"
    assert second["within"]["pulled"] > first["within"]["pulled"]
    assert re.search(rf"granularity 0\.06 .* {100 * first['within']['pulled']:.1f} % ", out)
    *_, saved, last = out.strip().splitlines()
    assert "runs/photos/similarity/similarity.png" in saved
    assert last == f"next       python -m smooseg_fast.train --data {folder} --size 64 --granularity 0.06 -0.1"


def test_the_command_at_another_scale(folder, capsys):
    flags = ["--size", "64", "--scale", "0.8", "0.4", "--margin", "8"]
    assert call("--data", folder, *flags) == 0
    found = json.load(open("runs/photos/similarity/similarity.json"))
    assert (found["crops"], found["scale"], found["margin"]) == ("tiles", ["0.8", "0.4"], 8)
    out = capsys.readouterr().out
    assert "crops tiles, scale 0.8 0.4" in out
    assert out.endswith(f"next       python -m smooseg_fast.train --data {folder} {' '.join(flags)}\n")


def test_what_it_prints_is_what_training_says(folder, capsys):
    small = ["--data", folder, "--size", "64", "--threshold-within", "0.9", "--threshold-across", "-0.2"]
    assert call(*small, "--out", "found") == 0
    out = capsys.readouterr().out
    assert "warning    net forces differ in sign" in out
    found = json.load(open("found/similarity.json"))
    again = ["--eval-size", "64", "--steps", "2", "--batch-size", "4", "--prototypes", "3", "--out", "run"]
    assert run(train.main, [str(a) for a in (*small, *again, "--verbose")]) == 0
    report = json.load(open("run/report.json"))["closeness"]
    for kind in ("within", "across"):
        assert report[kind]["mean"] == found[kind]["mean"]
        assert report[kind]["pulled"] == found["thresholds"][0][kind]["pulled"]
        assert report[kind]["pairs"] == found[kind]["pairs"]
    assert (
        "means over every pair of patches of 18 squares; quantiles over 0.0737 million pairs within all of them"
        in capsys.readouterr().out
    )


def test_a_checkpoint_has_its_own_thresholds(trained, capsys):
    assert call("--checkpoint", trained) == 0
    out = capsys.readouterr().out
    assert "5 images" in out  # those of training
    assert "granularity 0 " in out  # the head that predicts alone
    assert "granularity 0.1" not in out
    assert (trained.parent / "similarity" / "similarity.png").exists()
    assert (
        call("--checkpoint", trained, "--threshold-within", "0.1", "--threshold-across", "0.2", "--out", "other") == 0
    )
    assert json.load(open("other/similarity.json"))["thresholds"][0]["within"]["threshold"] == 0.1


def test_fewer_pairs_than_there_are(folder, capsys):
    assert call("--data", folder, "--size", "64", "--pairs", 3 * 64**2, "--out", "o") == 0
    assert "within 3 of them, drawn at random" in capsys.readouterr().out
    found = json.load(open("o/similarity.json"))
    assert found["across"]["pairs"] == found["within"]["pairs"] == 3 * 64**2


BAD = [
    (["--pairs", "0"], "--pairs: must be at least 1, got 0"),
    (
        ["--threshold-within", "0.1"],
        "--granularity: give either it alone, or both",
    ),
    (
        ["--granularity", "0.1", "--threshold-within", "0.1", "--threshold-across", "0.1"],
        "--granularity: give either it alone, or both",
    ),
    (["--preset", "nowhere"], "--preset: 'nowhere' is not known"),
    (["--preset", "cityscapes"], "--data: missing; preset cityscapes needs a folder of images"),
    (["--data", "nowhere"], "--data nowhere: no such"),
    (["--checkpoint", "nowhere"], "--checkpoint nowhere: no such file"),
    (["--preset", "demo", "--checkpoint", "x"], "--preset: a checkpoint has its own settings"),
    (["--crops", "middle"], "--crops: 'middle' is not known; choose one of center, slide"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[" ".join(args)[:40] for args, _ in BAD])
def test_errors_are_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*args) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: " + message)
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_one_square_is_too_few(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    assert call("--data", tmp_path / "one.png", "--size", "64", "--out", tmp_path / "o") == 2
    assert "1 square of 64 pixels, but pairs of images need 2" in capsys.readouterr().err


def test_a_picture_has_a_mark_for_each_threshold():
    """In its colour at its place, above bars that are in proportion to the counts."""
    edges, counts = np.linspace(-1, 1, 201).tolist(), [0] * 100 + [1] * 50 + [3] * 50
    plain = histograms_picture({"a": Histogram(edges, counts, 0.6, {})})
    marked = histograms_picture({"a": Histogram(edges, counts, 0.6, {"b": 0.25})})

    def near(picture, colour, distance):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return (np.abs(np.asarray(picture).astype(int) - rgb).sum(2) < distance).sum(0)

    assert near(plain, MARK, 150).sum() == 0
    assert near(marked, MARK, 150).max() > 80  # a line from the axis to its name
    heights = near(plain, BLUE, 12)
    tall, low = (
        np.median(heights[heights > 0.75 * heights.max()]),
        np.median(heights[(heights > 20) & (heights < 0.5 * heights.max())]),
    )
    assert tall / low == pytest.approx(3, rel=0.05)
    many = histograms_picture({"a": Histogram(edges, counts, 0.6, {str(i): i / 40 for i in range(40)})})
    assert many.height > marked.height
