"""A folder of images: plain images in any nesting, or images with labels next to them.

The labelled layout is DIR/images/... and DIR/labels/...png: the same relative path and stem, 8-bit class numbers, 255 =
ignore; optionally with train/, val/ or test/ between DIR and the two, and a classes.txt at DIR with one name a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..system.progress import Bar, say
from .base import IGNORE, Files, Numbering, Split, files_below, read_lines
from .images import find_images, read_label

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Files):
    """A dataset of the image files in one folder; `open_folder` makes it."""

    label_folders: tuple[Path, ...] = ()  # of every split; without classes.txt their labels give the number of classes

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The names in classes.txt, else numbers up to the largest in any label of any split; None without labels.

        Without classes.txt every label is read once. UserError when one cannot be read, or no pixel has a class.
        """
        return super().class_names if self.numbering or not self.labelled else _count_classes(self.label_folders)


def open_folder(path: Path | str, split: Split) -> ImageFolder:
    """List the images of `path` for training ("train") or for evaluation ("val") without reading them.

    A folder has splits when its train/ comes with a val/ or test/, or holds images/; "val" is then val/, else test/.
    Otherwise both splits are the same images, and `held_out` is False. Within a split, images/ next to labels/ is the
    labelled layout, and anything else a plain folder of images. Images without a label are allowed.

    UserError when there are no images, when no label belongs to any image, and for a bad classes.txt.
    """
    root = Path(path).expanduser()
    base, held_out = _split_folder(root, split)
    name = base.resolve().name if base == root else f"{root.resolve().name}/{base.name}"
    if not _has_labels(base):
        images, top = find_images(base), base if base.is_dir() else base.parent
        names, labels = tuple(image.relative_to(top).as_posix() for image in images), (None,) * len(images)
        return ImageFolder(name=name, names=names, images=tuple(images), labels=labels, held_out=held_out)

    home = base.parent if base.name in SPLITS else base  # of classes.txt and the other splits, also for DIR/val itself
    classes = next((file for file in (base / "classes.txt", home / "classes.txt") if file.is_file()), None)
    folders = [home / other for other in SPLITS if home != base and _has_labels(home / other)] or [base]
    dataset = ImageFolder.matched(
        name,
        base / "images",
        find_images(base / "images"),
        base / "labels",
        held_out=held_out,
        numbering=None if classes is None else _read_classes(classes),
        label_folders=tuple(folder / "labels" for folder in folders),
    )
    if not dataset.labelled:
        image = Path(dataset.names[0])
        example = f"that of {image} would be {image.with_suffix('.png')}"
        raise UserError(f"{base / 'labels'}: no label belongs to any image; {example}")
    return dataset


def open_folder_splits(path: Path | str) -> tuple[ImageFolder, ImageFolder | None]:
    """Open (training images, evaluation images or None) of a folder."""
    train = open_folder(path, "train")
    base, _ = _split_folder(Path(path).expanduser(), "val")  # not opened without labels: it may be empty then
    return train, open_folder(path, "val") if train.labelled or _has_labels(base) else None


def _split_folder(root: Path, split: str) -> tuple[Path, bool]:
    """Return the folder that holds `split`, and whether it is apart from the training images."""
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


def _read_classes(path: Path) -> Numbering:
    """Read one class name a line."""
    names = tuple(read_lines(path))
    if not 1 <= len(names) <= IGNORE:
        raise UserError(f"{path}: {len(names)} class names; write 1 to {IGNORE} of them, one a line")
    return Numbering(str(path), names, range(len(names)))


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
    say(f"{folders[0].parent}: no classes.txt; {classes} classes by the largest number in {len(masks)} labels")
    return tuple(f"class {number}" for number in range(classes))
