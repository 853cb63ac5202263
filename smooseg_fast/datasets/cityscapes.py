"""Cityscapes as its owners pack it: leftImg8bit/SPLIT/city/*_leftImg8bit.png and
gtFine/SPLIT/city/*_gtFine_labelIds.png.

The 27 classes of the unsupervised benchmark (PiCIE's and STEGO's) are the label numbers 7 to 33 in order; 0 to 6 do
not count.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .base import IGNORE, Layout, NumberedFiles, Numbering, files_below, first_folder, numbered_files

# label numbers 7 to 33, from the owners' cityscapesscripts/helpers/labels.py
NAMES = (
    "road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole",
    "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
    "bus", "caravan", "trailer", "train", "motorcycle", "bicycle",
)  # fmt: skip
FIRST = 7
NUMBERING = Numbering(
    "Cityscapes", NAMES, {number: number - FIRST if number >= FIRST else IGNORE for number in range(FIRST + len(NAMES))}
)

IMAGE, LABEL = "_leftImg8bit", "_gtFine_labelIds"


def recognise(root: Path) -> Layout | None:
    images = first_folder(root / "leftImg8bit", root / "leftImg8bit_trainvaltest" / "leftImg8bit")
    if images is None:
        return None
    # the test split's labels are withheld, and train_extra has none of this kind
    splits = [split for split in ("train", "val", "test", "train_extra") if (images / split).is_dir()]
    if not {"train", "val"} & set(splits):
        return None
    labels = first_folder(root / "gtFine", root / "gtFine_trainvaltest" / "gtFine") or root / "gtFine"
    parts = {split: partial(_open, images, labels, split) for split in splits}
    return Layout(
        title="Cityscapes (leftImg8bit and gtFine labelIds, 27 classes)",
        preset="cityscapes",
        root=root,
        parts=parts,
        pictures=images / ("val" if "val" in parts else "train"),
    )


def _open(images: Path, labels: Path, split: str) -> NumberedFiles:
    return numbered_files(
        f"Cityscapes {split}",
        images / split,
        files_below(images / split),
        [file for file in files_below(labels / split, (".png",)) if file.stem.endswith(LABEL)],
        NUMBERING,
        label_name=lambda stem: stem.removesuffix(IMAGE) + LABEL,
        held_out=split != "train",
        where=f"{labels / split} (*{LABEL}.png)",
    )
