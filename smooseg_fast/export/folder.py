"""A folder of predictions as exports read it: its groups, and one image after the other."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import cast

import numpy as np

from ..datasets import IGNORE
from ..datasets.images import ImageError
from ..errors import UserError
from ..segment.names import read_groups
from ..show.predictions import DONE, GROUPS, MASKS, SHARES, is_record, say_skipped
from ..system.outfolder import Journal
from ..system.progress import Bar
from ..system.stores import File, Remote, is_url, place, sizes_below
from .place import Place, place_of, read_plane

BAND = 512  # rows that are looked at at a time
CONFIDENCE = "confidence"  # the folder next to that of masks
SURE = 254  # a confidence of 1 in its files


@dataclass(frozen=True)
class Segmented:
    """One image of the folder.

    Attributes:
        name: of the image, relative to the folder of images, posix; a page of a stack has its number in it.
        stem: the name of its files in the folder of predictions, without suffix.
        file: the image itself, which may be gone.
        mask: the file of its labels, PNG or GeoTIFF.
        labels: uint8 [H,W], numbers of groups; IGNORE where the image shows no data.
        confidence_file: how sure they are; None where predict wrote none.
    """

    name: str
    stem: str
    file: Path
    mask: Path
    labels: np.ndarray
    confidence_file: Path | None

    def confidence(self) -> np.ndarray | None:
        """How sure each label is, uint8 [H,W], 0 to SURE; any value where the label is IGNORE.

        None where predict wrote no confidence; UserError where it cannot be read.
        """
        if self.confidence_file is None:
            return None
        confidence = read_plane(self.confidence_file)
        if confidence.shape != self.labels.shape:
            raise UserError(f"{self.confidence_file}: differs in size from {self.mask}; run smooseg predict again")
        return confidence

    @property
    def is_file(self) -> bool:
        """Whether other tools find it by its name: it is no page of a stack, and the name of its file is text."""
        return PurePath(self.name).name == self.file.name

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.labels.shape[0], self.labels.shape[1]

    @cached_property
    def place(self) -> Place | None:
        """The image's place on a map, by its mask or by the image; None where neither tells."""
        return next((place for path in (self.mask, self.file) if (place := place_of(path, self.size))), None)


class PredictionFolder:
    """The images that `smooseg predict` segmented into the folder at `path`, in the order of their names.

    Iterate over it once, which shows a bar. An image whose mask cannot be read is skipped, with a line that says why.
    UserError where the folder holds no predictions.

    Attributes:
        skipped: how many images were.
        not_files: the names of images that are no files, see `Segmented.is_file`.
    """

    def __init__(self, path: File):
        self.path, self.skipped = cast(Path, path), 0  # a Remote has the same attributes
        self.not_files: list[str] = []
        self._listed = {str(file) for file in sizes_below(path)} if isinstance(path, Remote) else None
        if not (path / DONE).is_file():
            inner = sorted(folder.name for folder in self._folders() if (folder / DONE).is_file())
            if inner:
                raise UserError(f"--predictions {path}: holds {', '.join(inner)}; give one of them")
            raise UserError(f"--predictions {path}: holds no {DONE}; give the --out folder of smooseg predict")
        records = {record["stem"]: record for record in Journal.at(path / DONE).read(is_record) if record["stamp"]}
        # (name, stem, place of the file) of every image
        places = ((stem, str(record["stamp"][0])) for stem, record in records.items())
        self._lines = sorted((name_of(stem, file), stem, file) for stem, file in places)
        if not self._lines:
            raise UserError(f"--predictions {path}: no image is segmented there yet; resume smooseg predict")
        self.groups = read_groups(self.path / GROUPS)

    def _folders(self) -> list[File]:
        """The folders groups_N in it."""
        if isinstance(self.path, Remote):
            names = {file[len(self.path) :].strip("/").partition("/")[0] for file in self._listed or ()}
            return [self.path / name for name in names if name.startswith("groups_")]
        return list(self.path.glob("groups_*"))

    def __len__(self) -> int:
        return len(self._lines)

    @cached_property
    def names_without_suffix(self) -> Counter[str]:
        """How many images have each name when suffixes do not count."""
        return Counter(PurePath(text(name)).with_suffix("").as_posix() for name, _, _ in self._lines)

    @property
    def finished(self) -> bool:
        """Whether predict came to its end here."""
        return (self.path / SHARES).is_file()

    @cached_property
    def root(self) -> File:
        """The folder of images, which names are relative to: the nearest that holds all of them."""
        if is_url(self._lines[0][2]):
            name, _, url = self._lines[0]
            return Remote(url.removesuffix(name).rstrip("/") if url.endswith(name) else Remote(url).parent)
        parents = ((PurePath(file), len(PurePath(name).parts)) for name, _, file in self._lines)
        return Path(os.path.commonpath({str(file.parents[parts - 1]) for file, parts in parents}))

    def __iter__(self) -> Iterator[Segmented]:
        for name, stem, file in Bar(iterable=self._lines, desc="export", unit="image"):
            try:
                mask = self._written(MASKS, stem) or self.path / MASKS / f"{stem}.png"
                labels = self._labels(mask)
            except ImageError as error:
                self.skipped += 1
                say_skipped(error)
            else:
                image = Segmented(
                    name=text(name),
                    stem=text(stem),
                    file=cast(Path, place(file)),
                    mask=mask,
                    labels=labels,
                    confidence_file=self._written(CONFIDENCE, stem),
                )
                if not image.is_file:
                    self.not_files.append(image.name)
                yield image

    def _written(self, kind: str, stem: str) -> Path | None:
        """The file that predict wrote for an image into a folder; None without one."""
        files = (self.path / kind / f"{stem}{suffix}" for suffix in (".png", ".tif"))
        known = self._listed
        return next((file for file in files if (file.is_file() if known is None else str(file) in known)), None)

    def _labels(self, mask: Path) -> np.ndarray:
        """The labels uint8 [H,W] in a mask. ImageError where they cannot be read, or are not of the groups."""
        labels, foreign = read_plane(mask), np.zeros(256, bool)
        for top in range(0, len(labels), BAND):  # because an index takes eight bytes a label
            foreign[labels[top : top + BAND]] = True
        foreign[[IGNORE, *(group.number for group in self.groups)]] = False
        if foreign.any():
            reason = f"holds {foreign.argmax()}, which is no group in {GROUPS}"
            raise ImageError(mask, reason, "run the same smooseg predict again, which writes both")
        return labels


def name_of(stem: str, file: str) -> str:
    """The name of an image, relative to the folder of images, by the stem of its outputs and the place of its file.

    A stem has the folders of the name. It ends with the name of the file, or with that of a page, x#2.tif for x.tif,
    without the suffix or with more behind it where that would be another's.
    """
    suffix, parent = PurePath(file).suffix, PurePath(stem).parent
    ending = rf"(?:{re.escape(suffix)}(?:\.[0-9a-f]{{8}})?)?"
    page = re.fullmatch(rf"({re.escape(PurePath(file).stem)}#+[0-9]+){ending}", PurePath(stem).name)
    return (parent / (page[1] + suffix if page else PurePath(file).name)).as_posix()


def text(name: str) -> str:
    r"""The name of a file as text that every format holds: bytes that are none become \xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
