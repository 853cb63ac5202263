import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smooseg_fast.datasets import IGNORE, ArrayDataset, labels, open_dataset, open_splits
from smooseg_fast.datasets.images import ImageError
from smooseg_fast.errors import UserError


def write(path: Path, pixels: np.ndarray | int = 0, size: tuple[int, int] = (6, 8)) -> Path:
    """An image (three channels) or a label (a number or two dimensions), [H,W] as `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(size, pixels, np.uint8) if isinstance(pixels, int) else pixels
    Image.fromarray(pixels).save(path)
    return path


def picture(value: int = 0, size: tuple[int, int] = (6, 8)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def labelled(folder: Path, stems: list[str], label: int = 0) -> Path:
    for number, stem in enumerate(stems):
        write(folder / "images" / f"{stem}.png", picture(number))
        write(folder / "labels" / f"{stem}.png", label)
    return folder


# plain folders


def test_a_plain_folder_in_any_nesting(tmp_path):
    write(tmp_path / "b" / "c" / "2.png", picture(2))
    write(tmp_path / "a.jpg", picture(1))
    write(tmp_path / ".thumbnails" / "a.png", picture(9))
    data = open_dataset(tmp_path, "train")
    assert data.names == ("a.jpg", "b/c/2.png")
    assert len(data) == 2
    assert (data.image(1) == 2).all()
    assert data.label(0) is None
    assert not data.labelled
    assert data.class_names is None
    assert sum(label is None for label in data.labels) == 2
    assert data.name == tmp_path.name


def test_both_splits_of_a_plain_folder_are_the_same_images(tmp_path):
    write(tmp_path / "a.png", picture())
    train, val = open_dataset(str(tmp_path), "train"), open_dataset(str(tmp_path), "val")
    assert train.names == val.names
    assert train.fingerprint() == val.fingerprint()
    assert not val.held_out


def test_images_without_labels_next_to_them_are_a_plain_folder(tmp_path):
    write(tmp_path / "images" / "a.png", picture())
    data = open_dataset(tmp_path, "train")
    assert data.names == ("images/a.png",)
    assert not data.labelled


def test_a_single_file_is_a_dataset_of_one(tmp_path):
    data = open_dataset(write(tmp_path / "a.png", picture(5)), "train")
    assert data.names == ("a.png",)
    assert (data.image(0) == 5).all()


def test_a_lone_train_folder_among_others_is_no_split(tmp_path):
    for name in ("train", "plane"):
        write(tmp_path / name / "1.png", picture())
    assert open_dataset(tmp_path, "train").names == ("plane/1.png", "train/1.png")


@pytest.mark.parametrize("other", ["val", "test"])
def test_plain_splits(tmp_path, other):
    write(tmp_path / "train" / "1.png", picture())
    write(tmp_path / other / "2.png", picture())
    train, val = open_dataset(tmp_path, "train"), open_dataset(tmp_path, "val")
    assert (train.names, train.held_out) == (("1.png",), False)
    assert (val.names, val.held_out) == (("2.png",), True)
    assert val.name == f"{tmp_path.name}/{other}"


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"--data .*nowhere: no such file or folder"):
        open_dataset(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"--data .*: no images in it"):
        open_dataset(tmp_path, "train")
    write(tmp_path / "train" / "1.png", picture())
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=r"--data .*val: no images in it"):
        open_dataset(tmp_path, "val")
    with pytest.raises(ValueError, match="split"):
        open_dataset(tmp_path, "validation")


# the labelled layout


def test_labels_are_matched_by_relative_path_and_stem(tmp_path):
    write(tmp_path / "images" / "x" / "a.b.jpg", picture(1))
    write(tmp_path / "images" / "y" / "a.b.png", picture(2))
    write(tmp_path / "images" / "z.png", picture(3))
    write(tmp_path / "labels" / "x" / "a.b.png", 4)
    write(tmp_path / "labels" / "y" / "a.b.PNG", 5)
    write(tmp_path / "labels" / ".z.png", 6)
    data = open_dataset(tmp_path, "train")
    assert data.names == ("x/a.b.jpg", "y/a.b.png", "z.png")
    assert [None if (label := data.label(i)) is None else int(label[0, 0]) for i in range(3)] == [0, 1, None]
    assert data.class_names == ("class 4", "class 5")
    assert data.labelled
    assert sum(label is None for label in data.labels) == 1


@pytest.mark.parametrize("other", ["val", "test"])
def test_labelled_splits_share_the_classes_above_them(tmp_path, other):
    labelled(tmp_path / "train", ["1", "2"])
    labelled(tmp_path / other, ["3"])
    (tmp_path / "classes.txt").write_text("sky\n\n  road works  \n\n")
    train, val = open_dataset(tmp_path, "train"), open_dataset(tmp_path, "val")
    assert (train.names, val.names) == (("1.png", "2.png"), ("3.png",))
    assert (train.held_out, val.held_out) == (False, True)
    assert train.class_names == val.class_names == ("sky", "road works")
    assert open_dataset(tmp_path / other, "val").class_names == (
        "sky",
        "road works",
    )  # the split itself given as the folder


def test_val_is_preferred_to_test(tmp_path):
    for split in ("train", "val", "test"):
        labelled(tmp_path / split, [split])
    assert open_dataset(tmp_path, "val").names == ("val.png",)


def test_without_a_held_out_split_val_is_train(tmp_path):
    labelled(tmp_path / "train", ["1"])
    val = open_dataset(tmp_path, "val")
    assert (val.names, val.held_out) == (("1.png",), False)


def test_unlabelled_training_images_with_labelled_validation(tmp_path):
    write(tmp_path / "train" / "images" / "1.png", picture())
    labelled(tmp_path / "val", ["2"])
    train, val = open_dataset(tmp_path, "train"), open_dataset(tmp_path, "val")
    assert not train.labelled
    assert val.labelled
    images, held_out = open_splits(tmp_path)
    assert (images.names, held_out.names, held_out.held_out) == (("images/1.png",), ("2.png",), True)


def test_splits_without_labels_have_no_validation(tmp_path):
    write(tmp_path / "train" / "1.png", picture())
    (tmp_path / "val").mkdir()  # empty, which is no matter as nothing is looked for in it
    images, held_out = open_splits(tmp_path)
    assert (images.names, held_out) == (("1.png",), None)
    assert open_splits(tmp_path / "train" / "1.png")[1] is None


def test_labelled_images_without_splits_are_their_own_validation(tmp_path):
    images, held_out = open_splits(labelled(tmp_path, ["1", "2"]))
    assert images.names == held_out.names
    assert not held_out.held_out


def test_training_on_a_folder_that_has_only_val_is_an_error(tmp_path):
    labelled(tmp_path / "val", ["1"])
    assert open_dataset(tmp_path, "val").held_out
    with pytest.raises(UserError, match=r"--data .*: has val but no train folder"):
        open_dataset(tmp_path, "train")


def test_two_images_of_one_stem_share_their_label(tmp_path):
    labelled(tmp_path, ["x/a"], label=3)
    write(tmp_path / "images" / "x" / "a.jpg", picture())
    data = open_dataset(tmp_path, "train")
    assert data.names == ("x/a.jpg", "x/a.png")
    assert data.labels == (tmp_path / "labels" / "x" / "a.png",) * 2
    assert data.class_names == ("class 3",)
    assert (data.label(0) == 0).all()
    assert (data.label(1) == 0).all()


def test_labels_that_belong_to_no_image_are_an_error(tmp_path):
    write(tmp_path / "images" / "a.jpg", picture())
    write(tmp_path / "labels" / "b.png")
    with pytest.raises(UserError, match=r"labels: no label belongs to any image; that of a\.jpg would be a\.png"):
        open_dataset(tmp_path, "train")


# labels and classes


def test_a_label_of_another_size_is_named_with_both_sizes(tmp_path):
    labelled(tmp_path, ["a"])
    write(tmp_path / "labels" / "a.png", size=(7, 8))
    with pytest.raises(UserError, match=r"labels/a\.png: the label is 8 x 7 pixels but .*images/a\.png is 8 x 6; "):
        open_dataset(tmp_path, "train").label(0)


def test_the_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in (("upright", (8, 6)), ("as-stored", (6, 8))):
        write(tmp_path / "labels" / f"{name}.png", 1, size=size)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(picture()).save(tmp_path / "images" / f"{name}.jpg", exif=exif)
    data = open_dataset(tmp_path, "train")
    assert data.label(1).shape == (8, 6) == data.image(1).shape[:2]
    with pytest.raises(UserError, match=r"as-stored\.png: the label is 8 x 6 pixels but .* is 6 x 8"):
        data.label(0)


def test_a_class_number_above_the_classes_is_named_with_the_file(tmp_path):
    labelled(tmp_path, ["a", "b"], label=2)
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree\n")
    wrong = np.full((6, 8), IGNORE, np.uint8)
    wrong[0, :4] = 2
    write(tmp_path / "labels" / "a.png", wrong)
    data = open_dataset(tmp_path, "train")
    np.testing.assert_array_equal(data.label(0), wrong)  # 255 and the last class are fine
    wrong[1, :3], wrong[1, 3] = 3, 9
    write(tmp_path / "labels" / "a.png", wrong)
    message = r"labels/a\.png: the number 9 in 4 pixels, which is no class of .*classes\.txt \(0 to 2, and 255"
    with pytest.raises(UserError, match=message):
        data.label(0)


def test_without_classes_txt_the_numbers_of_all_splits_are_looked_up_once(tmp_path, monkeypatch, capsys):
    labelled(tmp_path / "train", ["1", "2"], label=4)
    labelled(tmp_path / "val", ["3"], label=6)
    write(tmp_path / "val" / "labels" / "3.png", np.array([[6, 255]], np.uint8))
    write(tmp_path / "val" / "images" / "3.png", picture(size=(1, 2)))
    train, val = open_splits(tmp_path)
    assert capsys.readouterr() == ("", "")
    assert train.class_names == val.class_names == ("class 4", "class 6")  # those in use
    assert (train.label(0) == 0).all()
    assert val.label(0).tolist() == [[1, IGNORE]]
    assert open_dataset(tmp_path, "val").label(0).tolist() == [[1, IGNORE]]
    assert open_dataset(tmp_path / "val", "val").label(0).tolist() == [[1, IGNORE]]  # the split given as the folder
    assert val.label_notes == (
        "the labels hold the numbers 4 and 6, which become classes 0 and 1; 5 numbers below 6 in no label",
        "255 counts as not labelled",
    )
    monkeypatch.setattr(labels, "counted", lambda path: pytest.fail("looked up again"))
    assert len(train.class_names) == 2
    assert capsys.readouterr() == ("", "")


def test_labels_that_are_all_ignored_have_no_classes(tmp_path):
    labelled(tmp_path, ["a"], label=IGNORE)
    with pytest.raises(UserError, match="every pixel of every label is 255"):
        _ = open_dataset(tmp_path, "train").class_names


@pytest.mark.parametrize("content", [b"", b"\n \n", b"x\n" * 256])
def test_a_wrong_number_of_class_names(tmp_path, content):
    labelled(tmp_path, ["a"])
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"classes\.txt: (0|256) class names; write 1 to 255"):
        _ = open_dataset(tmp_path, "train").class_names


def test_class_names_of_an_editor_with_a_byte_order_mark(tmp_path):
    labelled(tmp_path, ["a"])
    (tmp_path / "classes.txt").write_bytes("\ufeffhimmel\r\nstraße\r\n".encode())
    assert open_dataset(tmp_path, "train").class_names == ("himmel", "straße")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"classes\.txt: cannot be read"):
        _ = open_dataset(tmp_path, "train").class_names


def test_unreadable_images_and_labels_are_image_errors(tmp_path):
    labelled(tmp_path, ["a", "b"])
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    (tmp_path / "labels" / "b.png").write_bytes(b"no label")
    data = open_dataset(tmp_path, "train")
    with pytest.raises(ImageError, match=r"images/a\.png"):
        data.image(0)
    with pytest.raises(ImageError, match=r"labels/b\.png"):
        data.label(1)


# fingerprint and cost


def test_the_fingerprint_follows_the_images_and_not_their_place(tmp_path):
    write(tmp_path / "one" / "a.png", picture())
    write(tmp_path / "one" / "b.png", picture())
    before = open_dataset(tmp_path / "one", "train").fingerprint()
    (tmp_path / "one").rename(tmp_path / "two")
    data = open_dataset(tmp_path / "two", "train")
    assert data.fingerprint() == before
    status = (tmp_path / "two" / "a.png").stat()
    os.utime(tmp_path / "two" / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert data.fingerprint() != before
    os.utime(tmp_path / "two" / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert data.fingerprint() == before
    (tmp_path / "two" / "b.png").rename(tmp_path / "two" / "c.png")
    assert open_dataset(tmp_path / "two", "train").fingerprint() != before
    gone = data.fingerprint()  # b.png is listed, and no more there
    assert gone not in (before, open_dataset(tmp_path / "two", "train").fingerprint())


def test_opening_reads_no_image_and_no_label(tmp_path, monkeypatch):
    for number in range(500):
        for kind in ("images", "labels"):
            file = tmp_path / kind / f"{number // 100}" / f"{number:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("opened an image"))
    data = open_dataset(tmp_path, "train")
    data.fingerprint()
    assert len(data) == 500
    assert None not in data.labels


# arrays


def test_arrays_are_a_dataset_without_labels():
    images = [picture(1), picture(2, (3, 5))]
    data = ArrayDataset(images)
    assert len(data) == len(set(data.names)) == 2
    assert all((data.image(i) == images[i]).all() for i in range(2))
    assert data.label(0) is None
    assert (data.labelled, data.class_names, data.held_out) == (False, None, False)


def test_the_fingerprint_of_arrays_follows_pixels_and_shapes():
    prints = [
        ArrayDataset(images).fingerprint()
        for images in ([picture(1)], [picture(1)], [picture(2)], [picture(1, (8, 6))], [picture(1)] * 2)
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images: empty"),
        ([picture(), np.zeros((6, 8), np.uint8)], r"images\[1\]: must be a uint8 \[H,W,3\] array, got uint8 \[6, 8\]"),
        ([picture().astype(float)], r"images\[0\]: .*got float64 \[6, 8, 3\]"),
        ([np.zeros((0, 8, 3), np.uint8)], r"images\[0\]: "),
        (["a.png"], r"images\[0\]: .*got str"),
    ],
)
def test_arrays_of_another_kind_are_named(images, message):
    with pytest.raises(UserError, match=message):
        ArrayDataset(images)


# real data


def camvid() -> Path:
    root = os.environ.get("SMOOSEG_TEST_DATA")
    if not root or not (Path(root) / "camvid").is_dir():
        pytest.skip("SMOOSEG_TEST_DATA does not name a folder that holds camvid/")
    return Path(root) / "camvid"


def test_camvid():
    root = camvid()
    train, val = open_dataset(root, "train"), open_dataset(root, "val")
    assert (len(train), len(val)) == (367, 101)
    assert None not in train.labels + val.labels
    assert val.held_out
    assert not set(train.names) & set(val.names)
    assert train.class_names == val.class_names
    assert train.class_names[0] == "sky"
    assert len(train.class_names) == 11
    for data in (train, val):
        assert data.image(0).shape == (360, 480, 3)
        numbers = set(np.unique(data.label(0)))
        assert len(numbers) > 3
        assert numbers <= {*range(11), IGNORE}
