"""A folder of images: plain images in any nesting, or images with labels next to them.

The labelled layout is DIR/images/... and DIR/labels/...png: the same relative path and stem, 8-bit class numbers, 255 =
ignore; optionally with train/, val/ or test/ between DIR and the two, and a classes.txt at DIR with one name a line.
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
from .base import IGNORE, Files, Split, classes_of, files_below
from .images import find_images, read_label

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Files):
    """A dataset of the image files in one folder; `open_folder` makes it."""

    classes_file: Path | None = None
    label_folders: tuple[Path, ...] = ()  # all splits; without classes.txt their labels give the number of classes

    @property
    def labelled(self) -> bool:
        return bool(self.label_folders)

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The names in classes.txt, else numbers up to the largest in any label of any split; None without labels.

        Without classes.txt every label is read once. UserError when a file cannot be read, or no pixel has a class.
        """
        if not self.labelled:
            return None
        return _count_classes(self.label_folders) if self.classes_file is None else _read_classes(self.classes_file)

    def class_numbers(self, path: Path) -> np.ndarray:
        label = read_label(path)
        if self.classes_file is None:
            return label
        classes = len(classes_of(self))
        illegal = label[(label >= classes) & (label != IGNORE)]
        if illegal.size:
            raise UserError(
                f"{path}: class number {illegal.max()} in {illegal.size} pixels, but {self.classes_file} names "
                f"{classes} (0 to {classes - 1}, and {IGNORE} to ignore); correct the label or name the class"
            )
        return label


def open_folder(path: Path | str, split: Split) -> ImageFolder:
    """List the images of `path` for training ("train") or for evaluation ("val") without reading them.

    A folder has splits when its train/ comes with a val/ or test/, or holds images/; "val" is then val/, else test/.
    Otherwise both splits are the same images, and `held_out` is False. Within a split, images/ next to labels/ is the
    labelled layout, and anything else a plain folder of images. Images without a label are allowed.

    UserError when there are no images, when two images share one label, and when no label belongs to any image.
    """
    root = Path(path).expanduser()
    base, held_out = _split_folder(root, split)
    # holds classes.txt and the other splits, also for DIR/val itself
    home = base.parent if base.name in SPLITS else base
    name = base.resolve().name if base == root else f"{root.resolve().name}/{base.name}"
    if not _has_labels(base):
        images = find_images(base)
        top = base if base.is_dir() else base.parent
        return ImageFolder(
            name=name,
            names=_relative(images, top),
            images=tuple(images),
            labels=(None,) * len(images),
            held_out=held_out,
        )

    images = find_images(base / "images")
    names = _relative(images, base / "images")
    labels, notes = _match_labels(base, names)
    classes = [file for file in (base / "classes.txt", home / "classes.txt") if file.is_file()]
    splits = [home / other for other in SPLITS if home != base and _has_labels(home / other)]
    return ImageFolder(
        name=name,
        names=names,
        images=tuple(images),
        labels=labels,
        held_out=held_out,
        notes=notes,
        classes_file=classes[0] if classes else None,
        label_folders=tuple(folder / "labels" for folder in splits or [base]),
    )


def open_folder_splits(path: Path | str) -> tuple[ImageFolder, ImageFolder | None]:
    """Open (training images, evaluation images or None) of a folder."""
    train = open_folder(path, "train")
    base, _ = _split_folder(Path(path).expanduser(), "val")  # not opened without labels: it may be empty then
    return train, open_folder(path, "val") if train.labelled or _has_labels(base) else None


def _split_folder(root: Path, split: str) -> tuple[Path, bool]:
    """Return the folder that holds `split`, and whether it is apart from the training images."""
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", not {split!r}')
    present = [name for name in SPLITS if (root / name).is_dir()]
    has_train = "train" in present and (len(present) > 1 or (root / "train" / "images").is_dir())
    # a lone train/ in a plain folder may well hold pictures of trains
    if not has_train and (_has_labels(root) or not any(_has_labels(root / name) for name in present)):
        return root, False
    held_out = [name for name in present if name != "train"]
    if split == "val" and held_out:
        return root / held_out[0], True
    if not has_train:
        advice = f"add train/images, or give {root / present[0]}"
        raise UserError(f"--data {root}: has {' and '.join(present)} but no train folder; {advice}")
    return root / "train", False


def _has_labels(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "labels").is_dir()


def _relative(files: list[Path], top: Path) -> tuple[str, ...]:
    return tuple(file.relative_to(top).as_posix() for file in files)


def _match_labels(base: Path, names: tuple[str, ...]) -> tuple[tuple[Path | None, ...], tuple[str, ...]]:
    """Pair each image with its label -> (labels, notes on images without a label and labels without an image)."""
    folder = base / "labels"
    masks = files_below(folder, (".png",))
    by_stem = {file.relative_to(folder).with_suffix("").as_posix(): file for file in masks}
    owner: dict[str, str] = {}
    for name in names:
        stem = Path(name).with_suffix("").as_posix()
        if stem in owner:
            both = f"{owner[stem]} and {name} would share the label {stem}.png"
            raise UserError(f"{base / 'images'}: {both}; rename or remove one of them")
        owner[stem] = name
    labels = tuple(by_stem.get(stem) for stem in owner)
    if not any(labels):
        example = f"for {names[0]} it would be {next(iter(owner))}.png, and {len(masks)} .png are there"
        raise UserError(f"{folder}: no label belongs to any image; {example}")
    without = [name for name, label in zip(names, labels) if label is None]
    stray = [mask for stem, mask in by_stem.items() if stem not in owner]
    notes = [f"{len(without)} of {len(names)} images have no label in {folder}, first {without[0]}"] if without else []
    if stray:
        notes.append(f"{len(stray)} labels in {folder} belong to no image, first {stray[0].relative_to(folder)}")
    return labels, tuple(notes)


def _read_classes(path: Path) -> tuple[str, ...]:
    """Read one class name a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write one class name a line, in UTF-8") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not 1 <= len(names) <= IGNORE:
        raise UserError(f"{path}: {len(names)} class names; write 1 to {IGNORE} of them, one a line")
    return names


def _count_classes(folders: tuple[Path, ...]) -> tuple[str, ...]:
    """Number the classes by the largest number in any label, read with a progress bar, and say the count on stderr."""
    masks = [file for folder in folders for file in files_below(folder, (".png",))]
    seen = np.zeros(IGNORE + 1, bool)
    for mask in Bar(iterable=masks, desc="counting classes", unit="label"):
        seen[read_label(mask)] = True
    numbers = np.flatnonzero(seen[:IGNORE])
    if not numbers.size:
        raise UserError(
            f"{folders[0]}: every pixel of every label is {IGNORE} (ignore); write class numbers from 0 into the labels"
        )
    classes = int(numbers[-1]) + 1
    count = f"{classes} classes by the largest number in {len(masks)} labels"
    tqdm.write(f"{folders[0].parent}: no classes.txt; {count}", file=sys.stderr)
    return tuple(f"class {number}" for number in range(classes))
