"""PASCAL VOC as its owners pack it: JPEGImages, SegmentationClass (palette PNGs) and
ImageSets/Segmentation/{train,val,trainval}.txt.

The 21 classes are the palette's numbers 0 (background) to 20; 255, the outline of objects, does not count.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .base import Layout, NumberedFiles, Numbering, files_below, numbered_files, pick, read_list

NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
NUMBERING = Numbering("PASCAL VOC", NAMES, {number: number for number in range(len(NAMES))})

# the archive unpacks to VOCdevkit/VOC2012
HOMES = (".", "VOC2012", "VOCdevkit/VOC2012", "VOC2007", "VOCdevkit/VOC2007")


def recognise(root: Path) -> Layout | None:
    for home in (root / place for place in HOMES):
        lists = home / "ImageSets" / "Segmentation"
        if not ((home / "JPEGImages").is_dir() and lists.is_dir()):
            continue
        paths = {split: lists / f"{split}.txt" for split in ("train", "val", "trainval")}
        parts = {split: partial(_open, home, split, path) for split, path in paths.items() if path.is_file()}
        if "train" not in parts and "trainval" in parts:
            parts["train"] = partial(_open, home, "train", paths["trainval"])
        if not parts:
            return None
        title = f"PASCAL VOC ({home.resolve().name}: JPEGImages and SegmentationClass, 21 classes)"
        return Layout(title=title, preset="folder", root=root, parts=parts, pictures=home / "JPEGImages")
    return None


def _open(home: Path, split: str, path: Path) -> NumberedFiles:
    images = home / "JPEGImages"
    present = files_below(images)
    listed, notes = pick(read_list(path), present, path)
    return numbered_files(
        f"PASCAL VOC {split}",
        images,
        listed,
        files_below(home / "SegmentationClass", (".png",)),
        NUMBERING,
        label_name=str,
        held_out=split == "val",
        where=str(home / "SegmentationClass"),
        present=present,
        notes=notes,
    )
