"""Datasets as they lie on disk: folders of images in any nesting, and the layouts of those who publish benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from . import cityscapes, cocostuff, potsdam, voc
from .arrays import ArrayDataset
from .base import IGNORE, Dataset, Layout, Split
from .folder import ImageFolder, open_folder, open_folder_splits

__all__ = [
    "IGNORE",
    "ArrayDataset",
    "Dataset",
    "ImageFolder",
    "Layout",
    "Split",
    "open_dataset",
    "open_splits",
    "recognise",
]

OWNERS = (cityscapes, cocostuff, potsdam, voc)


def recognise(path: Path | str) -> Layout | None:
    """The owner's layout that the folder `path` has, by what lies in it; None for any other folder or file.

    Opens no image and lists no large folder. UserError when it looks like two of them.
    """
    root = Path(path).expanduser()
    found = [layout for layout in (owner.recognise(root) for owner in OWNERS) if layout is not None]
    if len(found) > 1:
        raise UserError(
            f"--data {root}: looks like {' and like '.join(layout.title for layout in found)}; give each a folder of its own"
        )
    return found[0] if found else None


def open_dataset(path: Path | str, split: Split) -> Dataset:
    """The images of `path` for training ("train") or for evaluation ("val"), listed but not read.

    A folder in an owner's layout (Cityscapes, COCO-Stuff, Potsdam-3, PASCAL VOC) is opened as that, any other as `open_folder` says.
    Raises UserError when there is nothing to open.
    """
    layout = recognise(path)
    return open_folder(path, split) if layout is None else layout.open(split)


def open_splits(path: Path | str) -> tuple[Dataset, Dataset | None]:
    """(training images, the images of `path` to take figures on): the latter where either of the two has labels, else None.

    Errors are those of `open_dataset`.
    """
    layout = recognise(path)
    if layout is None:
        return open_folder_splits(path)
    train, val = layout.open("train"), layout.open("val")
    if val.labelled:
        return train, val
    return replace(
        train, notes=tuple(dict.fromkeys((*train.notes, *val.notes)))
    ), None  # why there is nothing to take figures on
