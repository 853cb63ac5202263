"""Datasets on disk: folders of images in any nesting, and the layouts in which benchmarks are published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..system.stores import place
from . import cityscapes, cocostuff, potsdam, voc
from .arrays import ArrayDataset
from .base import IGNORE, Dataset, Files, Layout, Split, classes_of
from .folder import ImageFolder, open_folder, open_folder_splits

__all__ = [
    "IGNORE",
    "ArrayDataset",
    "Dataset",
    "ImageFolder",
    "Layout",
    "Split",
    "classes_of",
    "open_dataset",
    "open_splits",
    "recognise",
]

OWNERS = (cityscapes, cocostuff, potsdam, voc)


def recognise(path: Path | str) -> Layout | None:
    """Recognise an owner's layout by the contents of the folder `path`; None for any other folder or file.

    Opens no image and lists no large folder. UserError when the folder looks like two layouts.
    """
    root = place(path)
    if not isinstance(root, Path):  # a store: any folder of images
        return None
    layouts = [layout for owner in OWNERS if (layout := owner.recognise(root)) is not None]
    if len(layouts) > 1:
        titles = " and like ".join(layout.title for layout in layouts)
        raise UserError(f"--data {root}: looks like {titles}; give each a folder of its own")
    return layouts[0] if layouts else None


def open_dataset(path: Path | str, split: Split, ignore: Sequence[int] = ()) -> Dataset:
    """List the images of `path` for training ("train") or for evaluation ("val") without reading them.

    Opens a folder in an owner's layout (Cityscapes, COCO-Stuff, Potsdam-3, PASCAL VOC) as such, any other by
    `open_folder`. ignore: numbers in label files that count as not labelled. UserError when there is nothing to open.
    """
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", not {split!r}')
    layout = recognise(path)
    return open_folder(path, split, ignore) if layout is None else _ignoring(layout.open(split), ignore)


def open_splits(path: Path | str, ignore: Sequence[int] = ()) -> tuple[Dataset, Dataset | None]:
    """Return (training images, evaluation images or None if neither has labels). Errors as of `open_dataset`."""
    layout = recognise(path)
    if layout is None:
        return open_folder_splits(path, ignore)
    train, val = (_ignoring(layout.open(split), ignore) for split in ("train", "val"))
    if val.labelled:
        return train, val
    notes = tuple(dict.fromkeys((*train.notes, *val.notes)))  # they say why there is nothing to evaluate on
    return replace(train, notes=notes), None


def _ignoring(files: Files, numbers: Sequence[int]) -> Files:
    return replace(files, numbering=files.numbering.ignoring(numbers)) if numbers and files.numbering else files
