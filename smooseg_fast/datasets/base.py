"""The protocol of a dataset, and what all datasets of image and label files share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from ..errors import UserError
from .images import SUFFIXES, image_size, read_image, read_label, visible_files

IGNORE = 255  # the class number of unlabelled pixels

Split = Literal["train", "val"]


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

    def image(self, index: int) -> np.ndarray: ...  # uint8 [H,W,3]; ImageError when it cannot be used

    def label(self, index: int) -> np.ndarray | None: ...  # uint8 [H,W], class numbers or IGNORE; None without a label

    def fingerprint(self) -> str: ...  # hex digest that changes when the images do


class Listing(Dataset, Protocol):
    """A dataset listed from disk: a dataclass, so `replace` copies it with other notes."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def classes_of(dataset: Dataset) -> tuple[str, ...]:
    """Return the class names of a dataset with labels. ValueError for one without."""
    names = dataset.class_names
    if names is None:
        raise ValueError(f"{dataset.name} has no labels, and so no classes")
    return names


@dataclass(frozen=True, kw_only=True)
class Files:
    """Image files and the label file, or None, of each, listed but not opened."""

    name: str
    names: tuple[str, ...]
    images: tuple[Path, ...]
    labels: tuple[Path | None, ...]
    held_out: bool
    notes: tuple[str, ...] = ()

    @cached_property
    def labelled(self) -> bool:
        return any(label is not None for label in self.labels)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> np.ndarray:
        """Read uint8 [H,W,3]; ImageError when the file cannot be decoded."""
        return read_image(self.images[index])

    def label(self, index: int) -> np.ndarray | None:
        """Read uint8 [H,W], or None. UserError for a size unlike the image's, or a value that is no class number."""
        path = self.labels[index]
        if path is None:
            return None
        label = self.class_numbers(path)
        # the header is quick and nearly always right; before blaming the user, look at the pixels
        if label.shape != self.size(index) and label.shape != (shape := self.image(index).shape[:2]):
            raise UserError(
                f"{path}: the label is {extent(label.shape)} pixels but {self.images[index]} is {extent(shape)}; "
                "make them the same size"
            )
        return label

    def class_numbers(self, path: Path) -> np.ndarray:
        """Read a label file as uint8 [H,W]."""
        return read_label(path)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of an image the quickest way."""
        return image_size(self.images[index])

    def fingerprint(self) -> str:
        """Hash names, file sizes and modification times in order; moving the folder changes nothing."""
        return files_digest(zip(self.names, self.images))


@dataclass(frozen=True)
class Numbering:
    """The numbers in an owner's label files, and the classes they stand for.

    Attributes:
        names: class names, 0 upwards.
        classes: legal number on disk -> its class, or IGNORE. IGNORE itself is always legal.
    """

    owner: str
    names: tuple[str, ...]
    classes: Mapping[int, int]

    @cached_property
    def _class_of(self) -> np.ndarray:
        """int16 [256], -1 for numbers that the owner does not use."""
        class_of = np.full(256, -1, np.int16)
        class_of[list(self.classes)] = list(self.classes.values())
        class_of[IGNORE] = IGNORE
        return class_of

    def __call__(self, numbers: np.ndarray, path: Path) -> np.ndarray:
        """Turn the integers [H,W] on disk into classes uint8 [H,W]. UserError naming `path` for illegal numbers."""
        narrow = numbers.astype(np.uint8)  # -1 becomes 255: not labelled
        classes = self._class_of[narrow]
        illegal = numbers[(classes < 0) | (narrow != numbers) & (numbers != -1)]
        if illegal.size:
            raise UserError(
                f"{path}: the number {illegal.max()} in {illegal.size} pixels, which labels of {self.owner} do not "
                f"have ({min(self.classes)} to {max(self.classes)}, and {IGNORE} to ignore); give the owner's own files"
            )
        return classes.astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class NumberedFiles(Files):
    """Files with an owner's numbers in their labels."""

    numbering: Numbering

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.numbering.names if self.labelled else None

    def class_numbers(self, path: Path) -> np.ndarray:
        return self.numbering(super().class_numbers(path), path)


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
    parts: Mapping[str, Callable[[], Listing]]
    pictures: Path | None

    def open(self, split: Split) -> Listing:
        """List a split; without "val" its images are those of "train", not held out. UserError without "train"."""
        if split not in ("train", "val"):
            raise ValueError(f'split must be "train" or "val", not {split!r}')
        if split in self.parts:
            return self.parts[split]()
        if "train" not in self.parts:
            raise UserError(
                f"--data {self.root}: {self.title} has {' and '.join(self.parts)} but no images of {split}; add them"
            )
        return replace(self.parts["train"](), held_out=False)


def numbered_files(
    name: str,
    top: Path,
    images: list[Path],
    labels: list[Path],
    numbering: Numbering,
    *,
    label_name: Callable[[str], str],
    held_out: bool,
    where: str,
    present: list[Path] | None = None,
    notes: Iterable[str] = (),
    kind: type[NumberedFiles] = NumberedFiles,
) -> NumberedFiles:
    """Pair images below `top` with labels: the stem of an image's label is `label_name` of its own stem.

    Args:
        present: all images on disk, if `images` is a choice of them.
        where: the place of the labels, for notes on missing labels and on labels without an image.

    Raises:
        UserError: when there is no image.
    """
    if not images:
        raise UserError(f"--data {top}: no images in it; unpack the images of {name} there")
    by_stem = {label.stem: label for label in labels}
    paired = [by_stem.get(label_name(image.stem)) for image in images]
    missing = [image.name for image, label in zip(images, paired) if label is None]
    notes = list(notes)
    if missing and len(missing) == len(images):
        notes.append(f"no labels: none of the {len(images)} images of {name} has one in {where}")
    elif missing:
        notes.append(f"{len(missing)} of {len(images)} images of {name} have no label in {where}, first {missing[0]}")
    expected = {label_name(image.stem) for image in (images if present is None else present)}
    stray = [label for label in labels if label.stem not in expected]
    if stray:
        notes.append(f"{len(stray)} labels in {where} belong to no image, first {stray[0].name}")
    names = tuple(image.relative_to(top).as_posix() for image in images)
    return kind(
        name=name,
        names=names,
        images=tuple(images),
        labels=tuple(paired),
        held_out=held_out,
        notes=tuple(notes),
        numbering=numbering,
    )


def files_below(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """List the visible files of these suffixes anywhere below `folder`, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return [file for file in visible_files(folder, "--data") if file.suffix.lower() in suffixes]


def first_folder(*candidates: Path) -> Path | None:
    """Return the first of the candidates that is a folder."""
    return next((folder for folder in candidates if folder.is_dir()), None)


def read_list(path: Path) -> list[str]:
    """Read a list file: one entry a line, without suffix, in order, each once. UserError when it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it again") from error
    entries = [line.strip() for line in lines if line.strip()]
    known = (*SUFFIXES, ".mat")
    return list(dict.fromkeys(Path(entry).stem if Path(entry).suffix.lower() in known else entry for entry in entries))


def pick(listed: list[str], files: list[Path], path: Path) -> tuple[list[Path], list[str]]:
    """Pick the files whose stems the list file at `path` names -> (files in its order, notes on those missing).

    UserError when none is there.
    """
    by_stem = {file.stem: file for file in files}
    picked = [by_stem[entry] for entry in listed if entry in by_stem]
    missing = [entry for entry in listed if entry not in by_stem]
    if not picked:
        example = f", such as {missing[0]}," if missing else ""
        raise UserError(
            f"{path}: none of the {len(listed)} images that it lists{example} is there; unpack the images next to it"
        )
    if not missing:
        return picked, []
    return picked, [f"{len(missing)} of {len(listed)} images listed in {path} are not there, first {missing[0]}"]


def files_digest(files: Iterable[tuple[str, Path]]) -> str:
    """Hash names, sizes and modification times; a file that is gone (a broken link) counts as "gone"."""
    digest = hashlib.sha256()
    for name, path in files:
        try:
            status = path.stat()
            state = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError:
            state = "gone"
        digest.update(f"{name}\0{state}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def extent(shape: tuple[int, ...]) -> str:
    """Write (height, width) as people do: width x height."""
    return f"{shape[1]} x {shape[0]}"
