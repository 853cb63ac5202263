"""Cityscapes as its owners pack it: leftImg8bit/SPLIT/city/*_leftImg8bit.png and
gtFine/SPLIT/city/*_gtFine_labelIds.png.

The 27 classes of the unsupervised benchmark (PiCIE's and STEGO's) are the label numbers 7 to 33 in order; 0 to 6 do
not count.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .base import IGNORE, Files, Layout, Numbering, first_folder

# label numbers 7 to 33, from the owners' cityscapesscripts/helpers/labels.py
NAMES = (
    "road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole",
    "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
    "bus", "caravan", "trailer", "train", "motorcycle", "bicycle",
)  # fmt: skip
NUMBERING = Numbering("Cityscapes", NAMES, (*[IGNORE] * 7, *range(len(NAMES))))


def recognise(root: Path) -> Layout | None:
    images = first_folder(root / "leftImg8bit", root / "leftImg8bit_trainvaltest" / "leftImg8bit")
    labels = first_folder(root / "gtFine", root / "gtFine_trainvaltest" / "gtFine") or root / "gtFine"
    if images is None or not any((images / split).is_dir() for split in ("train", "val")):
        return None
    # the test split's labels are withheld, and train_extra has none of this kind
    splits = [split for split in ("train", "val", "test", "train_extra") if (images / split).is_dir()]
    endings = ("_leftImg8bit", "_gtFine_labelIds")
    return Layout(
        title="Cityscapes (leftImg8bit and gtFine labelIds, 27 classes)",
        preset="cityscapes",
        root=root,
        parts={
            split: partial(Files.of_owner, NUMBERING, split, images / split, labels / split, endings=endings)
            for split in splits
        },
        pictures=images / ("val" if "val" in splits else "train"),
    )
