"""`python -m smooseg_fast.data check`, and the paper's protocol on data in its owner's layout."""

import json
import re
import shutil

import numpy as np
import pytest
from owners import MAKERS, make_cityscapes, make_cocostuff, make_potsdam_tiles, save
from PIL import Image
from test_trainer import SMALL

import smooseg_fast
from smooseg_fast import choose, data, evaluate, predict, train
from smooseg_fast.backbones.auto import Here
from smooseg_fast.command import run
from smooseg_fast.config import PRESETS
from smooseg_fast.datasets import ArrayDataset, open_dataset
from smooseg_fast.datasets.images import cut_squares, whole_patches
from smooseg_fast.datasets.inspection import is_grey


def check(*args):
    return run(data.main, ["check", *map(str, args)])


# check

NEXT = {
    "cityscapes": "--preset cityscapes ",
    "cocostuff": "--preset cocostuff27 ",
    "potsdam_tiles": "--preset potsdam ",
    "potsdam_mosaics": "--preset potsdam ",
    "voc": "",
}


@pytest.mark.parametrize("name", MAKERS)
def test_check_says_what_there_is_and_what_to_type(name, tmp_path, capsys):
    root = MAKERS[name](tmp_path / "my data")
    assert check(root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"data       {root}: ")
    assert any(line.startswith("train ") for line in lines)
    assert any(line.startswith("val ") and ", held out;" in line for line in lines)
    assert lines[-1] == f"next       python -m smooseg_fast.train {NEXT[name]}--data '{root}'"


def test_check_of_cityscapes(tmp_path, capsys):
    root = make_cityscapes(tmp_path)
    assert check(root) == 0
    out = capsys.readouterr().out
    assert "train      4 images; all opened, 4 of them with a label; 96 x 48 pixels\n" in out
    assert "val        4 images, held out; all opened" in out
    assert "also       test: 2 images, not used\n" in out
    assert "also       train_extra: 2 images, not used\n" in out
    table = {re.split("  +", line.strip())[0]: line for line in out.splitlines() if line.endswith("%")}
    shares, ignored = [], []
    for split in ("train", "val"):
        labels = np.stack([open_dataset(root, split).label(index) for index in range(4)])
        shares.append(f"{(labels == 4).sum() / (labels < 255).sum():.2%}")
        ignored.append(f"{(labels == 255).mean():.2%}")
    assert len(table) == 27 + 1
    assert table["4 building"].split()[-2:] == shares
    assert table["not labelled (of all pixels)"].split()[-2:] == ignored
    assert "note       25 classes have no pixel in any label: sidewalk, parking," in out


def test_check_opens_a_sample_and_says_so(tmp_path, capsys):
    root = make_potsdam_tiles(tmp_path)
    assert check(root, "--sample", 3) == 0
    out = capsys.readouterr().out
    assert "train      6 images; 3 opened, 3 of them with a label; 40 x 40 pixels\n" in out
    assert "in 3 labels of train and 2 labels of val (a sample)" in out
    assert check(root, "--sample", 0) == 0
    assert "(a sample)" not in capsys.readouterr().out
    assert check(root, "--sample", -1) == 2
    assert capsys.readouterr().err == "error: --sample: must be at least 0, got -1\n"


def test_check_warns_of_what_a_run_would_skip(tmp_path, capsys):
    root = make_cocostuff(tmp_path)
    (root / "images/train2017/000000000101.jpg").write_bytes(b"damaged")
    save(root / "images/train2017/000000000102.jpg", np.zeros((9, 60, 3), np.uint8))
    (root / "annotations/train2017/000000000103.png").unlink()
    assert check(root) == 0
    out = capsys.readouterr().out
    assert "96 x 48 pixels in 2 of them; from 60 x 9 to 96 x 48\n" in out
    assert "warning    1 of the 4 images of train that were opened cannot be used, first " in out
    assert "000000000101.jpg: not an image of a kind that can be read, or damaged from the start" in out
    assert "(a run skips them)" in out
    assert "warning    1 of the 4 labels of train that were opened cannot be used, first " in out  # the small image's
    assert "(a run does not read them)" in out
    assert "note       1 of 4 COCO-Stuff train images have no label in " in out


def test_check_ends_with_2_where_a_run_would_stop(tmp_path, capsys):
    root = make_cocostuff(tmp_path / "coco")
    save(root / "annotations/val2017/000000000200.png", np.full((48, 96), 200, np.uint8))
    assert check(root) == 2
    out, err = capsys.readouterr()
    assert "next " not in out
    assert err.splitlines()[-1].startswith("error: 1 of the 2 labels of val that were opened cannot be used, first ")
    assert "the number 200 in 4608 pixels" in err
    for path in (root / "images/train2017").iterdir():
        path.write_bytes(b"damaged")
    assert check(root) == 2
    assert "error: 4 of the 4 images of train that were opened cannot be used, first " in capsys.readouterr().err
    assert check(tmp_path / "nowhere") == 2
    assert "no such file or folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert check(tmp_path / "empty") == 2
    assert "no images in it" in capsys.readouterr().err


def test_check_of_what_can_only_be_measured_on_or_only_learnt_from(tmp_path, capsys):
    root = make_cityscapes(tmp_path / "city")
    (root / "leftImg8bit" / "train").rename(tmp_path / "train")
    assert check(root) == 0
    out = capsys.readouterr().out
    assert "has val and test and train_extra but no images of train; add them" in out
    assert out.endswith(
        f"next       python -m smooseg_fast.evaluate --preset cityscapes --checkpoint FILE --data {root}\n"
    )
    (tmp_path / "train").rename(root / "leftImg8bit" / "train")
    shutil.rmtree(root / "leftImg8bit" / "val")
    assert check(root) == 0
    assert (
        "note       no images are kept apart: figures would be taken on the images that are learnt from\n"
        in capsys.readouterr().out
    )


def test_check_without_the_labels_or_with_a_list_of_others(tmp_path, capsys):
    root = make_cocostuff(tmp_path)
    shutil.rmtree(root / "annotations" / "val2017")
    assert check(root) == 0
    out = capsys.readouterr().out
    assert "val        2 images, held out; all opened, 0 of them with a label" in out
    note = f"no labels: none of the 2 images of COCO-Stuff val has one in {root}/annotations/val2017 (*.png)"
    assert out.count(f"note       {note}\n") == 1
    (root / "curated/val2017/Coco164kFull_Stuff_Coarse_7.txt").write_text("1\n2\n")
    assert check(root) == 2
    assert "has no images of COCO-Stuff val that " in (err := capsys.readouterr().err)
    assert "Coco164kFull_Stuff_Coarse_7.txt lists; unpack them there" in err


def test_check_says_when_another_scale_deserves_a_look(tmp_path, capsys):
    for name, shape in (("a", (700, 900)), ("b", (680, 680)), ("c", (200, 300))):
        save(tmp_path / "large" / f"{name}.png", np.zeros((*shape, 3), np.uint8))
        save(tmp_path / "usual" / f"{name}.png", np.zeros((400, 300, 3), np.uint8))
    save(tmp_path / "usual" / "strip.png", np.zeros((40, 170, 3), np.uint8))
    assert check(tmp_path / "large") == 0
    out = capsys.readouterr().out
    assert "scale      fit shrinks the images by 3.0 (short side 680 -> 224 pixels): if what you look for is" in out
    assert f"look       python -m smooseg_fast.data check {tmp_path / 'large'} --pictures FOLDER\n" in out
    assert check(tmp_path / "usual") == 0
    out = capsys.readouterr().out
    assert "fit shrinks" not in out
    assert "scale      1 of 4 images are at least 4 times as long as wide" in out
    (tmp_path / "usual" / "strip.png").unlink()
    assert check(tmp_path / "usual") == 0
    assert "scale " not in capsys.readouterr().out


def test_check_draws_a_few_images_at_three_scales(tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "photos" / "look"
    for number in range(5):
        save(photos / f"{number}.png", np.random.default_rng(number).integers(0, 256, (260, 330, 3), np.uint8))
    assert check(photos, "--pictures", out, "--backbone", "filterbank") == 0
    assert f"saved      {out / 'scales.jpg'}\n" in capsys.readouterr().out
    with Image.open(out / "scales.jpg") as sheet:
        assert sheet.width == 1600
    assert len(open_dataset(photos, "train")) == 5, "the sheet is not taken for a photo"


def test_check_of_folders_that_nobody_owns(folder, labelled, capsys):
    assert check(folder) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"data       {folder}: a folder of images\n"
        "train      6 images; all opened, 0 of them with a label; 96 x 72 pixels\n"
    )
    assert out.endswith(f"next       python -m smooseg_fast.train --data {folder}\n")
    assert check(folder / "0.png") == 0
    assert capsys.readouterr().out.startswith(f"data       {folder}/0.png: an image\ntrain      1 images; all opened")
    (labelled / "train" / "labels" / "1.png").rename(labelled / "train" / "labels" / "one.png")
    assert check(labelled) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"data       {labelled}: a folder of images with labels\n")
    assert f"note       1 of 5 set/train images have no label in {labelled}/train/labels (*.png), first 1.png\n" in out
    assert f"note       1 labels in {labelled}/train/labels (*.png) belong to no image, first one.png\n" in out


def test_the_data_command_without_a_command(folder, capsys):
    assert run(data.main, []) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("usage: python -m smooseg_fast.data [-h] COMMAND ...\n")
    assert "\n    check       tell what DIR" in listed
    assert run(data.main, ["cheek", "x"]) == 2
    assert capsys.readouterr().err == (
        "error: cheek: is not a command of python -m smooseg_fast.data; did you mean check\n"
    )
    assert run(data.main, [str(folder)]) == 2
    assert capsys.readouterr().err.endswith(f"did you mean python -m smooseg_fast.data check {folder}\n")
    assert run(data.main, ["check"]) == 2
    assert capsys.readouterr().err.startswith("error: DIR: missing; ")


# the paper's protocol


@pytest.fixture
def city(tmp_path, monkeypatch, capsys):
    """Cityscapes, and in out/ a run of two steps on it with a small size, with what it printed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root = make_cityscapes(tmp_path / "cityscapes")
    assert (
        run(
            train.main,
            ["--data", str(root), "--out", "out", *SMALL, "--steps", "2", "--crops", "five", "--granularity", "0.06"],
        )
        == 0
    )
    (tmp_path / "out" / "printed.txt").write_text(capsys.readouterr().out)
    return root


def test_training_and_the_protocol_on_cityscapes(city, capsys):
    printed = open("out/printed.txt").read()
    assert (
        "\ndata       Cityscapes (leftImg8bit and gtFine labelIds, 27 classes); the paper's settings for it are --pre"
        in printed
    )
    assert (
        f"predict --checkpoint out/checkpoint.safetensors --images {city}/leftImg8bit/val --out"
        in printed.splitlines()[-1]
    )
    assert "features   20 squares of 4 images" in printed
    assert "learning   groups by a tree of 64 fine ones" in printed
    assert (
        run(
            evaluate.main, ["--preset", "cityscapes", "--checkpoint", "out/checkpoint.safetensors", "--data", str(city)]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "4 images of Cityscapes val" in printed
    assert re.search(r"320 px, mirror averaged; \d+ groups, 27 classes", printed)
    scores = json.load(open("out/evaluation/scores.json"))
    assert (scores["preset"], scores["size"], scores["mirror"], scores["images"], scores["held_out"]) == (
        "cityscapes",
        320,
        True,
        4,
        True,
    )
    val = open_dataset(city, "val")
    truth = np.stack([cut_squares(val.label(index), 320, "center")[0][1] for index in range(4)])
    confusion = np.array(scores["confusion"])
    assert confusion.shape == (scores["groups"], 27)
    np.testing.assert_array_equal(confusion.sum(0), np.bincount(truth[truth < 255], minlength=27))


def test_the_protocol_gives_the_labels_of_the_mirror_averaged_square(city):
    """Against images segmented one at a time."""
    checkpoint = "out/checkpoint.safetensors"
    assert (
        run(
            evaluate.main,
            ["--preset", "cityscapes", "--checkpoint", checkpoint, "--data", str(city), "--eval-size", "64"],
        )
        == 0
    )
    counts = np.array(json.load(open("out/evaluation/scores.json"))["confusion"])
    expected, val = np.zeros_like(counts), open_dataset(city, "val")
    segmenter = smooseg_fast.Segmenter.load(checkpoint, device="cpu")
    for index in range(4):
        square, truth = (cut_squares(pixels, 64, "center")[0][1] for pixels in (val.image(index), val.label(index)))
        guess = segmenter.predict(square, mirror=True, short_side=64, refine="none")  # as the protocol has it
        np.add.at(expected, (guess[truth < 255], truth[truth < 255]), 1)
    # the store keeps features in fp16: a pixel on a border may fall to the other side
    assert np.abs(counts - expected).sum() <= 0.01 * expected.sum()


def test_the_protocol_of_another_dataset_is_refused(city, tmp_path, capsys):
    args = ["--checkpoint", "out/checkpoint.safetensors", "--data"]
    tiles = make_potsdam_tiles(tmp_path / "tiles")
    assert run(evaluate.main, ["--preset", "cityscapes", *args, str(tiles)]) == 2
    title = "Potsdam-3 (prepared .mat tiles, 3 classes)"
    assert capsys.readouterr().err.endswith(
        f"error: --preset cityscapes: but {tiles} is {title}; give --preset potsdam\n"
    )
    assert run(evaluate.main, ["--preset", "city", *args, str(city)]) == 2
    assert "error: --preset: 'city' is not known; choose one of" in capsys.readouterr().err
    shutil.rmtree(tiles / "gt")
    assert run(evaluate.main, ["--preset", "potsdam", *args, str(tiles)]) == 2
    assert (
        f"has no labels (no labels: none of the 2 images of Potsdam-3 val has one in {tiles}/gt (*.mat)); evaluation"
        in capsys.readouterr().err
    )


def test_tiles_that_predict_cannot_open_leave_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiles = make_potsdam_tiles(tmp_path / "tiles")
    assert run(train.main, ["--data", str(tiles), "--out", "out", *SMALL, "--steps", "1"]) == 0
    assert (
        "next       python -m smooseg_fast.predict --checkpoint out/checkpoint.safetensors --images out/samples"
        in capsys.readouterr().out
    )
    np.testing.assert_array_equal(np.asarray(Image.open("out/samples/7.png")), open_dataset(tiles, "val").image(1))
    assert run(choose.main, ["--run", "out", "--groups", "2"]) == 0
    assert "--images out/samples" in capsys.readouterr().out


def test_predict_asks_for_the_pictures_of_a_layout(city, capsys):
    assert (
        run(predict.main, ["--checkpoint", "out/checkpoint.safetensors", "--images", str(city), "--out", "made"]) == 2
    )
    assert f"--images {city}: is Cityscapes (leftImg8bit and gtFine labelIds, 27 classes), which holds more than" in (
        err := capsys.readouterr().err
    )
    assert err.endswith(f"; give {city}/leftImg8bit/val\n")


def test_sizes_of_the_protocol():
    assert [PRESETS[name].eval_size for name in ("cityscapes", "cocostuff27", "potsdam")] == [320, 320, 224]
    assert [PRESETS[name].crops for name in ("cityscapes", "cocostuff27", "potsdam")] == ["five", "five", "center"]
    assert [whole_patches(320, patch) for patch in (8, 16, 14, 1000)] == [320, 320, 322, 1000]


def test_what_is_missing_is_said_by_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root = make_cocostuff(tmp_path / "coco", curated=False)
    (root / "annotations/val2017/000000000201.png").unlink()
    assert run(train.main, ["--data", str(root), "--out", "out", *SMALL, "--steps", "1", "--granularity", "0.06"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("data       no curated list (") == 2
    assert "data       1 of 3 COCO-Stuff val images have no label in" in printed
    assert Image.open("out/groups.png").width > 100


def test_grey_images_are_told_from_coloured_ones():
    grey = np.random.default_rng(0).integers(0, 256, (64, 64, 1), dtype=np.uint8).repeat(3, axis=2)
    noisy = np.clip(grey.astype(int) + np.random.default_rng(1).integers(-1, 2, (64, 64, 3)), 0, 255).astype(np.uint8)
    red = grey.copy()
    red[..., 0] //= 2
    assert is_grey(ArrayDataset([grey, noisy, red]))  # most are
    assert not is_grey(ArrayDataset([grey, red, red]))


def test_pictures_of_scales_take_the_features_that_training_takes(tmp_path, monkeypatch, capsys):
    """For grey images the built-in ones, though the wheel is there."""
    monkeypatch.setattr("smooseg_fast.backbones.auto.look", lambda: Here(wheel=True))
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    (tmp_path / "grey").mkdir()
    Image.fromarray(grey).save(tmp_path / "grey" / "a.png")
    assert check(tmp_path / "grey", "--pictures", tmp_path / "out") == 0
    assert "backbone   filterbank (best for grey images)" in capsys.readouterr().out
