"""Datasets in their owners' layouts: recognised, listed and read, with errors and notes when something is missing."""

import itertools
import pickle
import re
import shutil
import struct

import numpy as np
import pytest
from owners import (
    COLOURS,
    MAKERS,
    make_cityscapes,
    make_cocostuff,
    make_potsdam_mosaics,
    make_potsdam_tiles,
    make_voc,
    pair,
    save,
)
from PIL import Image
from scipy.io import savemat

from smooseg_fast.datasets import IGNORE, cityscapes, cocostuff, open_dataset, open_splits, potsdam, recognise, voc
from smooseg_fast.datasets.base import Numbering
from smooseg_fast.datasets.images import ImageError, read_image
from smooseg_fast.errors import UserError

FOUND = {
    "cityscapes": ("Cityscapes (leftImg8bit and gtFine labelIds, 27 classes)", "cityscapes", 4, 4, 27),
    "cocostuff": ("COCO-Stuff (images and pixel maps in annotations, 27 classes)", "cocostuff27", 4, 2, 27),
    "potsdam_tiles": ("Potsdam-3 (prepared .mat tiles, 3 classes)", "potsdam", 6, 2, 3),
    "potsdam_mosaics": (
        "Potsdam-3 (mosaics in 2_Ortho_RGB and 5_Labels_for_participants, cut into 200-pixel tiles, 3 classes)",
        "potsdam",
        10,
        2,
        3,
    ),
    "voc": ("PASCAL VOC (VOC2012: JPEGImages and SegmentationClass, 21 classes)", "folder", 2, 2, 21),
}


# every layout


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Every layout once, not to be changed."""
    root = tmp_path_factory.mktemp("owners")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_layout_is_recognised_and_its_splits_opened(trees, name):
    title, preset, images, held_out, classes = FOUND[name]
    layout = recognise(str(trees[name]))
    assert (layout.title, layout.preset) == (title, preset)
    train, val = open_splits(trees[name])
    assert (len(train), len(val)) == (len(train.names), len(val.names)) == (images, held_out)
    assert (train.labelled, val.labelled) == (True, True)
    assert (train.held_out, val.held_out) == (False, True)
    assert len(train.class_names) == len(set(train.class_names)) == classes
    assert train.class_names == val.class_names
    assert not set(train.names) & set(val.names)
    assert train.fingerprint() != val.fingerprint()
    assert open_dataset(trees[name], "val").fingerprint() == val.fingerprint()
    for data in (train, val):
        again = pickle.loads(pickle.dumps(data))  # worker processes get it so
        for index in range(len(data)):
            image, label = data.image(index), data.label(index)
            assert image.dtype == label.dtype == np.uint8
            assert image.shape == (*label.shape, 3)
            assert set(np.unique(label)) <= {*range(classes), IGNORE}
            np.testing.assert_array_equal(again.image(index), image)
    with pytest.raises(ValueError, match="split"):
        open_dataset(trees[name], "test")


@pytest.mark.parametrize("name", ["cityscapes", "cocostuff", "potsdam_tiles", "voc"])
def test_opening_reads_no_image(trees, name, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("opened an image"))
    monkeypatch.setattr("scipy.io.loadmat", lambda *_, **__: pytest.fail("opened a tile"))
    open_splits(trees[name])[0].fingerprint()


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_inside_or_above_a_layout_is_taken_for_one(trees, name):
    for folder in [
        trees[name].parent,
        *(path for path in trees[name].iterdir() if path.is_dir() and path.name != "VOCdevkit"),
    ]:
        assert recognise(folder) is None
    image = next(path for path in trees[name].rglob("*") if path.suffix in (".png", ".jpg", ".tif", ".mat"))
    assert recognise(image) is None


def test_two_layouts_in_one_folder_are_an_error(tmp_path):
    make_voc(make_potsdam_tiles(tmp_path))
    with pytest.raises(
        UserError, match=r"--data .*: looks like Potsdam-3 .* and like PASCAL VOC .*; give each a folder of its own"
    ):
        open_dataset(tmp_path, "train")


def test_numbers_that_an_owner_does_not_have_are_named(tmp_path):
    numbering = Numbering("ours", ("a", "b"), (IGNORE, 0, 1))
    np.testing.assert_array_equal(numbering(np.array([[0, 1, 2, 255, -1]]), tmp_path), [[IGNORE, 0, 1, IGNORE, IGNORE]])
    for value in (3, 6, 254, 260, -2):
        message = rf"x\.png: the number {value} in 1 pixels, which is no class of ours \(0 to 2, and 255"
        with pytest.raises(UserError, match=message):
            numbering(np.array([[1, 2, value]]), "x.png")


# Cityscapes


def test_cityscapes_counts_the_numbers_7_to_33_in_order():
    label = np.arange(34, dtype=np.uint8)[None]
    np.testing.assert_array_equal(cityscapes.NUMBERING(label, "x"), [[IGNORE] * 7 + list(range(27))])
    # some of the owners' table
    for number, name in (
        (7, "road"),
        (11, "building"),
        (17, "pole"),
        (21, "vegetation"),
        (23, "sky"),
        (26, "car"),
        (33, "bicycle"),
    ):
        assert cityscapes.NAMES[number - 7] == name


def test_cityscapes_pairs_by_city_and_frame(trees):
    train = open_dataset(trees["cityscapes"], "train")
    assert train.names[2] == "bochum/bochum_000000_000000_leftImg8bit.png"
    image, label = pair(2, (7, 11))
    label[1] = 3
    np.testing.assert_array_equal(train.image(2), image)
    np.testing.assert_array_equal(train.label(2), np.select([label == 7, label == 11], [0, 4], IGNORE))


def test_cityscapes_as_its_archives_are_often_unpacked(trees, tmp_path):
    for kind in ("leftImg8bit", "gtFine"):
        shutil.copytree(trees["cityscapes"] / kind, tmp_path / f"{kind}_trainvaltest" / kind)
    train, val = open_splits(tmp_path)
    assert (len(train), len(val), val.labelled) == (4, 4, True)


def test_cityscapes_without_some_labels_or_images(tmp_path):
    make_cityscapes(tmp_path)
    (tmp_path / "gtFine/val/lindau/lindau_000000_000001_gtFine_labelIds.png").unlink()
    (tmp_path / "leftImg8bit/train/aachen/aachen_000000_000000_leftImg8bit.png").unlink()
    train, val = open_splits(tmp_path)
    assert len(train) == 3
    labels = "{}/gtFine/{} (*_gtFine_labelIds.png)".format
    stray = "aachen/aachen_000000_000000_gtFine_labelIds.png"
    assert train.notes == (f"1 labels in {labels(tmp_path, 'train')} belong to no image, first {stray}",)
    assert val.label(3) is None
    missing = f"1 of 4 Cityscapes val images have no label in {labels(tmp_path, 'val')}"
    assert val.notes == (f"{missing}, first lindau/lindau_000000_000001_leftImg8bit.png",)
    shutil.rmtree(tmp_path / "gtFine")
    train, val = open_splits(tmp_path)
    assert (train.labelled, train.class_names, val) == (False, None, None)
    assert train.notes[0].startswith("no labels: none of the 3 images of Cityscapes train has one in")
    shutil.rmtree(tmp_path / "leftImg8bit" / "val")
    assert open_dataset(tmp_path, "val").names == train.names
    assert not open_dataset(tmp_path, "val").held_out
    shutil.rmtree(tmp_path / "leftImg8bit" / "train" / "aachen")
    shutil.rmtree(tmp_path / "leftImg8bit" / "train" / "bochum")
    with pytest.raises(
        UserError, match=r"--data .*leftImg8bit/train: has no images of Cityscapes train; unpack them there"
    ):
        open_dataset(tmp_path, "train")


def test_cityscapes_without_images_to_learn_from(tmp_path):
    shutil.rmtree(make_cityscapes(tmp_path) / "leftImg8bit" / "train")
    assert len(open_dataset(tmp_path, "val")) == 4
    with pytest.raises(
        UserError, match=r"--data .*: Cityscapes .* has val and test and train_extra but no images of train; add them"
    ):
        open_dataset(tmp_path, "train")


# COCO-Stuff

# the 27 numbers that the benchmark gives to 0..181, as (number, how often in a row)
PUBLISHED = (
    (9, 1), (11, 8), (8, 6), (7, 10), (6, 8), (10, 10), (5, 8), (2, 10), (3, 10), (0, 6), (1, 6), (4, 8), (17, 2),
    (22, 1), (20, 2), (22, 1), (15, 1), (25, 1), (16, 1), (13, 1), (12, 2), (17, 2), (23, 1), (15, 2), (17, 1),
    (15, 1), (21, 1), (15, 1), (25, 1), (13, 5), (22, 1), (26, 1), (14, 2), (15, 1), (22, 1), (21, 2), (24, 1),
    (20, 1), (22, 1), (15, 1), (17, 1), (16, 1), (15, 1), (22, 1), (24, 1), (21, 1), (17, 1), (25, 1), (16, 1),
    (21, 1), (17, 1), (22, 1), (16, 1), (21, 2), (25, 1), (21, 1), (26, 1), (21, 1), (24, 1), (20, 1), (17, 1),
    (14, 1), (21, 1), (26, 1), (15, 1), (23, 1), (20, 1), (21, 1), (24, 1), (15, 1), (24, 1), (22, 1), (25, 1),
    (15, 1), (20, 1), (17, 2), (22, 1), (14, 1), (18, 7), (26, 2), (19, 2), (24, 1),
)  # fmt: skip


def test_cocostuff_maps_182_numbers_to_27_classes_as_published():
    published = list(itertools.chain.from_iterable([coarse] * times for coarse, times in PUBLISHED))
    assert len(published) == 182
    np.testing.assert_array_equal(cocostuff.NUMBERING(np.arange(182)[None], "x"), [published])
    assert len(cocostuff.FINE) == len(set(cocostuff.FINE)) == 182
    assert set(cocostuff.FINE) == set(cocostuff.COARSE_OF)
    things = [name for name in cocostuff.HIERARCHY if not name.endswith("-stuff")]
    assert (len(things), len(cocostuff.HIERARCHY)) == (12, 27)
    assert {cocostuff.COARSE_OF[name] for name in cocostuff.FINE[:91]} == set(range(12))


def test_cocostuff_takes_the_curated_images_in_the_order_of_the_list(trees):
    train = open_dataset(trees["cocostuff"], "train")
    assert train.names == tuple(f"{number:012d}.jpg" for number in range(100, 104))
    assert train.notes == ()
    _, label = pair(101, (156, 123))
    sky, plants = train.class_names.index("sky-stuff"), train.class_names.index("plant-stuff")
    np.testing.assert_array_equal(train.label(1), np.select([label == 156, label == 123], [sky, plants], IGNORE))


@pytest.mark.parametrize("maps", ["stuffthingmaps", "stuffthingmaps_trainval2017", "annotations/stuffthingmaps"])
@pytest.mark.parametrize("images", ["images", "."])
def test_cocostuff_in_other_folders(trees, tmp_path, maps, images):
    root = tmp_path / "coco"
    for split in ("train2017", "val2017"):
        shutil.copytree(trees["cocostuff"] / "images" / split, root / images / split)
        shutil.copytree(trees["cocostuff"] / "annotations" / split, root / maps / split)
    shutil.copytree(trees["cocostuff"] / "curated", tmp_path / "curated")  # next to the folder
    train, val = open_splits(root)
    assert (len(train), len(val), train.labelled, val.labelled) == (4, 2, True, True)


def test_cocostuff_without_lists_or_maps_or_listed_images(tmp_path):
    root = make_cocostuff(tmp_path / "coco", curated=False)
    train, val = open_splits(root)
    assert (len(train), len(val)) == (5, 3)
    curated = f"{root}/curated/train2017/Coco164kFull_Stuff_Coarse_7.txt"
    images = "all images of train2017, not the benchmark's choice of them"
    assert train.notes == (f"no curated list ({curated}): {images}",)
    lists = root / "curated" / "train2017" / "Coco164kFull_Stuff_Coarse_7.txt"
    lists.parent.mkdir(parents=True)
    lists.write_text("000000000101\n000000000007\n\n000000000100\n000000000101\n000000000008\n")
    train = open_dataset(root, "train")
    assert train.names == ("000000000101.jpg", "000000000100.jpg")
    assert train.notes == (f"2 of 4 images listed in {lists} are not there, first 000000000007",)
    lists.write_text("nowhere\n")
    with pytest.raises(
        UserError, match=r"images/train2017: has no images of COCO-Stuff train that .*7\.txt lists; unpack them there"
    ):
        open_dataset(root, "train")
    shutil.rmtree(root / "annotations")
    assert recognise(root).title == "COCO-Stuff (images without pixel maps, 27 classes)"
    assert not open_dataset(root, "val").labelled
    save(root / "labels" / "train2017" / "000000000100.png", np.zeros((48, 96), np.uint8))
    assert recognise(root) is None  # a labelled folder of somebody's own


def test_cocostuff_with_numbers_of_the_other_convention_is_an_error(tmp_path):
    root = make_cocostuff(tmp_path)
    save(root / "annotations" / "val2017" / "000000000200.png", np.full((48, 96), 182, np.uint8))
    with pytest.raises(
        UserError, match=r"000000000200\.png: the number 182 in 4608 pixels, which is no class of COCO-Stuff"
    ):
        open_dataset(root, "val").label(0)


# Potsdam


def test_potsdam_tiles_lose_their_infrared_and_half_their_classes(trees):
    val = open_dataset(trees["potsdam_tiles"], "val")
    assert val.names == ("6.mat", "7.mat")
    image, label = pair(7, (0, 3), (40, 40))
    label[0] = 5
    np.testing.assert_array_equal(val.image(1), image)
    np.testing.assert_array_equal(
        val.label(1), np.select([label == 0, label == 3], [potsdam.ROAD, potsdam.VEGETATION], potsdam.BUILDING)
    )
    np.testing.assert_array_equal(potsdam.NUMBERING(np.arange(6)[None], "x"), [[0, 1, 2, 2, 0, 1]])
    assert recognise(trees["potsdam_tiles"]).parts["unlabelled"]().label(0) is None


def test_potsdam_tiles_without_lists(tmp_path):
    make_potsdam_tiles(tmp_path)
    (tmp_path / "labelled_train.txt").unlink()
    train, val = open_splits(tmp_path)
    assert (len(train), len(val)) == (7, 2)
    assert not set(train.names) & set(val.names)
    assert train.notes[0] == f"no {tmp_path}/labelled_train.txt: training uses all other tiles"
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    assert len(open_dataset(tmp_path, "train")) == len(open_dataset(tmp_path, "val")) == 9


def test_damaged_tiles_are_named(tmp_path):
    make_potsdam_tiles(tmp_path)
    whole = (tmp_path / "imgs" / "0.mat").read_bytes()
    (tmp_path / "imgs" / "0.mat").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "imgs" / "1.mat").write_bytes(b"no MATLAB file at all")
    savemat(tmp_path / "imgs" / "2.mat", {"image": np.zeros((4, 4, 3), np.uint8)})
    savemat(tmp_path / "imgs" / "3.mat", {"img": np.zeros((4, 4, 3))})
    (tmp_path / "imgs" / "4.mat").write_bytes(
        b"MATLAB 7.3 MAT-file".ljust(124) + struct.pack("<H2s", 0x0200, b"IM") + b"\x89HDF"
    )
    savemat(tmp_path / "gt" / "5.mat", {"gt": np.zeros((40, 41), np.int32)})
    savemat(tmp_path / "gt" / "6.mat", {"gt": np.full((40, 40), 6, np.int32)})
    savemat(tmp_path / "gt" / "7.mat", {"gt": np.full((40, 40), 0.5)})
    train, val = open_splits(tmp_path)
    for index, reason in enumerate(
        ("cannot be read as a MATLAB", "cannot be read as a MATLAB", "holds no img", "img is float64", "7.3 file")
    ):
        with pytest.raises(ImageError, match=rf"imgs/{index}\.mat: .*{reason}"):
            train.image(index)
    with pytest.raises(UserError, match=r"gt/5\.mat: the label is 41 x 40 pixels but .*imgs/5\.mat is 40 x 40"):
        train.label(5)
    with pytest.raises(UserError, match=r"gt/6\.mat: the number 6 in 1600 pixels"):
        val.label(0)
    with pytest.raises(ImageError, match=r"gt/7\.mat: gt is float64"):
        val.label(1)


def whole_mosaic(root, place="2_10"):
    """A mosaic and its classes as the tiles should show them, computed at once."""
    image = read_image(root / "2_Ortho_RGB" / f"top_potsdam_{place}_RGB.tif").astype(int)
    mean = (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2] + 2) // 4
    colours = read_image(root / "5_Labels_for_participants" / f"top_potsdam_{place}_label.tif")[::2, ::2]
    classes = np.full(colours.shape[:2], IGNORE)
    for colour, name in zip(COLOURS, ("roads", "buildings", "vegetation", "trees", "cars", "clutter")):
        classes[(colours == colour).all(axis=2)] = next(
            number for number, names in enumerate(potsdam.NAMES) if name in names
        )
    return mean, classes


def test_mosaics_are_cut_into_tiles_of_half_the_scale(trees):
    root = trees["potsdam_mosaics"]
    train, val = open_splits(root)
    assert {name for data in (train, val) for name in data.names} == {
        f"top_potsdam_{place}_RGB/{row:02d}_{column:02d}.tif"
        for place in ("2_10", "7_7")
        for row in range(2)
        for column in range(3)
    }
    for place in ("2_10", "7_7"):
        mean, classes = whole_mosaic(root, place)
        for data in (train, val):
            for index, name in enumerate(data.names):
                if place in name:
                    row, column = (int(number) * 200 for number in name[-9:-4].split("_"))
                    np.testing.assert_array_equal(data.image(index), mean[row : row + 200, column : column + 200])
                    np.testing.assert_array_equal(data.label(index), classes[row : row + 200, column : column + 200])


def test_a_mosaic_is_decoded_once_for_all_its_tiles(tmp_path, monkeypatch):
    train, val = open_splits(make_potsdam_mosaics(tmp_path))
    decoded, read = [], potsdam.read_colours
    monkeypatch.setattr(potsdam, "read_colours", lambda path: decoded.append(path.name) or read(path))
    for data in (train, val):
        for index in range(len(data)):
            data.image(index)
            data.label(index)
    assert sorted(decoded) == sorted(set(decoded))
    assert len(decoded) == 4


def test_tiles_are_means_of_four_pixels_with_halves_rounded_up(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (801, 403, 3), dtype=np.uint8)
    save(tmp_path / "2_Ortho_RGB" / "top_potsdam_2_10_RGB.tif", pixels)
    corners = pixels[:800, :400].reshape(2, 200, 2, 200, 2, 3).astype(int)
    tiles = open_dataset(tmp_path, "train")
    np.testing.assert_array_equal([tiles.image(0), tiles.image(1)], (corners.sum((2, 4)) + 2) // 4)


def test_infrared_is_not_transparency(trees, tmp_path):
    make_potsdam_mosaics(tmp_path, infrared=True)
    assert "4_Ortho_RGBIR" in recognise(tmp_path).title
    straight, infrared = open_dataset(trees["potsdam_mosaics"], "train"), open_dataset(tmp_path, "train")
    by_name = {name.replace("_RGB/", "_RGBIR/"): straight.image(index) for index, name in enumerate(straight.names)}
    both = [index for index, name in enumerate(infrared.names) if name in by_name]
    assert both
    for index in both:
        np.testing.assert_array_equal(infrared.image(index), by_name[infrared.names[index]])


def test_infrared_multiplied_in_is_refused(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(path)
    entry = struct.pack("<HHI", 338, 3, 1)
    path.write_bytes(path.read_bytes().replace(entry + b"\x02", entry + b"\x01"))
    with pytest.raises(ImageError, match=r"x\.tif: declares its fourth channel as transparency"):
        potsdam.read_colours(path)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    with pytest.raises(ImageError, match=r"x\.tif: an image of mode L"):
        potsdam.read_colours(path)


def test_colours_that_are_a_little_off_still_count(tmp_path):
    make_potsdam_mosaics(tmp_path)
    path = tmp_path / "5_Labels_for_participants" / "top_potsdam_2_10_label.tif"
    before = open_dataset(tmp_path, "train").label(0)
    colours = read_image(path)
    save(path, np.where(colours > 128, colours - 3, colours + 4).astype(np.uint8))
    potsdam._decoded.cache_clear()
    np.testing.assert_array_equal(open_dataset(tmp_path, "train").label(0), before)


def test_mosaics_that_lack_something(tmp_path):
    root = make_potsdam_mosaics(tmp_path)
    labels = root / "5_Labels_for_participants"
    save(labels / "top_potsdam_7_7_label.tif", np.zeros((400, 400, 3), np.uint8))
    train = open_dataset(root, "train")
    assert not [name for name in train.names if "7_7" in name]
    assert train.notes[0].startswith("1 mosaics cannot be used, first ")
    assert re.search(r"7_7_label\.tif: the label is 400 x 400 pixels but .*7_7_RGB\.tif is 1200 x 800", train.notes[0])
    save(root / "2_Ortho_RGB" / "top_potsdam_2_11_RGB.tif", np.zeros((300, 900, 3), np.uint8))
    note = open_dataset(root, "train").notes[0]
    assert note.startswith("2 mosaics cannot be used, first ")
    assert "top_potsdam_2_11_RGB.tif: 900 x 300 pixels, less than a tile of 400 x 400" in note
    (root / "2_Ortho_RGB" / "top_potsdam_2_10_RGB.tif").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"no tiles of 400 x 400 pixels can be cut for train; 3 mosaics cannot be used"):
        open_dataset(root, "train")
    shutil.rmtree(labels)
    train, val = open_splits(root)
    assert (len(train), train.labelled, val) == (12, False, None)


def test_a_broken_mosaic_is_named_by_each_of_its_tiles(tmp_path):
    root = make_potsdam_mosaics(tmp_path)
    path = root / "2_Ortho_RGB" / "top_potsdam_2_10_RGB.tif"
    path.write_bytes(path.read_bytes()[: 10**6])
    train = open_dataset(root, "train")
    with pytest.raises(ImageError, match=r"top_potsdam_2_10_RGB\.tif: cannot be decoded"):
        train.image(0)


# PASCAL VOC


@pytest.mark.parametrize("home", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_from_any_of_its_folders(trees, home):
    train, val = open_splits(trees["voc"] / home)
    assert (train.names, val.names) == (("2007_000000.jpg", "2007_000001.jpg"), ("2007_000002.jpg", "2007_000003.jpg"))
    assert voc.NAMES[15] == "person"
    _, label = pair(2, (0, 15))
    np.testing.assert_array_equal(val.label(0), label)  # the palette's numbers, not its colours


def test_voc_with_trainval_alone(tmp_path):
    root = make_voc(tmp_path)
    lists = root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    for split in ("train", "val"):
        (lists / f"{split}.txt").unlink()
    train, val = open_splits(root)
    assert len(train) == len(val) == 4
    assert not val.held_out
    (lists / "trainval.txt").unlink()
    assert recognise(root) is None
