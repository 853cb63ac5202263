"""Tiny trees in the exact layouts of those who publish benchmarks."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from textures import draw

from smooseg_fast.datasets import potsdam

SIZE = (48, 96)  # height and width of the pictures


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pair(seed: int, numbers: tuple[int, int], size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """A picture of two textures, and its label with these numbers for them; the first row is 255."""
    image, label = draw(seed, *size)
    label = np.where(label == 1, *np.array(numbers[::-1], np.uint8)).astype(np.uint8)
    label[0] = 255
    return image, label


def make_cityscapes(root: Path) -> Path:
    """Road and building, in two cities each; numbers below 7 are not counted."""
    seed = 0
    for split, cities in (
        ("train", ("aachen", "bochum")),
        ("val", ("frankfurt", "lindau")),
        ("test", ("berlin",)),
        ("train_extra", ("bayreuth",)),
    ):
        for city in cities:
            for frame in range(2):
                stem = f"{city}_000000_{frame:06d}"
                image, label = pair(seed, (7, 11))
                label[1] = 3
                save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", image)
                if split in ("train", "val"):
                    for kind in ("labelIds", "instanceIds", "color"):
                        save(
                            root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png",
                            label if kind == "labelIds" else image,
                        )
                    (root / "gtFine" / split / city / f"{stem}_gtFine_polygons.json").write_text("{}")
                seed += 1
    return root


def make_cocostuff(root: Path, curated: bool = True) -> Path:
    """Sky (156, sky-stuff) next to grass (123, plant-stuff); the curated lists name all but the last image."""
    for split, numbers in (("train", range(100, 105)), ("val", range(200, 203))):
        names = [f"{number:012d}" for number in numbers]
        for number, name in zip(numbers, names):
            image, label = pair(number, (156, 123))
            save(root / "images" / f"{split}2017" / f"{name}.jpg", image)
            save(root / "annotations" / f"{split}2017" / f"{name}.png", label)
        if curated:
            path = root / "curated" / f"{split}2017" / "Coco164kFull_Stuff_Coarse_7.txt"
            path.parent.mkdir(parents=True)
            path.write_text("\n".join(names[:-1]) + "\n")
    (root / "annotations" / "instances_val2017.json").write_text("{}")
    return root


def make_potsdam_tiles(root: Path) -> Path:
    """Six tiles learnt from, two measured on, one without labels; infrared as a fourth channel, zeros that would be
    transparent.
    """
    lists = {"labelled_train": range(6), "labelled_test": range(6, 8), "unlabelled_train": range(8, 9), "all": range(9)}
    for folder in ("imgs", "gt"):
        (root / folder).mkdir(parents=True)
    for number in range(9):
        image, label = pair(number, (0, 3), (40, 40))
        label[0] = 5
        savemat(root / "imgs" / f"{number}.mat", {"img": np.dstack([image, np.zeros((40, 40), np.uint8)])})
        if number < 8:
            savemat(root / "gt" / f"{number}.mat", {"gt": label.astype(np.int32)}, do_compression=True)
    for name, numbers in lists.items():
        (root / f"{name}.txt").write_text("".join(f"{number}\n" for number in numbers))
    return root


COLOURS = np.array(
    [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0), (0, 0, 0)], np.uint8
)


def make_potsdam_mosaics(root: Path, infrared: bool = False) -> Path:
    """Two mosaics with labels and one without, of 2 x 3 tiles each; the classes of COLOURS in 50-pixel squares."""
    folder, kind = ("4_Ortho_RGBIR", "RGBIR") if infrared else ("2_Ortho_RGB", "RGB")
    size = (2 * potsdam.WINDOW, 3 * potsdam.WINDOW)
    for seed, place in enumerate(("2_10", "7_7", "2_13")):
        rng = np.random.default_rng(seed)
        image = np.kron(
            rng.integers(0, 256, (size[0] // 50, size[1] // 50, 3), dtype=np.uint8), np.ones((50, 50, 1), np.uint8)
        )
        if infrared:
            image = np.dstack([image, np.zeros(size, np.uint8)])
        save(root / folder / f"top_potsdam_{place}_{kind}.tif", image)
        if place != "2_13":
            numbers = rng.integers(0, len(COLOURS), (size[0] // 50, size[1] // 50))
            save(
                root / "5_Labels_for_participants" / f"top_potsdam_{place}_label.tif",
                np.kron(COLOURS[numbers], np.ones((50, 50, 1), np.uint8)),
            )
    return root


def make_voc(root: Path) -> Path:
    """Six pictures of which four are segmented; palette labels with 255 around objects."""
    home = root / "VOCdevkit" / "VOC2012"
    names = [f"2007_{number:06d}" for number in range(6)]
    for seed, name in enumerate(names):
        image, label = pair(seed, (0, 15))
        save(home / "JPEGImages" / f"{name}.jpg", image)
        if seed < 4:
            mask = Image.fromarray(label)
            mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
            (home / "SegmentationClass").mkdir(exist_ok=True)
            mask.save(home / "SegmentationClass" / f"{name}.png")
    lists = home / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, chosen in (("train", names[:2]), ("val", names[2:4]), ("trainval", names[:4])):
        (lists / f"{split}.txt").write_text("\n".join(chosen) + "\n")
    return root


MAKERS = {
    "cityscapes": make_cityscapes,
    "cocostuff": make_cocostuff,
    "potsdam_tiles": make_potsdam_tiles,
    "potsdam_mosaics": make_potsdam_mosaics,
    "voc": make_voc,
}
