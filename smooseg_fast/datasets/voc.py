"""PASCAL VOC as its owners pack it: JPEGImages, SegmentationClass (palette PNGs) and
ImageSets/Segmentation/{train,val,trainval}.txt.

The 21 classes are the palette's numbers 0 (background) to 20; 255, the outline of objects, does not count.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .base import Files, Layout, Numbering

NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
NUMBERING = Numbering("PASCAL VOC", NAMES, range(len(NAMES)))

# the archive unpacks to VOCdevkit/VOC2012
HOMES = (".", "VOC2012", "VOCdevkit/VOC2012", "VOC2007", "VOCdevkit/VOC2007")


def recognise(root: Path) -> Layout | None:
    for home in (root / place for place in HOMES):
        images, labels, lists = (home / name for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"))
        paths = {split: lists / f"{split}.txt" for split in ("train", "val", "trainval")}
        if not paths["train"].is_file():
            paths["train"] = paths["trainval"]
        parts = {
            split: partial(Files.of_owner, NUMBERING, split, images, labels, listed=path)
            for split, path in paths.items()
            if path.is_file()
        }
        if images.is_dir() and parts:
            title = f"PASCAL VOC ({home.resolve().name}: JPEGImages and SegmentationClass, 21 classes)"
            return Layout(title=title, preset="folder", root=root, parts=parts, pictures=images)
    return None
