"""Codes and labels of images of any size; evaluate as a user runs it."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_trainer import SMALL
from textures import draw

import smooseg_fast
from smooseg_fast import evaluate, predict, train
from smooseg_fast.backbones import Backbone
from smooseg_fast.command import run
from smooseg_fast.config import TrainConfig
from smooseg_fast.datasets import demo, images
from smooseg_fast.datasets.cutting import Cutting
from smooseg_fast.datasets.mosaic import Mosaic
from smooseg_fast.datasets.reading import Picture
from smooseg_fast.errors import UserError
from smooseg_fast.segment.checkpoint import KEY, read_checkpoint, sealed
from smooseg_fast.segment.grouping import Grouping
from smooseg_fast.segment.segmenter import Segmenter
from smooseg_fast.segment.tiles import code_bands, spans
from smooseg_fast.segment.views import Views


class MeanColours(Backbone):
    """A patch has the mean colour of its own pixels alone, around 0."""

    def __init__(self):
        super().__init__(name="colours", digest="colours", patch=8, dim=3)

    def extract(self, images):
        b, _, s, t = images.shape
        return images.view(b, 3, s // 8, 8, t // 8, 8).mean((3, 5)).flatten(2).mT - 0.5


def untrained(prototypes, backbone=None, **settings):
    """A segmenter whose codes are the features."""
    chosen = object.__new__(Segmenter)
    chosen.checkpoint = SimpleNamespace(config=TrainConfig(**settings), report={"published": {}})  # not refined
    head = SimpleNamespace(teacher=prototypes, student=prototypes, projection=lambda features: features)
    chosen.backbone, chosen.head, chosen.grouping = backbone or MeanColours(), head, Grouping(head)
    return chosen


def codes_of(image, tile, mirror=False, **options):
    views = Views(Picture(image), Cutting(**options), MeanColours())

    def codes(tile):
        return views.features(tile, mirror)[0].unflatten(0, (tile.rows, tile.columns))

    return views, torch.cat(list(code_bands(views.grid, tile // 8, codes)))


def test_tiles_equal_the_whole_where_a_patch_sees_only_itself():
    image = np.random.default_rng(0).integers(0, 256, (96, 400, 3), dtype=np.uint8)
    views, whole = codes_of(image, 1000, size=96)
    assert whole.shape == (12, 50, 3)
    assert views.size == (96, 400)
    for options in ({}, {"mirror": True}, {"margin": 16}, {"margin": 3, "mirror": True}):
        torch.testing.assert_close(codes_of(image, 64, size=96, **options)[1], whole, atol=1e-5, rtol=1e-5)


def test_padding_is_mirrored_content_and_never_stretches():
    image = np.full((50, 101, 3), 7, np.uint8)
    image[:, 96:] = 200
    views, codes = codes_of(image, 640, size=50)
    assert codes.shape == (7, 13, 3)
    assert views.size == (56, 104)  # pixels that 7 x 13 patches cover
    torch.testing.assert_close(codes[:, :12], torch.full((7, 12, 3), 7 / 255 - 0.5))
    torch.testing.assert_close(codes[:, 12], torch.full((7, 3), 200 / 255 - 0.5))
    views, codes = codes_of(image, 640, size=100)
    assert codes.shape == (13, 26, 3)
    assert views.size == (52, 104)


@pytest.mark.parametrize(
    ("length", "side", "step"), [(1, 8, 1), (8, 8, 1), (9, 8, 1), (100, 8, 1), (37, 10, 1), (100, 8, 2), (96, 17, 4)]
)
def test_spans_cover_and_overlap(length, side, step):
    pieces = spans(length, side, step)
    assert pieces[0][0] == 0
    assert sum(pieces[-1]) == length
    for (a, n), (b, _) in itertools.pairwise(pieces):
        assert n == side // step * step
        assert a < b <= a + n - side // 4
        assert b % step == 0


@pytest.mark.parametrize("shape", [(8, 8), (8, 300), (301, 9), (64, 64), (65, 200), (700, 900)])
def test_any_size(trained, shape):
    segmenter = smooseg_fast.Segmenter.load(trained, device="cpu")
    labels = segmenter.predict(draw(0, max(shape[0], 2), max(shape[1], 60))[0][: shape[0], : shape[1]], mirror=False)
    assert labels.shape == shape
    assert labels.min() >= 0
    assert labels.max() < len(segmenter.groups)


def test_numbers_of_groups_share_the_features_of_a_picture(trained, monkeypatch):
    segmenter, calls = smooseg_fast.Segmenter.load(trained, device="cpu"), []
    image, numbers = draw(0, 700, 900)[0], (2, len(segmenter.groups), 5)
    expected = {number: segmenter.at(number).predict(image) for number in numbers}
    extract = segmenter.backbone.extract
    monkeypatch.setattr(segmenter.backbone, "extract", lambda images: calls.append(1) or extract(images))
    segmenter.predict(image)
    once, masks = len(calls), segmenter.predict_at(image, numbers)
    assert len(calls) == 2 * once
    assert masks.keys() == expected.keys()
    for number, mask in masks.items():
        np.testing.assert_array_equal(mask, expected[number])


def test_a_pillow_image_is_the_picture_that_it_shows(trained, tmp_path):
    segmenter = smooseg_fast.Segmenter.load(trained, device="cpu")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned, for whoever asks
    Image.fromarray(draw(0, 64, 96)[0]).save(tmp_path / "x.png", exif=exif)
    colours, turned = Image.open(tmp_path / "x.png"), segmenter.predict(tmp_path / "x.png")
    assert turned.shape == (96, 64)
    assert (segmenter.predict(colours) == segmenter.predict(np.array(colours))).all()
    assert segmenter.predict(colours).shape == (64, 96)
    for other in (
        colours.convert("CMYK"),
        colours.convert("RGBA"),
        colours.convert("1"),
        colours.convert("L").convert("I"),
    ):
        assert (segmenter.predict(other) == segmenter.predict(images.picture_of(other).pixels)).all()
    reduced = colours.quantize(200)
    assert (segmenter.predict(reduced) == segmenter.predict(np.array(reduced.convert("RGB")))).all()


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (np.zeros((64, 64, 4), np.uint8), r"uint8 \[64, 64, 4\]"),
        (np.zeros((64, 64, 3)), r"float64 \[64, 64, 3\]"),
        (None, "NoneType"),
        (5, "int"),
        ([Path("a.png")], "list"),
        ([[1, 2]], r"int64 \[1, 2\]"),
    ],
)
def test_what_is_no_image_is_named(trained, image, got):
    segmenter = smooseg_fast.Segmenter.load(trained, device="cpu")
    with pytest.raises(
        smooseg_fast.UserError,
        match=rf"^image: must be uint8 \[H,W,3\] RGB or .*, a Pillow image, or a path; got {got}$",
    ):
        segmenter.predict(image)


@pytest.mark.parametrize("shape", [(7, 200), (200, 7), (1, 1), (0, 50)])
def test_an_image_smaller_than_a_patch_is_refused(trained, tmp_path, shape):
    segmenter = smooseg_fast.Segmenter.load(trained, device="cpu")
    image = np.zeros((*shape, 3), np.uint8)
    reason = rf"{shape[1]} x {shape[0]} pixels, less than one patch of the backbone \(8 pixels\); take it out"
    with pytest.raises(smooseg_fast.UserError, match=f"^image: {reason}$"):
        segmenter.predict(image)
    if image.size:
        Image.fromarray(image).save(tmp_path / "tiny.png")
        with pytest.raises(smooseg_fast.UserError, match=f"tiny.png: {reason}$"):
            segmenter.predict(tmp_path / "tiny.png")


def test_repr_says_what_it_is(trained, monkeypatch):
    segmenter = smooseg_fast.Segmenter.load(trained, device="cpu")
    config = segmenter.config
    learnt = f"groups={len(segmenter.groups)}, backbone='filterbank', size=64, device='cpu', step=6"
    assert repr(segmenter) == f"Segmenter({learnt}, granularity={config.granularity[0]}, path={str(trained)!r})"
    unsaved = smooseg_fast.Segmenter(segmenter.checkpoint, segmenter.backbone)
    monkeypatch.setattr(unsaved.checkpoint, "config", dataclasses.replace(config, granularity=None), raising=False)
    assert repr(unsaved) == f"Segmenter({learnt})"


def test_evaluate(trained, labelled, capsys):
    args = ["--checkpoint", str(trained), "--data", str(labelled), "--no-mirror", "--refine", "none"]
    assert run(evaluate.main, args) == 0
    printed = capsys.readouterr().out
    assert "wall" in printed
    assert "no mirror" in printed
    scores = json.load(open(trained.parent / "evaluation" / "scores.json"))
    report = json.load(open(trained.parent / "report.json"))
    assert (
        scores["hungarian"] == report["scores"]["hungarian"]
    )  # the same images, squares and labels as at the end of training
    assert np.sum(scores["confusion"]) == scores["hungarian"]["pixels"] == scores["majority"]["pixels"]
    assert Image.open(trained.parent / "evaluation" / "confusion.png").width > 100
    assert run(evaluate.main, args[:4]) == 0
    assert "mirror averaged" in capsys.readouterr().out


def test_evaluate_by_hand(trained, labelled):
    """The table against labels predicted one image at a time."""
    assert run(evaluate.main, ["--checkpoint", str(trained), "--data", str(labelled), "--no-mirror", "--out", "e"]) == 0
    counts = np.array(json.load(open("e/scores.json"))["confusion"])
    segmenter = smooseg_fast.Segmenter.load(trained, device="cpu")
    expected = np.zeros_like(counts)
    from smooseg_fast.datasets.images import cut_squares

    for number in (5, 6, 7):
        image, label = draw(number)
        label[:2] = 255
        square, truth = (cut_squares(pixels, 64, "center", "nearest")[0][1] for pixels in (image, label))
        guess = segmenter.predict(square, mirror=False, short_side=64)
        np.add.at(expected, (guess[truth < 2], truth[truth < 2]), 1)
    # the store keeps features in fp16: a pixel on a border may fall to the other side
    assert np.abs(counts - expected).sum() <= 0.01 * expected.sum()


def test_damaged_and_foreign_checkpoints(trained, tmp_path, capsys):
    photos = str(tmp_path / "set" / "val" / "images")

    def fails(path, message):
        assert run(predict.main, ["--checkpoint", str(path), "--images", photos, "--out", "made"]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: --checkpoint")
        assert message in error
        assert "\n" not in error
        assert not (tmp_path / "made").exists()

    data = trained.read_bytes()
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        fails(tmp_path / "cut.safetensors", "damaged, or written by another version")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    fails(tmp_path / "other.safetensors", "of another kind")
    torch.save({"a": 1}, tmp_path / "pickle.pt")
    fails(tmp_path / "pickle.pt", "no checkpoint of SmooSeg")
    fails(tmp_path / "missing", "no such file")
    fails(tmp_path, "a folder; give the checkpoint.safetensors that training wrote")


def parts_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("backbone", "name"), None, "of the wrong kind"),
        (("backbone", "digest"), 7, "of the wrong kind"),
        (("backbone", "licence"), None, "of the wrong kind"),
        (("report",), [], "of the wrong kind"),
        (("step",), "x", "of the wrong kind"),
        (("class_names",), [1, 2], "of the wrong kind"),
        (("config", "eval_size"), None, "its sizes or its backbone are not chosen"),
        (("config", "size"), None, "its sizes or its backbone are not chosen"),
        (("config", "backbone"), "auto", "its sizes or its backbone are not chosen"),
        (("config", "eval_size"), 1 << 70, "--eval-size: must be at most 65,536 pixels"),
        (("config", "resample"), 7, "--resample: must be text, got 7"),
        (("config", "lr"), True, "--lr: must be a number, got True"),
        (("config", "code_dim"), [], "--code-dim: must be a whole number"),
        (("config", "granularity"), [], "--granularity: give one or more different numbers, got ()"),
    ],
)
def test_checkpoints_with_another_header(trained, tmp_path, capsys, place, value, words):
    header, tensors = parts_of(trained)
    holder = header
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    refused_by_predict(save_changed(tmp_path, header, tensors), words, tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("student", lambda t: t[:0], "0 prototypes, and 1 to 255 are possible"),
        ("student", lambda t: t.flatten(), "damaged, or written by another version"),
        ("teacher", lambda t: t[:, :1], "teacher is torch.float32"),
        ("teacher", lambda t: t * float("nan"), "teacher has values that are NaN or infinite"),
        ("projection.hidden.bias", lambda t: t.long(), "projection.hidden.bias is torch.int64"),
        ("projection.linear.weight", lambda t: t[0, 0], "damaged, or written by another version"),
        (
            "projection.linear.weight",
            lambda t: torch.zeros(len(t), 1 << 18),
            "hidden.weight is torch.float32",
        ),  # W2 would take 275 GB
    ],
)
def test_checkpoints_with_other_weights(trained, tmp_path, capsys, name, change, words):
    header, tensors = parts_of(trained)
    tensors[f"head.{name}"] = change(tensors[f"head.{name}"]).contiguous()
    refused_by_predict(save_changed(tmp_path, header, tensors), words, tmp_path, capsys)


def test_a_bit_that_changed_is_refused(trained, tmp_path):
    """In the header and in weights, wherever it is: no bit may change what is predicted without a word."""
    data, changed = trained.read_bytes(), tmp_path / "changed.safetensors"
    for place in [*range(8, len(data), len(data) // 150), len(data) - 1]:
        one = bytearray(data)
        one[place] ^= 1 << place % 8
        changed.write_bytes(one)
        with pytest.raises(UserError, match=r"(damaged, or written by another version|of another kind)") as error:
            read_checkpoint(changed)
        assert "\n" not in str(error.value)


def save_changed(folder, header, tensors):
    save_file(tensors, folder / "changed.safetensors", {KEY: sealed(header, tensors)})
    return folder / "changed.safetensors"


def refused_by_predict(path, words, folder, capsys):
    assert (
        run(
            predict.main,
            ["--checkpoint", str(path), "--images", str(folder / "set" / "val" / "images"), "--out", "made"],
        )
        == 2
    )
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: --checkpoint {path}: ")
    assert words in line


def test_a_checkpoint_that_still_notes_the_patch_loads(trained, tmp_path):
    header, tensors = parts_of(trained)
    assert set(header["backbone"]) == {"name", "digest", "licence"}
    header["backbone"]["patch"] = 8
    save_file(tensors, tmp_path / "old.safetensors", {KEY: sealed(header, tensors)})
    assert read_checkpoint(tmp_path / "old.safetensors").backbone_name == "filterbank"


CALLABLE = """
import torch


def colours(images):
    b, _, s, t = images.shape
    return images.view(b, 3, s // 8, 8, t // 8, 8).mean((3, 5)) - 0.5
"""


def test_a_callable_has_to_be_given_again(labelled, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(train.main, ["--data", str(labelled), "--out", "out", *SMALL, "--backbone", "mine:colours"]) == 0
    assert "--backbone mine:colours" in capsys.readouterr().out.strip().splitlines()[-1]
    args = ["--checkpoint", "out/checkpoint.safetensors", "--images", str(labelled / "val" / "images"), "--out", "made"]
    assert run(predict.main, args) == 2
    assert "add --backbone mine:colours" in capsys.readouterr().err
    assert run(predict.main, [*args, "--backbone", "mine:colours"]) == 0
    assert run(predict.main, [*args, "--backbone", "filterbank"]) == 2
    assert "but the checkpoint was trained on 3 of mine:colours" in capsys.readouterr().err


@pytest.mark.parametrize("size", [4, 0, -8, 65])
def test_evaluate_names_its_own_flag_for_a_wrong_size(trained, labelled, capsys, size):
    assert run(evaluate.main, ["--checkpoint", str(trained), "--data", str(labelled), "--eval-size", str(size)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: --eval-size {size}: not a multiple of the backbone's patch, 8 pixels; take ")
    assert not (trained.parent / "evaluation").exists()


def test_evaluate_at_another_size(trained, labelled):
    assert (
        run(evaluate.main, ["--checkpoint", str(trained), "--data", str(labelled), "--no-mirror", "--eval-size", "72"])
        == 0
    )
    scores = json.load(open(trained.parent / "evaluation" / "scores.json"))
    assert scores["size"] == 72
    assert scores["hungarian"]["pixels"] == 3 * 70 * 72  # two of 72 rows are not labelled


def test_another_backbone_than_that_of_training_is_warned_of(labelled, tmp_path, monkeypatch, capsys):
    (tmp_path / "ours.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    named = ["--backbone", "ours:colours"]
    assert run(train.main, ["--data", str(labelled), "--out", "out", *SMALL, *named]) == 0
    commands = {predict: ["--images", str(labelled / "val" / "images")], evaluate: ["--data", str(labelled)]}
    for content, warned in ((CALLABLE, False), (CALLABLE + "# changed\n", True)):
        (tmp_path / "ours.py").write_text(content)
        for number, (command, args) in enumerate(commands.items()):
            out = ["--out", f"{number} {warned}"]
            assert run(command.main, ["--checkpoint", "out/checkpoint.safetensors", *args, *named, *out]) == 0
            said = (
                "warning: ours:colours is not, weight for weight, the backbone of training" in capsys.readouterr().err
            )
            assert said == warned


def test_evaluate_without_data(labelled, trained, tmp_path, capsys):
    """The demo's images are for checkpoints of the demo alone."""
    settings = dict(size=64, eval_size=64, steps=3, batch_size=4, prototypes=3, progress=False)
    for preset_name in ("folder", "demo"):
        smooseg_fast.fit([draw(n)[0] for n in range(4)], preset_name=preset_name, **settings).save(
            tmp_path / f"{preset_name}.safetensors"
        )
    assert (
        run(train.main, ["--preset", "demo", "--data", str(labelled), "--out", "labelled", *SMALL, "--patches", "20"])
        == 0
    )
    own = read_checkpoint(trained)  # learnt from someone's own labelled datasets, which have no folder
    own.config = dataclasses.replace(own.config, data=None)
    own.write(tmp_path / "own.safetensors")
    others = [
        tmp_path / "labelled" / "checkpoint.safetensors",
        *(tmp_path / f"{name}.safetensors" for name in ("folder", "demo", "own")),
    ]
    for path in (trained, *others):
        capsys.readouterr()
        assert run(evaluate.main, ["--checkpoint", str(path)]) == 2
        assert capsys.readouterr().err.startswith(
            "error: --data: missing; the checkpoint is not of the demo: give a folder with images/"
        )


def test_evaluate_of_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        demo, "demo_datasets", lambda: (Mosaic("train", count=4, size=32), Mosaic("val", count=6, size=32))
    )
    assert run(train.main, ["--out", "out", *SMALL, "--size", "32", "--eval-size", "32", "--patches", "8"]) == 0
    assert run(evaluate.main, ["--checkpoint", "out/checkpoint.safetensors", "--no-mirror"]) == 0
    assert "6 images of mosaic val" in capsys.readouterr().out


def test_evaluate_without_labels(trained, tmp_path, capsys):
    assert run(evaluate.main, ["--checkpoint", str(trained), "--data", str(tmp_path / "set" / "val" / "images")]) == 2
    assert "has no labels" in capsys.readouterr().err
