"""A folder of images: plain images in any nesting, or images with label masks next to them.

The documented layout is DIR/images/... and DIR/labels/...png: the same relative path and stem, 8-bit class numbers, 255
= ignore; optionally with train/, val/ or test/ above or below the two, and a classes.txt at DIR with one name a line.
`scan` recognises masks by other names too, and `labels` what their numbers mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

import numpy as np

from ..errors import UserError
from ..system.stores import File, place
from . import formats, raster
from .base import IGNORE, Files, Split, files_below, read_lines
from .labelmap import Rows, mask_of, opened_labels, read_in_windows, reduced_mask
from .labels import Labelling
from .listing import Tree
from .masks import Mask, read_mask
from .reading import Picture, Rectangle
from .scan import IMAGE_FOLDERS, file_in, scan, split_folder

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
ALL_SPLITS = {word for words in SPLITS.values() for word in words}


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Files):
    """A dataset of the image files in one folder; `open_folder` makes it."""

    labelling: Labelling | None = None  # shared by all splits; None without labels
    windows: tuple[Rectangle | None, ...] = ()  # the part of its file that each image is; None or () for all of it

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The names in classes.txt, else those of the values in the labels of all splits; None without labels.

        Looks the values up when first asked. UserError when no label can be read, or the values are no classes.
        """
        return self.labelling.scheme.names if self.labelled and self.labelling else None

    @property
    def label_notes(self) -> tuple[str, ...]:
        return self.labelling.scheme.notes if self.labelled and self.labelling else ()

    def classes(self, path: File) -> np.ndarray:
        """Read the classes uint8 [H,W] of a label file. UserError as of `Labelling`."""
        return self.classes_of(read_mask(path), path)

    def classes_of(self, mask: Mask, path: File) -> np.ndarray:
        """The classes uint8 [H,W] of a mask."""
        return mask.numbers.astype(np.uint8) if self.labelling is None else self.labelling(mask, path)

    def window(self, index: int) -> Rectangle | None:
        return self.windows[index] if self.windows else None

    def in_windows(self, index: int) -> bool:
        """Whether an image lies in a map that is read in windows."""
        return raster.in_windows(self.images[index], self.reading, self.page(index))

    def picture(self, index: int) -> Picture:
        """Read an image: a window of a map, or all of a map with a pixel of every few, LAZY_PIXELS at most."""
        window = self.window(index)
        if window is None and not self.in_windows(index):
            return super().picture(index)
        if window is None:
            return raster.reduced(self.images[index], self.reading, self.page(index))
        with raster.opened(self.images[index], self.reading, self.page(index)) as opened:
            return opened.part(*window)

    def label(self, index: int) -> np.ndarray | None:
        """Read the label of what `picture` gives."""
        path, window = self.labels[index], self.window(index)
        if path is None or (window is None and not self.in_windows(index)):
            return super().label(index)
        page = read_in_windows(path)
        if page is not None:
            self.require_size(index, page.size)
        if window is not None:
            return self.classes_of(mask_of(path, window), path)
        step = raster.step_of(raster.size_of(self.images[index], self.reading, self.page(index)))
        if page is not None:
            return self.classes_of(reduced_mask(path, page, step), path)
        label = super().label(index)
        return None if label is None else label[step // 2 :: step, step // 2 :: step].copy()

    @contextmanager
    def opened(self, index: int) -> Iterator[tuple[Picture, np.ndarray | Rows | None]]:
        """An image and its label, for those who take windows of the one and rows of the other: maps are read as they
        are used. Errors as of `picture` and `label`, here or there."""
        file, path = self.images[index], self.labels[index]
        if self.windows or not self.in_windows(index):
            yield self.picture(index), self.label(index)
            return
        with raster.opened(file, self.reading, self.page(index)) as opened:
            page = read_in_windows(path)
            if path is None or page is None:
                yield opened.picture, super().label(index)
                return
            self.require_size(index, page.size)
            with opened_labels(path, page) as labels:
                yield opened.picture, Rows(labels, partial(self.classes_of, path=path))


def open_folder(path: Path | str, split: Split, ignore: Sequence[int] = ()) -> ImageFolder:
    """List the images of `path` for training ("train") or for evaluation ("val"); opens a few masks at most.

    A folder has splits when its train/ comes with a val/ (valid/) or test/, or holds images/; "val" is then val/, else
    test/. So has images/ with train/ and others below it. Otherwise both splits are the same images, and `held_out` is
    False. Images without a label are allowed.

    ignore: numbers in the labels that count as not labelled.

    UserError when there are no images, when the files in labels/ belong to no image, and for a bad classes.txt.
    """
    return Folder(place(path), ignore).open(split)


def open_folder_splits(path: Path | str, ignore: Sequence[int] = ()) -> tuple[ImageFolder, ImageFolder | None]:
    """Open (training images, evaluation images or None) of a folder."""
    folder = Folder(place(path), ignore)
    train = folder.open("train")
    if not folder.scan.labels:
        return train, None  # val/ is not looked at: it may be empty
    val = folder.open("val")
    if val.labelled or not train.labelled:
        return train, val if val.labelled else None
    note = f"no image of {val.name} has a label: figures are taken on the training images"
    return replace(train, notes=(*train.notes, note)), replace(train, held_out=False)


class Folder:
    """The image files at or below `root`, or in the tar files that it names, and how they fall into splits."""

    def __init__(self, root: File, ignore: Sequence[int]):
        self.scan, self.labelling = scan(root), None
        self.root: Path | Tree = root if isinstance(root, Path) else self.scan.folder
        if isinstance(self.scan.folder, Tree):  # of tar files on this disk, too
            self.root = self.scan.folder
        if not self.scan.labels:
            return
        masks, homes = {self.scan.file(mask) for mask in self.scan.labels.values()}, [self.root]
        if isinstance(root, Path) and root is self.root and root.name.casefold() in ALL_SPLITS:
            homes.append(root.parent)  # of classes.txt and the other splits
            for other in sorted(root.parent.iterdir()):
                if other != root and other.name.casefold() in ALL_SPLITS:
                    with suppress(UserError):  # empty
                        masks |= set(map(partial(file_in, other), scan(other).labels.values()))
        classes = next((file for home in homes if (file := file_below(home, "classes.txt")) is not None), None)
        self.labelling = Labelling(
            place=str(homes[-1]),
            files=tuple(sorted(masks)),
            names=None if classes is None else _read_classes(classes),
            owner=str(classes or ""),
            ignore=tuple(ignore),
        )

    def open(self, split: Split) -> ImageFolder:
        """List a split. Errors as of `open_folder`."""
        base, held_out = self._split(split)
        folder, root = self.scan.folder / base, self.root.resolve().name
        name = f"{root}/{base.name}" if base.parts else root if self.root.is_dir() else self.root.name
        photos = [photo for photo in self.scan.photos if base in photo.parents]
        labels = [self.scan.labels.get(photo) for photo in photos]
        if not photos:
            raise UserError(f"--data {folder}: no images in it; add some, or take the folder away")
        if not any(labels) and isinstance(folder, Path) and is_folder_of_labels(folder):
            example = f"that of {photos[0].name} would be {photos[0].with_suffix('.png').name}"
            raise UserError(f"{folder / 'labels'}: no label belongs to any image; {example}")
        firsts = {photo.relative_to(base).parts[0] for photo in photos}
        top = base / firsts.pop() if any(labels) and len(firsts) == 1 and all(map(is_images, firsts)) else base
        names = tuple(photo.relative_to(top).as_posix() for photo in photos)
        return ImageFolder(
            name=name,
            names=names,
            images=tuple(map(self.scan.file, photos)),
            labels=tuple(None if label is None else self.scan.file(label) for label in labels),
            held_out=held_out,
            labelling=self.labelling,
            notes=(*self.scan.notes, *self._missing(name, base, names, labels)),
        )

    def _missing(
        self, name: str, base: PurePosixPath, names: Sequence[str], labels: Sequence[PurePosixPath | None]
    ) -> list[str]:
        """Say which images have no label, and which labels no image."""
        notes = []
        used = [label for label in labels if label is not None]
        missing = [image for image, label in zip(names, labels) if label is None]
        if used and missing:
            where = self._places(used)
            notes.append(f"{len(missing)} of {len(names)} {name} images have no label in {where}, first {missing[0]}")
        stray = [mask for mask in self.scan.stray if base in mask.parents]
        if stray:
            notes.append(f"{len(stray)} labels in {self._places(stray)} belong to no image, first {stray[0].name}")
        return notes

    def _places(self, masks: Sequence[PurePosixPath]) -> str:
        """Write where masks lie: the folder above all of them, and their suffixes."""
        common = os.path.commonpath([mask.parent for mask in masks])
        suffixes = sorted({f"*{mask.suffix.lower()}" for mask in masks})
        return f"{self.scan.folder / common} ({' '.join(suffixes)})"

    def _split(self, split: Split) -> tuple[PurePosixPath, bool]:
        """Return the folder that holds `split`, relative to all files, and whether it is apart from the training."""
        top = PurePosixPath()
        loose = {photo.parts[0] for photo in self.scan.photos if len(photo.parts) < 3}
        images = sorted({photo.parts[0] for photo in self.scan.photos} - loose)
        for above in (top, *(PurePosixPath(name) for name in images if is_images(name))):
            present = self._splits_below(above)
            if not self._falls_into(present, below_images=above != top):
                continue
            held_out = [present[name] for name in ("val", "test") if name in present]
            if split == "val" and held_out:
                return held_out[0], True
            if "train" not in present:
                here = [folder.name for folder in present.values()]
                advice = f"add train/images, or give {self.root / held_out[0]}"
                raise UserError(f"--data {self.root}: has {' and '.join(here)} but no train folder; {advice}")
            return present["train"], False
        return top, False

    def _splits_below(self, above: PurePosixPath) -> dict[str, PurePosixPath]:
        """Return the folders of splits by the name of the split."""
        names = {name.casefold(): name for name in folder_names(self.scan.folder / above)}
        return {
            split: above / names[word]
            for split, words in SPLITS.items()
            if (word := next((word for word in words if word in names), None)) is not None
        }

    def _falls_into(self, present: Mapping[str, PurePosixPath], *, below_images: bool) -> bool:
        """Return whether the photos fall into the splits whose folders are present."""
        if not self.root.is_dir() or not present:
            return False
        if "train" in present and len(present) > 1:
            return True
        if below_images:
            return False
        # a lone train/ in a plain folder may well hold pictures of trains
        train = present.get("train")
        if train is not None and any(map(is_images, folder_names(self.scan.folder / train))):
            return True
        inside = [any(folder in photo.parents for folder in present.values()) for photo in self.scan.labels]
        return bool(inside) and all(inside)


def is_images(name: str) -> bool:
    """Return whether a folder of this name holds images, and not their masks."""
    word, rest = split_folder(name, masks=False)
    return word in IMAGE_FOLDERS and not rest


def folder_names(folder: Path | Tree) -> list[str]:
    """The names of the folders in a folder."""
    return folder.folders() if isinstance(folder, Tree) else [path.name for path in folder.iterdir() if path.is_dir()]


def file_below(folder: Path | Tree, name: str) -> File | None:
    """The file of this name in a folder, if it is there."""
    if isinstance(folder, Tree):
        return folder.file(name)
    return folder / name if (folder / name).is_file() else None


def is_folder_of_labels(folder: Path) -> bool:
    """Return whether a folder looks like the documented layout."""
    return (folder / "images").is_dir() and bool(files_below(folder / "labels", formats.LABELS))


def _read_classes(path: File) -> tuple[str, ...]:
    """Read one class name a line."""
    names = tuple(read_lines(path))
    if not 1 <= len(names) <= IGNORE:
        raise UserError(f"{path}: {len(names)} class names; write 1 to {IGNORE} of them, one a line")
    return names
