"""Labels refined by the picture: scores, tiles, no data; predict and evaluate as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_segmenter import untrained

import smooseg_fast
import smooseg_kernels as sk
from smooseg_fast import evaluate, predict
from smooseg_fast.command import run
from smooseg_fast.datasets import IGNORE
from smooseg_fast.datasets.reading import Picture
from smooseg_fast.errors import UserError
from smooseg_fast.segment import refine
from smooseg_fast.segment.grouping import Grouping
from smooseg_fast.segment.refine import Patches, Plane, Rectangle, Refiner, refined_bands, refined_tiles
from smooseg_fast.segment.tiles import label_bands

WAYS = ["guided", "joint", "crf", "crf-exact"]
COLOURS = torch.tensor([[0.35, 0.35, -0.4], [-0.4, 0.3, 0.3], [-0.3, -0.4, 0.2]])  # around 0, as MeanColours


def looker(side):
    """A segmenter whose codes are the mean colours of patches at the picture's own scale."""
    segmenter = untrained(COLOURS, scale="native", size=side, eval_size=side)
    segmenter.head.student, segmenter.head.basis = COLOURS, None
    return segmenter


def shapes(height, width):
    """Flat shapes of three colours, whose borders are on no patch's, under a little noise; and which is which."""
    y, x = np.mgrid[:height, :width]
    truth = np.where((y - 0.4 * height) ** 2 + (x - 0.4 * width) ** 2 < (0.31 * min(height, width)) ** 2, 1, 0)
    truth[(x - y > 0.53 * width)] = 2
    colours = (COLOURS.numpy() + 0.5) * 255
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return np.clip(colours[truth] + noise, 0, 255).astype(np.uint8), truth


@pytest.fixture
def grouping():
    g = torch.Generator().manual_seed(0)
    head = untrained(torch.randn(5, 16, generator=g)).head
    return Grouping(head)


@pytest.fixture
def merged(grouping):
    return Grouping(grouping.head, np.array([0, 1, 0, 2, 1]))


def codes(grid, seed=1):
    return torch.randn(*grid, 16, generator=torch.Generator().manual_seed(seed))


PLANE = Plane((7, 9), (56, 74), (51, 70))
WHOLE = Rectangle(0, 0, 51, 70)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind", ["grouping", "merged"])
def test_scores_are_those_of_the_upsampled_codes_and_agree_with_labels(kind, marked, request):
    rule = request.getfixturevalue(kind)
    scores = rule.scores(codes(PLANE.grid))
    valid = torch.rand(PLANE.grid, generator=torch.Generator().manual_seed(2)) > 0.4
    weight = refine.patch_weight(valid.numpy() if marked else None)
    weights = torch.ones(PLANE.grid) if weight is None else weight
    patches = Patches(rule, scores, weights, (0, 0), PLANE)
    probs = patches.softmax(patches.rows(WHOLE), patches.columns(WHOLE), 2.0)
    planes = torch.cat([scores * weights[..., None], weights[..., None]], -1).permute(2, 0, 1)[None].double()
    fine = torch.nn.functional.interpolate(planes, size=PLANE.size, mode="bilinear")[0, :, :51, :70]
    if kind == "merged":
        cosines = fine[:-1] / fine[-1]
    else:
        prototypes = rule.prototypes.double().T[..., None, None]
        cosines = torch.nn.functional.cosine_similarity(fine[:-1, None], prototypes, dim=0)
    torch.testing.assert_close(probs.permute(2, 0, 1).double(), (2 * cosines).softmax(0), atol=1e-5, rtol=0)
    bands = label_bands([scores * weights[..., None]], rule.prototypes, 7, PLANE.size, PLANE.shape)
    assert (torch.cat(list(bands)) == probs.argmax(-1)).float().mean() > 0.999  # ties


@pytest.mark.parametrize("way", ["guided", "joint"])
@pytest.mark.parametrize("marked", [False, True])
def test_tiles_give_the_probabilities_of_one_piece(monkeypatch, grouping, way, marked):
    plane = Plane((24, 20), (103, 83), (101, 83))
    pixels = np.random.default_rng(0).integers(0, 256, (101, 83, 3), dtype=np.uint8)
    valid = np.kron(np.random.default_rng(1).random((11, 9)) > 0.3, np.ones((10, 10), bool))[:101, :83]
    picture = Picture(pixels, valid if marked else None)
    weight = torch.rand(plane.grid, generator=torch.Generator().manual_seed(2)) if marked else None
    monkeypatch.setattr(refine, "GUIDED_RADIUS", 1.0)
    bands = list(codes(plane.grid).split(5))
    ((rectangle, whole),) = refined_tiles(bands, Refiner(way, grouping, plane), picture, weight)
    assert rectangle == (0, 0, 101, 83)
    everywhere = valid if marked else np.ones_like(valid)
    torch.testing.assert_close(whole[everywhere].sum(-1), torch.ones(everywhere.sum()))
    monkeypatch.setattr(refine, "SCORES", 1)
    pieces = list(refined_tiles(bands, Refiner(way, grouping, plane), picture, weight))
    assert len(pieces) >= 6
    for core, probs in pieces:
        expected = whole[core.top : core.bottom, core.left : core.right]
        shown = everywhere[core.top : core.bottom, core.left : core.right]
        torch.testing.assert_close(probs[shown], expected[shown], atol=1e-4, rtol=0)


def test_tiles_of_a_crf_agree_but_for_few_pixels(monkeypatch):
    image, _ = shapes(64, 80)
    segmenter = looker(64)
    monkeypatch.setattr(refine, "BILATERAL", (6.0, 13.0, 4.0))
    whole = segmenter.predict(image, mirror=False, refine="crf-exact")
    monkeypatch.setattr(refine, "SCORES", 1)
    assert (segmenter.predict(image, mirror=False, refine="crf-exact") != whole).mean() < 2e-3


@pytest.mark.parametrize("way", WAYS)
def test_borders_are_those_of_the_picture(way):
    image, truth = shapes(64, 80)
    segmenter = looker(64)
    plain, refined = (segmenter.predict(image, refine=name) != truth for name in ("none", way))
    assert plain.mean() > 0.02
    assert refined.mean() < 0.35 * plain.mean()


def test_guided_probabilities_are_the_filter_of_the_kernels(monkeypatch, grouping):
    plane = Plane((8, 9), (64, 72), (64, 72))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8)
    monkeypatch.setattr(refine, "GUIDED_RADIUS", 0.4)  # pixels: not subsampled
    ((_, probs),) = refined_tiles([codes(plane.grid)], Refiner("guided", grouping, plane), Picture(pixels))
    patches = Patches(grouping, codes(plane.grid), torch.ones(8, 9), (0, 0), plane)
    scores = patches.softmax(patches.rows(Rectangle(0, 0, 64, 72)), patches.columns(Rectangle(0, 0, 64, 72)), 10.0)
    expected = sk.guided_filter(scores.permute(2, 0, 1), torch.from_numpy(pixels), radius=3, eps=1e-4).clamp(min=0)
    torch.testing.assert_close(probs.permute(2, 0, 1), expected / expected.sum(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_places_without_data_stay_and_do_not_bleed(way):
    """The pixels under them change no label, and labels next to them are those of the picture's own side."""
    image, truth = shapes(64, 80)
    valid = np.ones((64, 80), bool)
    valid[:, 37:] = False
    segmenter = looker(64)
    labels = []
    for seed in range(2):
        image[:, 37:] = np.random.default_rng(seed).integers(0, 256, (64, 43, 3))
        labels.append(segmenter.predict(Picture(image, valid), mirror=False, refine=way))
    assert (labels[0] == labels[1]).all()
    assert (labels[0][:, 37:] == IGNORE).all()
    assert (labels[0][:, :37] != truth[:, :37]).mean() < 0.02
    assert (segmenter.predict(Picture(image, np.zeros((64, 80), bool)), refine=way) == IGNORE).all()


def test_bands_of_labels_cover_the_picture_in_order(monkeypatch, merged):
    monkeypatch.setattr(refine, "SCORES", 1)
    plane = Plane((24, 20), (192, 160), (192, 160))
    image, _ = shapes(192, 160)
    scores = merged.scores(codes(plane.grid)).split(1)
    bands = list(refined_bands(scores, Refiner("joint", merged, plane), Picture(image)))
    assert len(bands) > 1
    assert np.concatenate(bands).shape == (192, 160)


def test_a_refinement_that_is_none_of_them():
    with pytest.raises(UserError, match="refine: must be none, guided, joint, crf or crf-exact, got 'soft'"):
        looker(64).predict(shapes(64, 64)[0], refine="soft")


def mask(name):
    return np.array(Image.open(Path("made") / "masks" / f"{name}.png"))


def test_predict_refines_and_a_folder_is_of_one_refinement(trained, tmp_path, capsys):
    photos, (image, _) = tmp_path / "photos", shapes(64, 80)
    photos.mkdir()
    Image.fromarray(image).save(photos / "a.png")
    args = ["--checkpoint", str(trained), "--images", str(photos), "--out", "made", "--no-mirror"]
    assert run(predict.main, [*args, "--refine", "guided"]) == 0
    segmenter = smooseg_fast.Segmenter.load(trained, device="cpu")
    assert (mask("a") == segmenter.predict(photos / "a.png", mirror=False, refine="guided")).all()
    assert (mask("a") != segmenter.predict(photos / "a.png", mirror=False, refine="none")).any()
    assert run(predict.main, [*args, "--refine", "joint"]) == 2
    assert "holds another run (refine is 'guided' there and 'joint' here)" in capsys.readouterr().err
    assert run(predict.main, [*args, "--refine", "best"]) == 2
    assert "--refine" in capsys.readouterr().err


def test_evaluate_refines_squares_and_whole_images(trained, labelled):
    args = ["--checkpoint", str(trained), "--data", str(labelled), "--no-mirror"]
    confusions = {}
    for out, more in {
        "none": ["--refine", "none"],
        "guided": [],
        "whole": ["--whole"],
        "wholenone": ["--refine", "none", "--whole"],
        "crf": ["--refine", "crf"],
    }.items():
        size = [] if "--whole" in more else ["--eval-size", "72"]
        assert run(evaluate.main, [*args, *size, *more, "--out", out]) == 0
        scores = json.load(open(f"{out}/scores.json"))
        assert scores["refine"] == (more[1] if more[:1] == ["--refine"] else "guided")
        confusions[out] = np.array(scores["confusion"])
    for refined, plain in (("guided", "none"), ("crf", "none"), ("whole", "wholenone")):
        assert confusions[refined].sum() == confusions[plain].sum()
        assert (confusions[refined] != confusions[plain]).any()
