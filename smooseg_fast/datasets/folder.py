"""A folder of images: any nesting of plain images, or images with labels beside them.

The labelled layout is DIR/images/... and DIR/labels/...png: the same relative path and stem, 8-bit class numbers, 255 = ignore;
optionally with train/, val/ or test/ between DIR and the two, and a classes.txt at DIR with one name a line.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..system.progress import Bar
from .base import IGNORE, Files, Split
from .images import find_images, read_label, visible_files

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Files):
    """A dataset of image files in one folder; made by `open_folder`."""

    classes_file: Path | None = None
    label_folders: tuple[Path, ...] = ()  # of every split: without a classes.txt they tell the number of classes

    @property
    def labelled(self) -> bool:
        return bool(self.label_folders)

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """Names from classes.txt; without one, every label of every split is read once, with a progress bar, and the number found is
        said on stderr. None without labels. UserError when classes.txt or a label cannot be read, or no pixel has a class."""
        if not self.labelled:
            return None
        if self.classes_file is not None:
            return _read_classes(self.classes_file)
        return _count_classes(self.label_folders)

    def class_numbers(self, path: Path) -> np.ndarray:
        label = read_label(path)
        if self.classes_file is not None:
            self._check_values(label, path)
        return label

    def _check_values(self, label: np.ndarray, path: Path) -> None:
        classes = len(self.class_names)
        wrong = label[(label >= classes) & (label != IGNORE)]
        if wrong.size:
            raise UserError(
                f"{path}: class number {wrong.max()} in {wrong.size} pixels, but {self.classes_file} names {classes} "
                f"(0 to {classes - 1}, and {IGNORE} to ignore); correct the label or name the class"
            )


def open_folder(path: Path | str, split: Split) -> ImageFolder:
    """The images of `path` for training ("train") or for evaluation ("val"), listed but not read.

    A folder has splits when its train/ comes with a val/ or test/, or holds images/; then "val" means val/, else test/. Otherwise,
    and where neither is there, both splits are the same images, and `held_out` is False. Below that, images/ beside labels/ is the
    labelled layout, and anything else a plain folder of images. Images without a label are allowed.

    Raises UserError when nothing is found, when two images share one label, and when no label belongs to any image.
    """
    root = Path(path).expanduser()
    base, held_out = _split_folder(root, split)
    home = (
        base.parent if base.name in SPLITS else base
    )  # where classes.txt and the other splits are, also for DIR/val itself
    name = base.resolve().name if base == root else f"{root.resolve().name}/{base.name}"
    if not _has_labels(base):
        images = find_images(base)
        top = base if base.is_dir() else base.parent
        nothing = (None,) * len(images)
        return ImageFolder(
            name=name, names=_relative(images, top), images=tuple(images), labels=nothing, held_out=held_out
        )

    images = find_images(base / "images")
    names = _relative(images, base / "images")
    labels, notes = _match_labels(base, names)
    classes = [file for file in (base / "classes.txt", home / "classes.txt") if file.is_file()]
    splits = [home / other for other in SPLITS if home != base and _has_labels(home / other)]
    label_folders = tuple(folder / "labels" for folder in splits or [base])
    return ImageFolder(
        name=name,
        names=names,
        images=tuple(images),
        labels=labels,
        held_out=held_out,
        notes=notes,
        classes_file=classes[0] if classes else None,
        label_folders=label_folders,
    )


def open_folder_splits(path: Path | str) -> tuple[ImageFolder, ImageFolder | None]:
    """`open_splits` of a folder."""
    train = open_folder(path, "train")
    base, _ = _split_folder(
        Path(path).expanduser(), "val"
    )  # without labels it is not opened: then it may as well be empty
    return train, open_folder(path, "val") if train.labelled or _has_labels(base) else None


def _split_folder(root: Path, split: str) -> tuple[Path, bool]:
    """The folder that holds `split`, and whether it is apart from the training images."""
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", not {split!r}')
    there = [name for name in SPLITS if (root / name).is_dir()]
    has_train = "train" in there and (len(there) > 1 or (root / "train" / "images").is_dir())
    # a lone train/ in a plain folder may well hold pictures of trains
    if not has_train and (_has_labels(root) or not any(_has_labels(root / name) for name in there)):
        return root, False
    if split == "val":
        for name in ("val", "test"):
            if name in there:
                return root / name, True
    if not has_train:
        raise UserError(
            f"--data {root}: has {' and '.join(there)} but no train folder; add train/images, or give {root / there[0]}"
        )
    return root / "train", False


def _has_labels(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "labels").is_dir()


def _relative(files: list[Path], top: Path) -> tuple[str, ...]:
    return tuple(file.relative_to(top).as_posix() for file in files)


def _match_labels(base: Path, names: tuple[str, ...]) -> tuple[tuple[Path | None, ...], tuple[str, ...]]:
    """The label of each image, and notes on images without a label and labels without an image."""
    folder = base / "labels"
    masks = [file for file in visible_files(folder, "--data") if file.suffix.lower() == ".png"]
    by_stem = {file.relative_to(folder).with_suffix("").as_posix(): file for file in masks}
    owner: dict[str, str] = {}
    for name in names:
        stem = Path(name).with_suffix("").as_posix()
        if stem in owner:
            raise UserError(
                f"{base / 'images'}: {owner[stem]} and {name} would share the label {stem}.png; rename or remove one of them"
            )
        owner[stem] = name
    labels = tuple(by_stem.get(stem) for stem in owner)
    if not any(labels):
        stem = next(iter(owner))
        raise UserError(
            f"{folder}: no label belongs to any image; for {names[0]} it would be {stem}.png, and {len(masks)} .png are there"
        )
    without = [name for name, label in zip(names, labels) if label is None]
    stray = [mask for stem, mask in by_stem.items() if stem not in owner]
    notes = [f"{len(without)} of {len(names)} images have no label in {folder}, first {without[0]}"] if without else []
    notes += (
        [f"{len(stray)} labels in {folder} belong to no image, first {stray[0].relative_to(folder)}"] if stray else []
    )
    return labels, tuple(notes)


def _read_classes(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write one class name a line, in UTF-8") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not 1 <= len(names) <= IGNORE:
        raise UserError(f"{path}: {len(names)} class names; write 1 to {IGNORE} of them, one a line")
    return names


def _count_classes(folders: tuple[Path, ...]) -> tuple[str, ...]:
    masks = [file for folder in folders for file in visible_files(folder, "--data") if file.suffix.lower() == ".png"]
    seen = np.zeros(IGNORE + 1, bool)
    for mask in Bar(iterable=masks, desc="counting classes", unit="label"):
        seen[read_label(mask)] = True
    numbers = np.flatnonzero(seen[:IGNORE])
    if not numbers.size:
        raise UserError(
            f"{folders[0]}: every pixel of every label is {IGNORE} (ignore); write class numbers from 0 into the labels"
        )
    classes = int(numbers[-1]) + 1
    home = folders[0].parent
    tqdm.write(
        f"{home}: no classes.txt; {classes} classes by the largest number in {len(masks)} labels", file=sys.stderr
    )
    return tuple(f"class {number}" for number in range(classes))
