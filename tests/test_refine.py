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
from smooseg_fast.datasets.reading import Picture, Rectangle
from smooseg_fast.errors import UserError
from smooseg_fast.segment import refine
from smooseg_fast.segment.grouping import Grouping
from smooseg_fast.segment.refine import Patches, Plane, Refiner, refined_bands, refined_tiles
from smooseg_fast.segment.tiles import label_bands
from smooseg_kernels import edges

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
@pytest.mark.parametrize(("marked", "density"), [(False, 1), (True, 1), (True, 2)])
def test_tiles_give_the_probabilities_of_one_piece(monkeypatch, grouping, way, marked, density):
    plane = Plane((36, 20), (155, 83), (153, 83), density)
    pixels = np.random.default_rng(0).integers(0, 256, (153, 83, 3), dtype=np.uint8)
    valid = np.kron(np.random.default_rng(1).random((16, 9)) > 0.3, np.ones((10, 10), bool))[:153, :83]
    picture = Picture(pixels, valid if marked else None)
    shows = (torch.rand(plane.grid, generator=torch.Generator().manual_seed(2)) > 0.3).numpy() if marked else None
    monkeypatch.setattr(refine, "GUIDED_RADIUS", 1.0)
    bands = list(codes(plane.grid).split(5))
    ((rectangle, whole),) = refined_tiles(bands, Refiner(way, grouping, plane), picture, shows)
    assert rectangle == (0, 0, 153, 83)
    everywhere = valid if marked else np.ones_like(valid)
    torch.testing.assert_close(whole[everywhere].sum(-1), torch.ones(everywhere.sum()))
    monkeypatch.setattr(refine, "SCORES", 1)
    pieces = list(refined_tiles(bands, Refiner(way, grouping, plane), picture, shows))
    assert len(pieces) >= 6
    for core, probs in pieces:
        expected = whole[core.top : core.bottom, core.left : core.right]
        shown = everywhere[core.top : core.bottom, core.left : core.right]
        torch.testing.assert_close(probs[shown], expected[shown], atol=1e-4, rtol=0)


def test_windows_count_patches_of_the_backbone_however_fine_the_grid(grouping):
    for way in ("guided", "joint"):
        coarse = Refiner(way, grouping, Plane((7, 9), (56, 72), (56, 72)))
        fine = Refiner(way, grouping, Plane((14, 18), (56, 72), (56, 72), density=2))
        assert (fine.plane.cell, fine.plane.patch, coarse.plane.patch) == (4, 8, 8)
        assert fine.radius == coarse.radius == 24
        assert coarse.reach - fine.reach == (0 if way == "guided" else 4)  # the cell next to the window


def test_crf_exact_says_how_long_it_takes_on_a_cpu(monkeypatch, grouping, capsys):
    refiner = Refiner("crf-exact", grouping, Plane((200, 250), (3200, 4000), (3200, 4000)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    pieces = refined_tiles(iter(()), refiner, Picture(np.zeros((3200, 4000, 3), np.uint8)))
    with pytest.raises(
        UserError, match=r"--refine crf-exact would take about [\d,]+ hours on this CPU for 4000 x 3200"
    ):
        next(pieces)  # before any code is asked for
    refine.say_once.cache_clear()
    image, segmenter = shapes(32, 40)[0], looker(32)
    segmenter.predict(image, refine="crf-exact")
    assert not capsys.readouterr().err
    monkeypatch.setattr(refine, "EXACT_PAIRS", 1e5)
    for _ in range(2):
        segmenter.predict(image, refine="crf-exact")
    text = "crf-exact: about 2 min on this CPU for an image of 40 x 32 pixels; --refine crf takes seconds\n"
    assert capsys.readouterr().err == text
    segmenter.predict(image, refine="crf")
    assert "crf-exact" not in capsys.readouterr().err  # a compiler may have its line there


def test_tiles_of_a_crf_agree_but_for_few_pixels(monkeypatch):
    image, _ = shapes(48, 64)
    segmenter = looker(48)
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
    guide, noise = torch.from_numpy(pixels)[None] / 255, {"radius": refine.NOISE_RADIUS, "eps": refine.NOISE_EPS}
    guide = edges.denoised(guide, torch.ones(1, 64, 72, 1), **noise)
    expected = sk.guided_filter(scores.permute(2, 0, 1), guide[0], radius=3, eps=refine.GUIDED_EPS).clamp(min=0)
    torch.testing.assert_close(probs.permute(2, 0, 1), expected / expected.sum(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_places_without_data_stay_and_do_not_bleed(way):
    """The pixels under them change no label, and labels next to them are those of the picture's own side."""
    image, truth = shapes(48, 60)
    valid = np.ones((48, 60), bool)
    valid[:, 37:] = False
    segmenter = looker(48)
    labels = []
    for seed in range(2):
        image[:, 37:] = np.random.default_rng(seed).integers(0, 256, (48, 23, 3))
        labels.append(segmenter.predict(Picture(image, valid), mirror=False, refine=way))
    assert (labels[0] == labels[1]).all()
    assert (labels[0][:, 37:] == IGNORE).all()
    assert (labels[0][:, :37] != truth[:, :37]).mean() < 0.02
    assert (segmenter.predict(Picture(image, np.zeros((48, 60), bool)), refine=way) == IGNORE).all()


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


def test_evaluate_refines_squares_and_whole_images(trained, labelled, monkeypatch, capsys):
    """And gives the scores of labels that are not refined next to it, from the same codes."""
    calls, code_bands = [], smooseg_fast.Segmenter.code_bands
    monkeypatch.setattr(smooseg_fast.Segmenter, "code_bands", lambda *args: (calls.append(args), code_bands(*args))[1])
    args = ["--checkpoint", str(trained), "--data", str(labelled), "--no-mirror"]
    confusions, rows = {}, {}
    for out, more in {
        "none": ["--refine", "none"],
        "guided": [],
        "whole": ["--whole"],
        "wholenone": ["--refine", "none", "--whole"],
        "paper": ["--preset", "cityscapes"],
        "crf": ["--preset", "cityscapes", "--refine", "crf"],
    }.items():
        size = [] if "--whole" in more else ["--eval-size", "72"]
        assert run(evaluate.main, [*args, *size, *more, "--out", out]) == 0
        scores, printed = json.load(open(f"{out}/scores.json")), capsys.readouterr().out
        main = {"none": "none", "wholenone": "none", "paper": "none", "crf": "crf"}.get(out, "guided")
        assert scores["refine"] == main
        rows[out], confusions[out] = scores["by_refinement"], np.array(scores["confusion"])
        assert rows[out][main] == {name: scores[name] for name in ("hungarian", "majority")}
        assert printed.count("mIoU") == len(rows[out])
        for way, row in rows[out].items():
            how = "not refined" if way == "none" else f"refined by {way}"
            assert f"mIoU {100 * row['hungarian']['miou']:.1f} %  (hungarian, {how})" in printed
    assert list(rows["none"]) == list(rows["wholenone"]) == ["none"]
    for refined, plain in (("guided", "none"), ("crf", "paper"), ("whole", "wholenone")):
        assert confusions[refined].sum() == confusions[plain].sum()
        assert (confusions[refined] != confusions[plain]).any()
        assert rows[refined]["none"] == rows[plain]["none"]
    assert rows["paper"] == rows["crf"]
    assert len(calls) == 2 * 3  # each whole image once for both refinements


def test_a_run_gives_the_scores_that_evaluate_gives(trained, labelled):
    report = json.load(open(trained.parent / "report.json"))["scores"]
    args = ["--checkpoint", str(trained), "--data", str(labelled), "--no-mirror", "--out", "e"]
    assert run(evaluate.main, args) == 0
    assert report["by_refinement"] == json.load(open("e/scores.json"))["by_refinement"]
    assert report["by_refinement"]["none"]["hungarian"] == report["hungarian"]
