"""Folders as people have them: which files are photos to learn from, which are their labels, and what is left out."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from textures import draw

from smooseg_fast.datasets import formats, open_dataset, open_splits
from smooseg_fast.datasets.copies import copies_notes, same_bytes
from smooseg_fast.datasets.scan import scan
from smooseg_fast.errors import UserError
from smooseg_fast.show import items

COUNT = 3


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def photos(root: Path, name: str = "{}.jpg", start: int = 0) -> None:
    for seed in range(start, start + COUNT):
        save(root / name.format(seed), draw(seed, 48, 64)[0])


def masks(root: Path, name: str = "{}.png", start: int = 0) -> None:
    for seed in range(start, start + COUNT):
        save(root / name.format(seed), draw(seed, 48, 64)[1])


def truths(dataset) -> list[np.ndarray | None]:
    return [dataset.label(index) for index in range(len(dataset))]


def assert_labelled(dataset, start: int = 0) -> None:
    assert len(dataset) == COUNT
    for seed, label in enumerate(truths(dataset), start):
        np.testing.assert_array_equal(label, draw(seed, 48, 64)[1])


# masks and their photos

PAIRS = {  # photos, masks, how these are named
    "images and masks": ("images/{}.jpg", "masks/{}.png", "masks/"),
    "no folder for the photos": ("{}.jpg", "Masks/{}.png", "Masks/"),
    "annotations": ("img/{}.jpg", "annotations/{}.tif", "annotations/"),
    "ground truth": ("imgs/sub/{}.jpg", "ground_truth/sub/{}.bmp", "ground_truth/"),
    "VOC without its lists": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", "SegmentationClass/"),
    "endings in a folder": ("images/{}.jpg", "masks/{}_mask.png", "masks/"),
    "another folder name": ("cats/{}.jpg", "masks/{}.png", "masks/"),
    "train_masks": ("train/{}.jpg", "train_masks/{}_mask.gif", "train_masks/"),
    "x_mask": ("{}x.png", "{}x_mask.png", "*_mask.png"),
    "x-gt": ("{}.jpg", "{}-GT.png", "*-GT.png"),
    "x_label": ("deep/{}.jpg", "deep/{}_label.png", "*_label.png"),
    "x_labelIds": ("{}_leftImg8bit.png", "{}_gtFine_labelIds.png", "*_labelIds.png"),
    "x_seg": ("{}.jpg", "{}_seg.png", "*_seg.png"),
    "x_sat": ("{}_sat.jpg", "{}_mask.png", "*_mask.png"),
    "mask_x": ("image_{}.jpg", "mask_{}.png", None),
    "x_L": ("{}.png", "{}_L.png", "*_L.png"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_masks_are_the_labels_of_the_photos_next_to_them(name, tmp_path):
    photo, mask, title = PAIRS[name]
    photos(tmp_path, photo), masks(tmp_path, mask)
    train, val = open_splits(tmp_path)
    for dataset in (train, val):
        assert_labelled(dataset)
    assert not any("mask" in image or "label" in image for image in train.names)
    if title is not None:
        assert f"3 photos have labels in {title}, matched by name" in train.notes
    assert [item.file for item in items.items_below(tmp_path)] == list(train.images)


def test_the_documented_layout_needs_no_line(tmp_path):
    photos(tmp_path / "images"), masks(tmp_path / "labels")
    assert open_dataset(tmp_path, "train").notes == ()


def test_several_sites(tmp_path):
    photos(tmp_path / "a" / "images"), masks(tmp_path / "a" / "masks")
    photos(tmp_path / "b" / "images", start=3), masks(tmp_path / "b" / "masks", start=3)
    dataset = open_dataset(tmp_path, "train")
    assert dataset.names == tuple(f"{'ab'[n // 3]}/images/{n}.jpg" for n in range(6))
    assert [int(label.sum()) for label in truths(dataset)] == [int(draw(n, 48, 64)[1].sum()) for n in range(6)]
    assert "6 photos have labels in a/masks/, b/masks/, matched by name" in dataset.notes


def test_of_several_masks_the_best_named_is_the_label(tmp_path):
    photos(tmp_path, "{}.png"), masks(tmp_path, "{}_labelIds.png"), masks(tmp_path, "{}_instanceIds.png")
    masks(tmp_path, "{}_color.png"), masks(tmp_path, "{}_gt.png")
    dataset = open_dataset(tmp_path, "train")
    assert_labelled(dataset)
    assert {path.name for path in dataset.labels} == {"0_labelIds.png", "1_labelIds.png", "2_labelIds.png"}
    assert "3 files in *_instanceIds.png left out: made for looking at, or of single objects" in dataset.notes
    assert "3 files in *_color.png left out: made for looking at, or of single objects" in dataset.notes
    assert "3 files in *_gt.png left out: the photos have other labels" in dataset.notes


def test_masks_in_jpeg_and_drawings_on_photos_are_left_out_and_named(tmp_path):
    photos(tmp_path / "images"), photos(tmp_path / "overlays", "{}.png", start=0)
    for seed in range(COUNT):
        save(tmp_path / "masks" / f"{seed}.jpg", draw(seed, 48, 64)[1] * 255)
    dataset = open_dataset(tmp_path, "train")
    assert dataset.names == ("images/0.jpg", "images/1.jpg", "images/2.jpg")
    assert not dataset.labelled
    assert (
        "3 files in masks/ left out: named like masks of the photos, with more values than classes have (JPEG changes "
        "numbers: use PNG)"
    ) in dataset.notes
    assert "3 files in overlays/ left out: made for looking at, or of single objects" in dataset.notes


def test_masks_of_other_photos_are_left_out_and_named(tmp_path):
    photos(tmp_path / "images"), masks(tmp_path / "masks", "other{}.png")
    dataset = open_dataset(tmp_path, "train")
    assert (len(dataset), dataset.labelled) == (COUNT, False)
    assert dataset.notes == ("3 files in masks/ left out: masks that belong to no photo",)


def test_photos_in_folders_named_like_masks_stay_photos(tmp_path):
    photos(tmp_path / "bottles"), photos(tmp_path / "labels", start=5)  # labels of bottles
    photos(tmp_path / "seg", "{}.png", start=7)
    photos(tmp_path, "cat{}.jpg"), photos(tmp_path, "cat{}_L.jpg", start=0)
    dataset = open_dataset(tmp_path, "train")
    assert (len(dataset), dataset.labelled, dataset.notes) == (5 * COUNT, False, ())


def test_photos_without_a_label_and_labels_without_a_photo_are_counted(tmp_path):
    photos(tmp_path / "images"), masks(tmp_path / "masks")
    (tmp_path / "masks" / "1.png").rename(tmp_path / "masks" / "one.png")
    dataset = open_dataset(tmp_path, "train")
    assert [label is None for label in truths(dataset)] == [False, True, False]
    name, place = tmp_path.name, tmp_path / "masks"
    assert f"1 of 3 {name} images have no label in {place} (*.png), first 1.jpg" in dataset.notes
    assert f"1 labels in {place} (*.png) belong to no image, first one.png" in dataset.notes


def test_a_folder_of_nothing_but_masks(tmp_path):
    masks(tmp_path / "gt")
    with pytest.raises(UserError, match=r"all 3 image files in it are masks \(3 files in gt/ left out: .*; give the "):
        scan(tmp_path)


# splits


@pytest.mark.parametrize("held_out", ["valid", "Validation", "val"])
@pytest.mark.parametrize(
    "layout", ["{split}/images/{{}}.jpg {split}/masks/{{}}.png", "{split}/{{}}.jpg {split}/{{}}_mask.png"]
)
def test_splits_by_other_names(held_out, layout, tmp_path):
    for split, start in (("train", 0), (held_out, 5), ("test", 9)):
        photo, mask = layout.format(split=split).split()
        photos(tmp_path, photo, start), masks(tmp_path, mask, start)
    train, val = open_splits(tmp_path)
    assert_labelled(train)
    assert_labelled(val, start=5)
    assert (train.held_out, val.held_out) == (False, True)
    assert val.name == f"{tmp_path.name}/{held_out}"


@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_splits_below_images(kind, tmp_path):
    for split, start in (("train", 0), ("val", 5)):
        photos(tmp_path / "images" / split, start=start), masks(tmp_path / kind / split, start=start)
    train, val = open_splits(tmp_path)
    assert_labelled(train)
    assert_labelled(val, start=5)
    assert (train.names[0], val.held_out) == ("0.jpg", True)


def test_a_test_split_without_labels_is_not_measured_on(tmp_path):
    photos(tmp_path / "train"), masks(tmp_path / "train_masks"), photos(tmp_path / "test", start=7)
    train, val = open_splits(tmp_path)
    assert_labelled(train)
    assert (val.names, val.held_out) == (train.names, False)
    assert f"no image of {tmp_path.name}/test has a label: figures are taken on the training images" in train.notes


@pytest.mark.parametrize("top", ["", "train/"])
def test_boxes_of_object_detectors(top, tmp_path):
    photos(tmp_path / f"{top}images")
    for number in range(COUNT):
        file = tmp_path / f"{top}labels" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("0 0.5 0.5 0.1 0.1\n")
    train, val = open_splits(tmp_path)
    assert (len(train), train.labelled, val) == (COUNT, False, None)
    assert train.notes == ("labels/ holds 3 .txt files, as for object detectors, and no masks: only the photos count",)


# what is no photo


def test_thumbnails_are_no_photos(tmp_path):
    photos(tmp_path)
    for place in (
        "@eaDir/0.jpg",
        "__MACOSX",
        ".thumbnails",
        "Thumbs",
        "x Previews.lrdata/A",
        "P.photoslibrary/resources",
    ):
        photos(tmp_path / place)
    photos(tmp_path / "P.photoslibrary" / "originals", "o{}.jpg")
    dataset = open_dataset(tmp_path, "train")
    assert dataset.names == ("0.jpg", "1.jpg", "2.jpg", *(f"P.photoslibrary/originals/o{n}.jpg" for n in range(COUNT)))
    assert dataset.notes == ("15 previews and thumbnails left out, first @eaDir/0.jpg/0.jpg",)
    assert len(open_dataset(tmp_path / "Thumbs", "train")) == COUNT  # asked for by name


def test_files_of_other_kinds_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "photo_suffixes", lambda: formats.PHOTOS)
    photos(tmp_path)
    for name in (
        "a.HEIC",
        "b.heic",
        "c.mp4",
        "d.npy",
        "e.NEF",
        "f.gif",
        "notes.txt",
        "Thumbs.db",
        "a.xmp",
        ".DS_Store",
    ):
        (tmp_path / name).write_bytes(b"x")
    (note,) = scan(tmp_path).notes
    assert note.startswith("6 files ignored: 2 .heic, 1 ")
    assert note.endswith("; pip install 'smooseg_fast[heic]' reads .heic")
    assert all(f"1 {suffix}" in note for suffix in (".mp4", ".npy", ".nef", ".gif"))
    assert len(items.items_below(tmp_path)) == COUNT
    assert "note: 6 files ignored: " in capsys.readouterr().err
    for number in range(COUNT):
        (tmp_path / f"{number}.jpg").unlink()
    with pytest.raises(UserError, match=r"no images in it; .*1 \.HEIC.*; pip install 'smooseg_fast\[heic\]' reads"):
        scan(tmp_path)


@pytest.mark.skipif(not features.check("jpg_2000"), reason="Pillow was built without OpenJPEG")
def test_jpeg_2000_is_read(tmp_path):
    image = draw(0, 48, 64)[0]
    save(tmp_path / "a.jp2", image)  # lossless by default
    dataset = open_dataset(tmp_path, "train")
    np.testing.assert_array_equal(dataset.image(0), image)


def test_heic_is_read(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    image, exif = draw(0, 48, 64)[0], Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "a.HEIC", quality=95)
    dataset = open_dataset(tmp_path, "train")
    assert dataset.size(0) == dataset.image(0).shape[:2] == (48, 64)
    assert np.abs(dataset.image(0).astype(int) - image).mean() < 12  # chroma is halved
    assert dataset.notes == ()


# names


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_that_differ_in_unicode_form_or_case_pair(forms, tmp_path):
    photo, mask = (unicodedata.normalize(form, "Größe é{}") for form in forms)
    photos(tmp_path / "images", photo + ".JPG"), masks(tmp_path / "labels", mask.upper().replace("SS", "ß") + ".png")
    assert_labelled(open_dataset(tmp_path, "train"))


def test_names_that_differ_in_case_alone_keep_their_own_labels(tmp_path):
    for seed, stem in enumerate(("A", "a")):
        image, label = draw(seed, 48, 64)
        save(tmp_path / "images" / f"{stem}.png", image)
        save(tmp_path / "labels" / f"{stem}.png", label)
    if len(list((tmp_path / "images").iterdir())) < 2:
        pytest.skip("case makes no difference here")
    dataset = open_dataset(tmp_path, "train")
    for seed, label in enumerate(truths(dataset)):
        np.testing.assert_array_equal(label, draw(seed, 48, 64)[1])
    (tmp_path / "labels" / "A.png").unlink()
    assert [label is None for label in truths(open_dataset(tmp_path, "train"))] == [True, False]


def test_no_two_masks_of_predictions_differ_in_case_or_unicode_form_alone():
    names = [
        "IMG.jpg",
        "img.jpg",
        unicodedata.normalize("NFC", "é.png"),
        unicodedata.normalize("NFD", "é.png"),
        "x.png",
    ]
    stems = items.output_stems([Path(name) for name in names])
    assert len({unicodedata.normalize("NFC", stem).casefold() for stem in stems}) == 5
    assert stems == ["IMG", "img.jpg.e57e7a67", stems[2], unicodedata.normalize("NFD", "é"), "x"]
    assert stems[2].startswith(names[2] + ".")


# copies


def test_copies_are_counted_and_learnt_from(tmp_path):
    photos(tmp_path)
    shutil.copy(tmp_path / "0.jpg", tmp_path / "0 (1).jpg")
    (tmp_path / "empty.png").write_bytes(b""), (tmp_path / "void.png").write_bytes(b"")
    dataset = open_dataset(tmp_path, "train")
    assert len(dataset) == 6
    assert copies_notes(dataset, None) == [
        "1 of 6 images are copies of others (the same bytes), first 0 (1).jpg of 0.jpg: each is learnt from"
    ]


def test_held_out_copies_of_training_images_are_said(tmp_path):
    for split, start in (("train", 0), ("val", 5)):
        photos(tmp_path / split / "images", start=start), masks(tmp_path / split / "labels", start=start)
    shutil.copy(tmp_path / "train" / "images" / "1.jpg", tmp_path / "val" / "images" / "5.jpg")
    assert copies_notes(*open_splits(tmp_path)) == [
        "1 held-out images are copies of training images, first 5.jpg of 1.jpg: figures come out too good; take the "
        "copies out"
    ]


def test_files_of_equal_size_that_differ_anywhere_are_no_copies(tmp_path):
    data = bytearray(40_000)
    for number, place in enumerate((None, 0, 20_000, 39_999, 10_000)):
        changed = bytearray(data)
        if place is not None:
            changed[place] = 1
        (tmp_path / str(number)).write_bytes(changed)
    (tmp_path / "5").write_bytes(data)
    assert same_bytes(sorted(tmp_path.iterdir())) == [[tmp_path / "0", tmp_path / "5"]]
