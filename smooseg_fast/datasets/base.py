"""The protocol of a dataset, and what all datasets of image and label files share."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np

from ..errors import UserError
from ..system.files import open_binary, state_of
from ..system.stores import File
from .formats import PHOTOS
from .images import image_size, read_label, read_picture, visible_files
from .reading import PLAIN, Picture, Reading

IGNORE = 255  # the class number of unlabelled pixels

Split = Literal["train", "val"]
Listing = TypeVar("Listing", bound="Files")


class Dataset(Protocol):
    """Images by number, with or without labels. Several threads and processes may read at once."""

    @property
    def name(self) -> str: ...  # for logs

    @property
    def names(self) -> tuple[str, ...]: ...  # unique, posix paths relative to the folder of the images, with suffix

    @property
    def labelled(self) -> bool: ...

    @property
    def held_out(self) -> bool: ...  # whether training never sees these images

    @property
    def notes(self) -> tuple[str, ...]: ...  # shown at the start of a run: images left out, labels missing

    @property
    def class_names(self) -> tuple[str, ...] | None: ...  # None without labels

    def __len__(self) -> int: ...

    @property
    def reading(self) -> Reading: ...  # how files become pictures

    def picture(self, index: int) -> Picture: ...  # ImageError when it cannot be used

    def image(self, index: int) -> np.ndarray: ...  # its pixels, uint8 [H,W,3]

    def label(self, index: int) -> np.ndarray | None: ...  # uint8 [H,W], class numbers or IGNORE; None without a label

    def fingerprint(self) -> str: ...  # hex digest that changes when the images do


def classes_of(dataset: Dataset) -> tuple[str, ...]:
    """Return the class names of a dataset with labels. ValueError for one without."""
    names = dataset.class_names
    if names is None:
        raise ValueError(f"{dataset.name} has no labels, and so no classes")
    return names


@dataclass(frozen=True)
class Numbering:
    """The numbers in label files, and the classes they stand for.

    Attributes:
        owner: who defines them, for people.
        names: of the classes, 0 upwards.
        classes: the class, or IGNORE, of each legal number 0, 1, ... IGNORE itself is always legal.
    """

    owner: str
    names: tuple[str, ...]
    classes: Sequence[int]

    def ignoring(self, numbers: Iterable[int]) -> Numbering:
        """Return a numbering in which these numbers, too, count as not labelled."""
        chosen = set(numbers)
        classes = [IGNORE if number in chosen else known for number, known in enumerate(self.classes)]
        return replace(self, classes=tuple(classes))

    def __call__(self, numbers: np.ndarray, path: File) -> np.ndarray:
        """Turn the integers [H,W] on disk into classes uint8 [H,W]. UserError naming `path` for illegal numbers."""
        class_of = np.full(256, -1, np.int16)
        class_of[: len(self.classes)] = self.classes
        class_of[IGNORE] = IGNORE
        narrow = numbers.astype(np.uint8)  # -1 becomes 255: not labelled
        classes = class_of[narrow]
        illegal = numbers[(classes < 0) | (narrow != numbers) & (numbers != -1)]
        if illegal.size:
            raise UserError(
                f"{path}: the number {illegal.max()} in {illegal.size} pixels, which is no class of {self.owner} "
                f"(0 to {len(self.classes) - 1}, and {IGNORE} to ignore); correct the label, or copy the original again"
            )
        return classes.astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Files:
    """Image files and the label file, or None, of each, listed but not opened."""

    name: str
    names: tuple[str, ...]
    images: tuple[File, ...]
    labels: tuple[File | None, ...]
    held_out: bool
    notes: tuple[str, ...] = ()
    numbering: Numbering | None = None  # None: the numbers in the labels are the classes
    reading: Reading = PLAIN
    pages: tuple[int, ...] = ()  # of the file of each image, from 1; () reads the page that `reading` names
    reads_files: ClassVar[bool] = True  # whether `reading` is followed

    @classmethod
    def matched(
        cls: type[Listing],
        name: str,
        folder: Path,
        images: Sequence[Path],
        labels: Path,
        *,
        suffix: str = ".png",
        endings: tuple[str, str] = ("", ""),
        present: Sequence[Path] | None = None,
        notes: Sequence[str] = (),
        **fields: Any,
    ) -> Listing:
        """Pair `images` in `folder` with the files in the folder `labels` that have the same relative path.

        Args:
            suffix: of the labels.
            endings: of the stem of an image, and what the label's stem has in place of it.
            present: all images on disk, if `images` is a choice of them.
        """

        def key(file: Path, top: Path, ending: str) -> str:
            path = file.relative_to(top).with_suffix("").as_posix().removesuffix(ending)
            return unicodedata.normalize("NFC", path)  # archives made on a Mac have other forms of letters

        keys = {image: key(image, folder, endings[0]) for image in present or images}
        files = [file for file in files_below(labels, (suffix,)) if file.stem.endswith(endings[1])]
        by_key = {key(file, labels, endings[1]): file for file in files}
        paired = tuple(by_key.get(keys[image]) for image in images)
        names = tuple(image.relative_to(folder).as_posix() for image in images)
        missing = [name for name, label in zip(names, paired) if label is None]
        stray = [by_key[key].relative_to(labels) for key in sorted(by_key.keys() - keys.values())]
        notes, where = list(notes), f"{labels} (*{endings[1]}{suffix})"
        if not any(paired):
            notes.append(f"no labels: none of the {len(images)} images of {name} has one in {where}")
        elif missing:
            notes.append(f"{len(missing)} of {len(images)} {name} images have no label in {where}, first {missing[0]}")
        if stray:
            notes.append(f"{len(stray)} labels in {where} belong to no image, first {stray[0]}")
        return cls(name=name, names=names, images=tuple(images), labels=paired, notes=tuple(notes), **fields)

    @classmethod
    def of_owner(
        cls: type[Listing],
        numbering: Numbering,
        split: str,
        images: Path,
        labels: Path,
        *,
        suffixes: tuple[str, ...] = PHOTOS,
        listed: Path | None = None,
        unlisted: Path | None = None,
        notes: Sequence[str] = (),
        **matching: Any,
    ) -> Listing:
        """List a split of an owner. `matching`: options of `matched`.

        Args:
            listed: a file with the stem of each image of the split on a line, in order; None for all.
            unlisted: such a file of images to leave out.

        Raises:
            UserError: when there is no image, or a list cannot be read.
        """
        name = f"{numbering.owner} {split}"
        present = files_below(images, suffixes)
        left_out = set() if unlisted is None else set(read_lines(unlisted))
        chosen = [file for file in present if file.stem not in left_out]
        if listed is not None:
            by_stem, entries = {file.stem: file for file in present}, list(dict.fromkeys(read_lines(listed)))
            chosen = [by_stem[entry] for entry in entries if entry in by_stem]
            missing = [entry for entry in entries if entry not in by_stem]
            first = f"{len(missing)} of {len(entries)} images listed in {listed} are not there, first"
            notes = [*notes, *(f"{first} {entry}" for entry in missing[:1])]
        if not chosen:
            names = "" if listed is None else f" that {listed} lists"
            raise UserError(f"--data {images}: has no images of {name}{names}; unpack them there")
        return cls.matched(
            name,
            images,
            chosen,
            labels,
            held_out=split != "train",
            numbering=numbering,
            present=present,
            notes=notes,
            **matching,
        )

    @cached_property
    def labelled(self) -> bool:
        return any(self.labels)

    @property
    def label_notes(self) -> tuple[str, ...]:
        """Lines about the numbers in the label files."""
        return ()

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.numbering.names if self.labelled and self.numbering else None

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, index: int) -> Picture:
        """Read an image; ImageError when the file cannot be decoded."""
        return read_picture(self.images[index], self.reading, self.page(index))

    def page(self, index: int) -> int | None:
        """The page of its file that an image is, from 1; None for the one that `reading` names."""
        return self.pages[index] if self.pages else None

    def image(self, index: int) -> np.ndarray:
        """Read the pixels uint8 [H,W,3] alone."""
        return self.picture(index).pixels

    def label(self, index: int) -> np.ndarray | None:
        """Read uint8 [H,W], or None. UserError for a size unlike the image's, or a value that is no class number."""
        path = self.labels[index]
        if path is None:
            return None
        label = self.classes(path)
        self.require_size(index, (label.shape[0], label.shape[1]))
        return label

    def require_size(self, index: int, label: tuple[int, int]) -> None:
        """UserError for a label of another (height, width) than its image."""
        # the header is quick and nearly always right; before blaming the user, look at the pixels
        if label != self.size(index) and label != (shape := self.image(index).shape[:2]):
            raise UserError(
                f"{self.labels[index]}: the label is {extent(label)} pixels but {self.images[index]} is "
                f"{extent(shape)}; make them the same size"
            )

    def classes(self, path: File) -> np.ndarray:
        """Read the classes uint8 [H,W] of a label file."""
        numbers = self.numbers(path)
        return numbers if self.numbering is None else self.numbering(numbers, path)

    def numbers(self, path: File) -> np.ndarray:
        """Read the integers [H,W] of a label file."""
        return read_label(path)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of an image the quickest way."""
        return image_size(self.images[index])

    def fingerprint(self) -> str:
        """Hash names, file sizes and modification times in order; moving the folder changes nothing."""
        digest = hashlib.sha256()
        for name, path in zip(self.names, self.images):
            known = state_of(path)
            state = "gone" if known is None else f"{known[0]}\0{known[1]}"  # gone: a broken link
            digest.update(f"{name}\0{state}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A dataset in its owner's layout on disk.

    Attributes:
        title: the layout, for people.
        preset: the settings that go with it.
        parts: the owner's splits on disk, and how to list each. "train" is for learning and "val" for evaluation; the
            others are only counted.
        pictures: a folder of nothing but images to segment; None if there is none.
    """

    title: str
    preset: str
    root: Path
    parts: Mapping[str, Callable[[], Files]]
    pictures: Path | None = None

    def open(self, split: Split) -> Files:
        """List a split; without "val" its images are those of "train", not held out. UserError without "train"."""
        if split in self.parts:
            return self.parts[split]()
        if "train" not in self.parts:
            raise UserError(
                f"--data {self.root}: {self.title} has {' and '.join(self.parts)} but no images of {split}; add them"
            )
        return replace(self.parts["train"](), held_out=False)


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the visible files of these suffixes anywhere below `folder`, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return [file for file in visible_files(folder, "--data") if file.suffix.lower() in suffixes]


def first_folder(*candidates: Path) -> Path | None:
    """Return the first of the candidates that is a folder."""
    return next((folder for folder in candidates if folder.is_dir()), None)


def read_lines(path: File) -> list[str]:
    """Read the lines of a text file that are not blank. UserError when it cannot be read."""
    try:
        with open_binary(path) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write it again, in UTF-8") from error
    return [line.strip() for line in lines if line.strip()]


def extent(shape: tuple[int, ...]) -> str:
    """Write (height, width) as people do: width x height."""
    return f"{shape[1]} x {shape[0]}"
