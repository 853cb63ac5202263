"""Potsdam-3 in either form: tiles prepared by Ji et al. (ICCV 2019), or mosaics of the ISPRS, cut here in their way.

Tiles: imgs/N.mat (`img`, uint8 [200,200,4], red, green, blue and infrared) and gt/N.mat (`gt`, [200,200], 0 to 5), with
the lists labelled_train.txt, labelled_test.txt and unlabelled_train.txt. Mosaics: 2_Ortho_RGB/top_potsdam_X_Y_RGB.tif
(or 4_Ortho_RGBIR) and 5_Labels_for_participants/top_potsdam_X_Y_label.tif, 6000 x 6000 pixels each, labels as colours.
Six classes become three.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ..errors import UserError
from ..system.stores import File
from .base import IGNORE, Files, Layout, Numbering, extent, files_below, first_folder
from .imageerror import ImageError, reason
from .images import image_size, read_colours
from .reading import Picture

NAMES = ("roads and cars", "buildings and clutter", "vegetation and trees")
ROAD, BUILDING, VEGETATION = range(3)
# the numbers in gt: roads, buildings, low vegetation, trees, cars, clutter
NUMBERING = Numbering("Potsdam-3", NAMES, (ROAD, BUILDING, VEGETATION, VEGETATION, ROAD, BUILDING))
# by 4 red + 2 green + blue, each 0 or 1: black, blue, green, cyan, red, magenta, yellow, white
CLASS_OF_COLOUR = np.array([IGNORE, BUILDING, VEGETATION, VEGETATION, BUILDING, IGNORE, ROAD, ROAD], np.uint8)

WINDOW = 400  # pixels of a mosaic that become one tile
SHRINK = 2  # images by the mean of 2 x 2 pixels, labels by the first of them
SIDE = WINDOW // SHRINK
TEST_SHARE = 0.1  # share of all tiles, as published

MOSAICS = ("2_Ortho_RGB", "4_Ortho_RGBIR")
LABELS = ("5_Labels_for_participants", "5_Labels_all", "5_Labels_for_participants_no_Boundary")
FILE = re.compile(r"top_potsdam_(\d+)_(\d+)_(RGB|RGBIR|label|label_noBoundary)", re.IGNORECASE)


def recognise(root: Path) -> Layout | None:
    return _prepared(root) or _mosaics(root)


# prepared tiles


@dataclass(frozen=True, kw_only=True)
class MatTiles(Files):
    """Tiles in MATLAB files."""

    reads_files: ClassVar[bool] = False

    def picture(self, index: int) -> Picture:
        """Read an image without its infrared; ImageError for another kind of file."""
        path = self.images[index]
        image = read_mat(path, "img")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
            raise ImageError(path, f"img is {image.dtype} {list(image.shape)}, not uint8 [h,w,3 or 4]")
        return Picture(np.ascontiguousarray(image[..., :3]))

    def numbers(self, path: File) -> np.ndarray:
        label = read_mat(path, "gt")
        if label.dtype.kind not in "iu" or label.ndim != 2:
            raise ImageError(path, f"gt is {label.dtype} {list(label.shape)}, not integers [h,w]")
        return label

    def size(self, index: int) -> tuple[int, int]:
        return self.image(index).shape[:2]


def read_mat(path: File, name: str) -> np.ndarray:
    """Read the array `name` of a MATLAB file up to version 7, executing nothing. ImageError when it is not there."""
    from scipy.io import loadmat  # here, because few need it

    try:
        return np.asarray(loadmat(path, variable_names=[name])[name])
    except KeyError as error:
        raise ImageError(path, f"holds no {name}") from error
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        raise ImageError(path, f"cannot be read as a MATLAB file up to version 7 ({reason(error)})") from error


def _prepared(root: Path) -> Layout | None:
    names = {"train": "labelled_train", "val": "labelled_test", "unlabelled": "unlabelled_train", "all": "all"}
    lists = {split: path for split, name in names.items() if (path := root / f"{name}.txt").is_file()}
    images, labels = root / "imgs", root / "gt"
    if not images.is_dir() or not (labels.is_dir() or lists):
        return None
    tiles = partial(MatTiles.of_owner, NUMBERING, images=images, labels=labels, suffixes=(".mat",), suffix=".mat")
    parts = {split: partial(tiles, split, listed=path) for split, path in lists.items()}
    # without a list of its own, training learns from everything but the evaluation's tiles
    note = f"no {root / 'labelled_train.txt'}: training uses all other tiles"
    parts.setdefault("train", partial(tiles, "train", unlisted=lists.get("val"), notes=[note]))
    return Layout(title="Potsdam-3 (prepared .mat tiles, 3 classes)", preset="potsdam", root=root, parts=parts)


# mosaics


@dataclass(frozen=True, kw_only=True)
class MosaicTiles(Files):
    """Tiles of SIDE pixels from windows of WINDOW pixels; `images` and `labels` are the mosaics of each."""

    places: tuple[tuple[int, int], ...]  # row and column of each tile
    reads_files: ClassVar[bool] = False

    def picture(self, index: int) -> Picture:
        """Cut a tile; ImageError when the mosaic cannot be decoded."""
        return Picture(_tile(_shrunk, self.images[index], self.places[index]))

    def label(self, index: int) -> np.ndarray | None:
        """Cut uint8 [SIDE,SIDE], or None; ImageError when the mosaic cannot be decoded."""
        path = self.labels[index]
        return None if path is None else _tile(_classes, path, self.places[index])


def tile_name(mosaic: Path, place: tuple[int, int]) -> str:
    return "{}/{:02d}_{:02d}.tif".format(mosaic.stem, *place)


_decoding = threading.Lock()  # threads that need one mosaic wait for the first to decode it


def _tile(shrink: Callable[[Image.Image], np.ndarray], path: File, place: tuple[int, int]) -> np.ndarray:
    with _decoding:
        mosaic = _decoded(shrink, path)
    top, left = (SIDE * number for number in place)
    return mosaic[top : top + SIDE, left : left + SIDE].copy()


@lru_cache(maxsize=4)  # where one mosaic ends and the next begins, both and their labels are needed, at most 27 MB each
def _decoded(shrink: Callable[[Image.Image], np.ndarray], path: File) -> np.ndarray:
    return shrink(read_colours(path))


def _shrunk(image: Image.Image) -> np.ndarray:
    """Average to uint8 [H/SHRINK,W/SHRINK,3], halves rounded up, without a last odd row or column."""
    whole = (0, 0, image.width // SHRINK * SHRINK, image.height // SHRINK * SHRINK)
    return np.asarray(image.reduce(SHRINK, whole))


def _classes(image: Image.Image) -> np.ndarray:
    """Look up the classes uint8 [H/SHRINK,W/SHRINK] of a label mosaic, its colours rounded to 0 or 255."""
    return CLASS_OF_COLOUR[(np.asarray(image)[::SHRINK, ::SHRINK] >= 128) @ np.array([4, 2, 1], np.uint8)]


def _mosaics(root: Path) -> Layout | None:
    folder = first_folder(*(root / name for name in MOSAICS))
    labels_folder = first_folder(*(root / name for name in LABELS))
    if folder is None or not (mosaics := _by_place(folder)):
        return None
    labels = {} if labels_folder is None else _by_place(labels_folder)
    paired = {mosaics[place]: labels.get(place) for place in sorted(mosaics)}
    where = "no labels" if labels_folder is None else labels_folder.name
    parts = {split: partial(_open_mosaics, paired, split) for split in ("train", "val", "unlabelled")}
    if not any(paired.values()):
        parts = {"train": parts["unlabelled"]}
    elif all(paired.values()):
        del parts["unlabelled"]
    title = f"Potsdam-3 (mosaics in {folder.name} and {where}, cut into {SIDE}-pixel tiles, 3 classes)"
    # no pictures: a mosaic is not at the scale of its tiles
    return Layout(title=title, preset="potsdam", root=root, parts=parts)


def _by_place(folder: Path) -> dict[tuple[int, int], Path]:
    """List the mosaics of a folder by their two numbers."""
    matches = ((FILE.fullmatch(file.stem), file) for file in files_below(folder, (".tif", ".tiff")))
    return {(int(match[1]), int(match[2])): file for match, file in matches if match}


def _open_mosaics(paired: dict[Path, Path | None], split: str) -> MosaicTiles:
    """Cut the tiles of a split. As many test tiles as published, a tenth of all, are drawn by a hash of their names."""
    tiles, left_out = [], []
    for image, label in paired.items():
        try:
            size = image_size(image)
            if label is not None and (label_size := image_size(label)) != size:
                raise ImageError(label, f"the label is {extent(label_size)} pixels but {image} is {extent(size)}")
            if min(size) < WINDOW:
                raise ImageError(image, f"{extent(size)} pixels, less than a tile of {WINDOW} x {WINDOW}")
        except ImageError as error:
            left_out.append(str(error))
            continue
        rows, columns = (range(pixels // WINDOW) for pixels in size)
        tiles += [(image, label, (row, column)) for row in rows for column in columns]
    labelled = [tile for tile in tiles if tile[1] is not None]
    drawn = sorted(labelled, key=lambda tile: hashlib.sha256(tile_name(tile[0], tile[2]).encode()).digest())
    test = set(drawn[: max(1, round(TEST_SHARE * len(tiles)))])
    if split == "unlabelled":
        chosen = [tile for tile in tiles if tile[1] is None]
    else:
        chosen = [tile for tile in labelled if (tile in test) == (split == "val")]
    notes = [f"{len(left_out)} mosaics cannot be used, first {left_out[0]}"] if left_out else []
    if not chosen:
        raise UserError("; ".join([f"--data: no tiles of {WINDOW} x {WINDOW} pixels can be cut for {split}", *notes]))
    if split != "unlabelled":
        notes.append("evaluation tiles are drawn by name from the labelled mosaics, unlike those of the published list")
    images, labels, places = zip(*chosen)
    return MosaicTiles(
        name=f"{NUMBERING.owner} {split}",
        names=tuple(tile_name(image, place) for image, _, place in chosen),
        images=images,
        labels=labels,
        places=places,
        held_out=split == "val",
        notes=tuple(notes),
        numbering=NUMBERING,
    )
