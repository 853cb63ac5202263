"""What a dataset is, and what those made of image files beside label files share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ..errors import UserError
from .images import SUFFIXES, image_size, read_image, read_label, visible_files

IGNORE = 255  # the class number of pixels that nobody labelled

Split = Literal["train", "val"]


class Dataset(Protocol):
    """Images by number, with or without labels. Reading may happen from several threads and processes at once."""

    name: str  # for logs
    names: tuple[str, ...]  # unique, posix paths relative to the folder of the images, with suffix
    labelled: bool
    held_out: bool  # whether these images were kept apart from training
    notes: tuple[str, ...]  # what a run on them should say first: what was left out, or is missing

    @property
    def class_names(self) -> tuple[str, ...] | None: ...  # None without labels

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray: ...  # uint8 [H,W,3]; ImageError when it cannot be used

    def label(
        self, index: int
    ) -> np.ndarray | None: ...  # uint8 [H,W], class numbers or IGNORE; None where there is no label

    def fingerprint(self) -> str: ...  # hex digest that changes when the images do


@dataclass(frozen=True, kw_only=True)
class Files:
    """Image files and the label file, or None, of each; listed when it is made, but none opened."""

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
        """uint8 [H,W,3]; ImageError when the file cannot be decoded."""
        return read_image(self.images[index])

    def label(self, index: int) -> np.ndarray | None:
        """uint8 [H,W], or None. UserError when the size is not the image's, or a value is neither a class number nor IGNORE."""
        path = self.labels[index]
        if path is None:
            return None
        label = self.class_numbers(path)
        # the header is quick and nearly always right; before blaming the user, look at the pixels
        if label.shape != self.size(index) and label.shape != (shape := self.image(index).shape[:2]):
            found = f"{path}: the label is {extent(label.shape)} pixels but {self.images[index]} is {extent(shape)}"
            raise UserError(f"{found}; make them the same size")
        return label

    def class_numbers(self, path: Path) -> np.ndarray:
        """The label file as uint8 [H,W]."""
        return read_label(path)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image by the quickest way."""
        return image_size(self.images[index])

    def fingerprint(self) -> str:
        """Of names, file sizes and modification times, in order; the folder may be moved."""
        return files_digest(zip(self.names, self.images))


@dataclass(frozen=True)
class Numbering:
    """The numbers that an owner's label files hold, and the classes they stand for.

    names: of the classes, 0 upwards. classes: for each legal number on disk its class, or IGNORE. IGNORE itself is always legal.
    """

    owner: str
    names: tuple[str, ...]
    classes: Mapping[int, int]

    @cached_property
    def _table(self) -> np.ndarray:
        """int16 [256], -1 where the owner has no such number."""
        table = np.full(256, -1, np.int16)
        table[list(self.classes)] = list(self.classes.values())
        table[IGNORE] = IGNORE
        return table

    def __call__(self, numbers: np.ndarray, path: Path) -> np.ndarray:
        """uint8 [H,W] classes of `numbers`, integers [H,W] as they are on disk. UserError naming `path` for others."""
        narrow = numbers.astype(np.uint8)  # -1 becomes 255: not labelled
        odd = (narrow != numbers) & (numbers != -1)
        found = self._table[narrow]
        wrong = numbers[(found < 0) | odd]
        if wrong.size:
            raise UserError(
                f"{path}: the number {wrong.max()} in {wrong.size} pixels, which labels of {self.owner} do not have "
                f"({min(self.classes)} to {max(self.classes)}, and {IGNORE} to ignore); give the owner's own label files"
            )
        return found.astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class NumberedFiles(Files):
    """Files whose labels hold an owner's numbers."""

    numbering: Numbering

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.numbering.names if self.labelled else None

    def class_numbers(self, path: Path) -> np.ndarray:
        return self.numbering(super().class_numbers(path), path)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A dataset as its owner lays it out on disk.

    title: what was recognised, for people. preset: the settings that go with it. parts: the owner's splits that are there, and how each
    is listed; those called "train" and "val" are learnt from and measured on, others only counted. pictures: a folder of nothing but
    images to be segmented, None where there are no files of that kind.
    """

    title: str
    preset: str
    root: Path
    parts: Mapping[str, Callable[[], Dataset]]
    pictures: Path | None

    def open(self, split: Split) -> Dataset:
        """Without "val" the images of "train", which are then not held out. UserError without "train" where it is asked for."""
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
    """Images below `top` with their labels: those of `labels` whose stem is `label_name` of the image's.

    present: all images on disk, where `images` is a choice of them. where: where labels were looked for, said in the notes when some or
    all are missing or belong to no image. UserError when there is no image.
    """
    if not images:
        raise UserError(f"--data {top}: no images in it; unpack the images of {name} there")
    by_stem = {label.stem: label for label in labels}
    found = [by_stem.get(label_name(image.stem)) for image in images]
    missing = [image.name for image, label in zip(images, found) if label is None]
    notes = list(notes)
    if missing and len(missing) == len(images):
        notes.append(f"no labels: none of the {len(images)} images of {name} has one in {where}")
    elif missing:
        notes.append(f"{len(missing)} of {len(images)} images of {name} have no label in {where}, first {missing[0]}")
    owned = {label_name(image.stem) for image in (images if present is None else present)}
    stray = [label for label in labels if label.stem not in owned]
    if stray:
        notes.append(f"{len(stray)} labels in {where} belong to no image, first {stray[0].name}")
    names = tuple(image.relative_to(top).as_posix() for image in images)
    return kind(
        name=name,
        names=names,
        images=tuple(images),
        labels=tuple(found),
        held_out=held_out,
        notes=tuple(notes),
        numbering=numbering,
    )


def files_below(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Visible files of these suffixes anywhere below `folder`, sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return [file for file in visible_files(folder, "--data") if file.suffix.lower() in suffixes]


def first_folder(*candidates: Path) -> Path | None:
    return next((folder for folder in candidates if folder.is_dir()), None)


def read_list(path: Path) -> list[str]:
    """The entries of a list file, one a line, without suffix, in order, each once. UserError when it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it again") from error
    entries = [line.strip() for line in lines if line.strip()]
    known = (*SUFFIXES, ".mat")
    return list(dict.fromkeys(Path(entry).stem if Path(entry).suffix.lower() in known else entry for entry in entries))


def pick(listed: list[str], files: list[Path], path: Path) -> tuple[list[Path], list[str]]:
    """(the files whose stem a list file at `path` names, in its order; notes on those it names in vain). UserError when none is left."""
    by_stem = {file.stem: file for file in files}
    found = [by_stem[entry] for entry in listed if entry in by_stem]
    lost = [entry for entry in listed if entry not in by_stem]
    if not found:
        example = f", such as {lost[0]}," if lost else ""
        raise UserError(
            f"{path}: none of the {len(listed)} images that it lists{example} is there; unpack the images beside it"
        )
    return found, [
        f"{len(lost)} of {len(listed)} images listed in {path} are not there, first {lost[0]}"
    ] if lost else []


def files_digest(files: Iterable[tuple[str, Path]]) -> str:
    """A file that is gone, as where a link leads nowhere, counts as such: a run skips it like others that cannot be read."""
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
    return f"{shape[1]} x {shape[0]}"
