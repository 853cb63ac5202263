"""Tests the meaning of numbers and colours in label files, from reading them to what a run says and measures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_trainer import SMALL
from textures import draw

from smooseg_fast import data, evaluate, train
from smooseg_fast.command import run
from smooseg_fast.datasets import IGNORE, labels, open_dataset, open_splits
from smooseg_fast.datasets.images import ImageError
from smooseg_fast.datasets.masks import read_mask
from smooseg_fast.errors import UserError
from smooseg_fast.segment.checkpoint import read_checkpoint

SHAPE = (48, 64)
COLOURS = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0), (255, 255, 255)], np.uint8)


def columns(*values: int, dtype=np.uint8) -> np.ndarray:
    """[48,64] in equal vertical stripes."""
    return np.array(values, dtype)[np.arange(SHAPE[1]) * len(values) // SHAPE[1]][None].repeat(SHAPE[0], 0)


def labelled(root: Path, *masks: np.ndarray | Image.Image, suffix: str = ".png", split: str = "") -> Path:
    for seed, mask in enumerate(masks):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(seed, *SHAPE)[0]).save(root / split / "images" / f"{seed}.png")
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        image.save(root / split / "labels" / f"{seed}{suffix}")
    return root


def check(*args) -> int:
    return run(data.main, ["check", *map(str, args)])


# numbers

FOUND = {  # values in the labels, what they become, names of the classes, notes
    "usual": ((0, 1, 2), (0, 1, 2), "class 0,class 1,class 2", []),
    "with ignore": ((0, 1, 255), (0, 1, IGNORE), "class 0,class 1", ["255 counts as not labelled"]),
    "from 1": (
        (1, 2, 3),
        (0, 1, 2),
        "class 1,class 2,class 3",
        ["the labels hold the numbers 1, 2 and 3, which become classes 0 to 2; 1 number below 3 in no label"],
    ),
    "black and white": (
        (0, 255),
        (0, 1),
        "class 0,class 255",
        ["the labels hold 0 and 255 alone: two classes, of which 255 becomes class 1"],
    ),
    "three greys": (
        (0, 128, 255),
        (0, 1, 2),
        "class 0,class 128,class 255",
        [
            "the labels hold the numbers 0, 128 and 255, which become classes 0 to 2; 253 numbers below 255 in no "
            "label",
            "255 is a class; where it marks pixels without a label, add --ignore 255",
        ],
    ),
    "greys without white": (
        (0, 63, 127, 191, 254),
        (0, 1, 2, 3, 4),
        "class 0,class 63,class 127,class 191,class 254",
        [
            "the labels hold the numbers 0, 63, 127, 191 and 254, which become classes 0 to 4; 250 numbers below 254 "
            "in no label"
        ],
    ),
    "gaps": (
        (0, 2, 5, 255),
        (0, 1, 2, IGNORE),
        "class 0,class 2,class 5",
        [
            "the labels hold the numbers 0, 2 and 5, which become classes 0 to 2; 3 numbers below 5 in no label",
            "255 counts as not labelled",
        ],
    ),
}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize("name", FOUND)
def test_numbers_in_use_become_classes(name, suffix, tmp_path):
    values, classes, names, notes = FOUND[name]
    half = len(values) // 2  # no label holds all values
    masks = columns(*values[:half], values[0]), columns(*values[half:], values[0])
    dataset = open_dataset(labelled(tmp_path, *masks, suffix=suffix), "train")
    assert dataset.class_names == tuple(names.split(","))
    assert dataset.label_notes == tuple(notes)
    np.testing.assert_array_equal(dataset.label(0), columns(*classes[:half], classes[0]))
    np.testing.assert_array_equal(dataset.label(1), columns(*classes[half:], classes[0]))


def test_255_is_ignored_as_soon_as_one_label_holds_another_number(tmp_path):
    root = labelled(tmp_path, columns(0, 255), columns(0, 255), columns(0, 1))
    assert open_dataset(root, "train").label(0)[0, [0, -1]].tolist() == [0, IGNORE]


@pytest.mark.parametrize("split", ["train", "val"])
def test_all_splits_share_their_classes(split, tmp_path):
    labelled(tmp_path, columns(0, 255), split="train")
    labelled(tmp_path, columns(0, 128), split="val")
    train, val = open_splits(tmp_path)
    assert train.class_names == val.class_names == ("class 0", "class 128", "class 255")
    for dataset, last in ((train, 2), (val, 1), (open_dataset(tmp_path, split), 2 if split == "train" else 1)):
        assert dataset.label(0)[0, [0, -1]].tolist() == [0, last]
    assert open_dataset(tmp_path / split, split).class_names == train.class_names


def test_ignored_numbers_are_no_classes(tmp_path):
    root = labelled(tmp_path, columns(0, 1, 2, 255))
    dataset = open_dataset(root, "train", ignore=[0, 9])
    assert dataset.class_names == ("class 1", "class 2")
    np.testing.assert_array_equal(dataset.label(0), columns(IGNORE, 0, 1, IGNORE))
    assert dataset.label_notes == (
        "--ignore 9: in no label",
        "the labels hold the numbers 1 and 2, which become classes 0 and 1",
        "0 and 255 count as not labelled",
    )
    grey = open_dataset(labelled(tmp_path / "grey", columns(0, 128, 255)), "train", ignore=[255])
    np.testing.assert_array_equal(grey.label(0), columns(0, 1, IGNORE))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_numbers_of_more_than_8_bits(dtype, tmp_path):
    void = 65535 if dtype is np.uint16 else -1
    masks = columns(5, 1005, void, dtype=dtype), columns(5, 1005, 70, dtype=dtype)
    dataset = open_dataset(labelled(tmp_path, *masks, suffix=".tif"), "train")
    assert dataset.class_names == ("class 5", "class 70", "class 1005")
    np.testing.assert_array_equal(dataset.label(0), columns(0, 2, IGNORE))
    np.testing.assert_array_equal(dataset.label(1), columns(0, 2, 1))


def test_fractions_are_no_classes(tmp_path):
    Image.fromarray(columns(0, 1).astype(np.float32)).save(tmp_path / "whole.tif")
    Image.fromarray(columns(0, 1).astype(np.float32) / 2).save(tmp_path / "half.tif")
    assert np.unique(read_mask(tmp_path / "whole.tif").numbers).tolist() == [0, 1]
    with pytest.raises(ImageError, match=r"half\.tif: a label with fractions"):
        read_mask(tmp_path / "half.tif")


# classes.txt


def test_classes_txt_names_numbers_and_excludes_others(tmp_path):
    root = labelled(tmp_path, columns(0, 2, 255), columns(0, 3))
    (root / "classes.txt").write_text("a\nb\nc\n")
    dataset = open_dataset(root, "train")
    assert dataset.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(dataset.label(0), columns(0, 2, IGNORE))
    with pytest.raises(UserError, match=r"labels/1\.png: the number 3 in 1536 pixels, which is no class of .*classes"):
        dataset.label(1)
    np.testing.assert_array_equal(open_dataset(root, "train", ignore=[3]).label(1), columns(0, IGNORE))


@pytest.mark.parametrize("values", [(0, 255), (0, 128, 255), (0, 100, 200)])
def test_classes_txt_names_grey_values_in_their_order(values, tmp_path):
    root = labelled(tmp_path, columns(*values))
    names = ("wall", "fence", "sky")[: len(values)]
    (root / "classes.txt").write_text("\n".join(names))
    dataset = open_dataset(root, "train")
    assert dataset.class_names == names
    np.testing.assert_array_equal(dataset.label(0), columns(*range(len(values))))
    listed = ", ".join(f"{value} {name}" for value, name in zip(values[:-1], names)) + f" and {values[-1]} {names[-1]}"
    assert (
        dataset.label_notes[0]
        == f"the values in the labels take the names of {root / 'classes.txt'} in order: {listed}"
    )


# colours and palettes


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_each_colour_is_a_class(mode, tmp_path):
    masks = [Image.fromarray(COLOURS[columns(*numbers)]).convert(mode) for numbers in ((0, 1), (2, 3))]
    dataset = open_dataset(labelled(tmp_path, *masks), "train")
    assert dataset.class_names == ("#000000", "#008000", "#800000", "#ffffff")
    np.testing.assert_array_equal(dataset.label(0), columns(0, 2))
    np.testing.assert_array_equal(dataset.label(1), columns(1, 3))
    assert dataset.label_notes == ("the labels hold colours, each a class: #000000, #008000, #800000 and #ffffff",)
    without_black = open_dataset(tmp_path, "train", ignore=[0])
    np.testing.assert_array_equal(without_black.label(0), columns(IGNORE, 1))


def test_greys_in_three_channels_are_numbers(tmp_path):
    masks = [columns(*numbers)[..., None].repeat(3, 2) for numbers in ((0, 1, 255), (2, 0, 1))]
    dataset = open_dataset(labelled(tmp_path, *masks), "train")
    assert dataset.class_names == ("class 0", "class 1", "class 2")
    np.testing.assert_array_equal(dataset.label(0), columns(0, 1, IGNORE))


def with_palette(numbers: np.ndarray, colours: np.ndarray) -> Image.Image:
    image = Image.fromarray(numbers)
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif"])
def test_indices_of_one_palette_are_the_numbers(suffix, tmp_path):
    palette = np.random.default_rng(0).integers(0, 256, (256, 3))
    masks = [with_palette(columns(*numbers), palette) for numbers in ((0, 1), (1, 2))]
    dataset = open_dataset(labelled(tmp_path, *masks, suffix=suffix), "train")
    if suffix != ".gif":  # where palettes are sorted anew
        assert dataset.class_names == ("class 0", "class 1", "class 2")
    first, second = dataset.label(0), dataset.label(1)
    assert len(np.unique(np.concatenate([first, second]))) == 3
    assert first[0, -1] == second[0, 0] != first[0, 0]


def test_where_palettes_differ_the_colours_count(tmp_path):
    masks = with_palette(columns(0, 1), COLOURS[[1, 0]]), with_palette(columns(0, 1), COLOURS[[0, 2]])
    dataset = open_dataset(labelled(tmp_path, *masks), "train")
    assert dataset.class_names == ("#000000", "#008000", "#800000")
    np.testing.assert_array_equal(dataset.label(0), columns(2, 0))
    np.testing.assert_array_equal(dataset.label(1), columns(0, 1))
    assert dataset.label_notes[0] == "palettes differ from label to label, so the colours count and not their numbers"


@pytest.mark.parametrize("white", [1, 255])
def test_masks_of_one_bit(white, tmp_path):
    bits = Image.fromarray(columns(0, 255)).convert("1")
    assert open_dataset(labelled(tmp_path / "alone", bits), "train").class_names == ("class 0", "class 1")
    mixed = open_dataset(labelled(tmp_path / "mixed", bits, columns(0, white)), "train")
    for index in range(2):
        np.testing.assert_array_equal(mixed.label(index), columns(0, 1))


def test_kinds_that_do_not_go_together_are_refused(tmp_path):
    labelled(tmp_path, with_palette(columns(0, 1), COLOURS), columns(0, 1))
    with pytest.raises(
        UserError, match=r"labels of different kinds \(1 8-bit grey, 1 with a palette\); save all in one"
    ):
        _ = open_dataset(tmp_path, "train").class_names


# a value that was not looked up


@pytest.mark.parametrize("kind", ["numbers", "colours"])
def test_a_value_met_later_is_ignored_and_said_once(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(labels, "SAMPLED", 2)
    numbers = columns(0, 1), columns(0, 3), columns(0, 1), columns(0, 1)  # 0 and 2 are looked up
    root = labelled(tmp_path, *(mask if kind == "numbers" else COLOURS[mask] for mask in numbers))
    dataset = open_dataset(root, "train")
    assert len(dataset.class_names) == 2
    assert dataset.label_notes[-1] == "by 2 of 4 labels, evenly spaced"
    for _ in range(2):
        np.testing.assert_array_equal(dataset.label(1), columns(0, IGNORE))
    value = "3" if kind == "numbers" else "#ffffff"
    assert capsys.readouterr().err == (
        f"{root}/labels/1.png: {value} in 1536 pixels, in no label that was looked up before: not counted here; write "
        "classes.txt to count all numbers\n"
    )


# what a run says, and refuses


@pytest.fixture
def binary(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    masks = [draw(seed, *SHAPE)[1] * 255 for seed in range(4)]
    for mask in masks:
        mask[:12] = 0
    return labelled(tmp_path / "set", *masks)


def test_a_run_says_what_it_took_and_evaluation_takes_the_same(binary, capsys):
    lines = (
        "labels     the labels hold 0 and 255 alone: two classes, of which 255 becomes class 1\n"
        "classes    2; share of the labelled pixels in all 4 labels of train"
    )
    truth = np.stack([open_dataset(binary, "val").label(index) for index in range(4)])
    shares = [f"{(truth == number).mean():.1%}" for number in (0, 1)]
    assert run(train.main, ["--data", str(binary), "--out", "out", *SMALL]) == 0
    out = capsys.readouterr().out
    assert f"{lines}: class 0 {shares[0]}, class 255 {shares[1]}; not labelled 0.0% of all pixels\n" in out
    assert out.index("classes    ") < out.index("features   ")
    assert read_checkpoint(Path("out/checkpoint.safetensors")).class_names == ("class 0", "class 255")
    assert check(binary) == 0
    assert lines in capsys.readouterr().out
    assert run(evaluate.main, ["--checkpoint", "out/checkpoint.safetensors", "--data", str(binary), "--whole"]) == 0
    assert lines in capsys.readouterr().out
    confusion = np.array(json.load(open("out/evaluation/scores.json"))["confusion"])
    np.testing.assert_array_equal(confusion.sum(0), np.bincount(truth.ravel()))


def test_the_checkpoint_keeps_what_is_ignored(binary, capsys):
    for path in (binary / "labels").iterdir():
        mask = np.array(Image.open(path)) // 255
        mask[:6] = 2
        Image.fromarray(mask).save(path)
    assert run(train.main, ["--data", str(binary), "--out", "out", *SMALL, "--ignore", "2", "7"]) == 0
    out = capsys.readouterr().out
    assert "labels     --ignore 7: in no label\nlabels     2 counts as not labelled\nclasses    2;" in out
    assert read_checkpoint(Path("out/checkpoint.safetensors")).config.ignore == (2, 7)
    args = ["--checkpoint", "out/checkpoint.safetensors", "--data", str(binary), "--whole"]
    for more, classes in (([], 2), (["--ignore", "7"], 3)):
        assert run(evaluate.main, [*args, *more]) == 0
        confusion = np.array(json.load(open("out/evaluation/scores.json"))["confusion"])
        assert confusion.shape[1] == classes
        assert confusion.sum() == 4 * (48 - 6 * (classes == 2)) * 64
    assert run(train.main, ["--data", str(binary), "--out", "out", *SMALL, "--ignore", "-1"]) == 2
    assert "--ignore: must be at least 0, got -1" in capsys.readouterr().err


def photo_of(seed: int) -> np.ndarray:
    return draw(seed, *SHAPE)[0]


REFUSED = {
    "one class": ([columns(0, 0)] * 2, "is of one class, class 0, so a score would say nothing; label two classes"),
    "one class and ignore": ([columns(1, 255)] * 2, "is of one class, class 1, so a score would say nothing"),
    "all ignored": ([columns(255)] * 2, "every pixel of every label is 255 (ignore); write class numbers from 0"),
    "photos": ([photo_of(1), photo_of(2)], "2 of 2 labels hold more values than classes have, as photos do (up to "),
    "grey photos": ([photo_of(1)[..., 0]] * 2, "2 of 2 labels hold more values than classes have, as photos do"),
    "numbers of objects": (
        [columns(*range(n, n + 32), dtype=np.uint16) for n in range(0, 320, 32)],
        "the labels hold 320 different values, which are no classes but a photo's, smoothed borders, or numbers of",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_labels_that_would_give_a_meaningless_score_are_refused_before_the_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    masks, message = REFUSED[name]
    root = labelled(tmp_path / "set", *masks)
    for command in ([*map(str, ("--data", root, "--out", tmp_path / "out")), *SMALL], None):
        assert (check(root) if command is None else run(train.main, command)) == 2
        out, err = capsys.readouterr()
        assert message in err.splitlines()[-1]
        assert "features   " not in out
        assert err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()
