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
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np

from ..errors import UserError
from .base import (
    IGNORE,
    Layout,
    NumberedFiles,
    Numbering,
    extent,
    files_below,
    files_digest,
    first_folder,
    numbered_files,
    pick,
    read_list,
)
from .images import ImageError, image_size, read_strips

NAMES = ("roads and cars", "buildings and clutter", "vegetation and trees")
ROAD, BUILDING, VEGETATION = range(3)
# the numbers in gt: roads, buildings, low vegetation, trees, cars, clutter
NUMBERING = Numbering("Potsdam", NAMES, dict(enumerate((ROAD, BUILDING, VEGETATION, VEGETATION, ROAD, BUILDING))))
# the colours of a label mosaic as 4 red + 2 green + blue, each 0 or 1: blue, green, cyan, red, yellow, white
COLOURS = {1: BUILDING, 2: VEGETATION, 3: VEGETATION, 4: BUILDING, 6: ROAD, 7: ROAD}

WINDOW = 400  # pixels of a mosaic that become one tile
SHRINK = 2  # images by the mean of 2 x 2 pixels, labels by the first of them
SIDE = WINDOW // SHRINK
TEST_SHARE = 0.1  # share of all tiles, as published

MOSAICS = {"2_Ortho_RGB": "RGB", "4_Ortho_RGBIR": "RGBIR"}
FALSE_COLOUR = "3_Ortho_IRRG"
LABELS = {
    "5_Labels_for_participants": "label",
    "5_Labels_all": "label",
    "5_Labels_for_participants_no_Boundary": "label_noBoundary",
}


ADVICE = "give the prepared tiles"


def recognise(root: Path) -> Layout | None:
    return _prepared(root) or _mosaics(root)


# prepared tiles


@dataclass(frozen=True, kw_only=True)
class MatTiles(NumberedFiles):
    """Tiles in MATLAB files."""

    def image(self, index: int) -> np.ndarray:
        """Read uint8 [H,W,3] without the infrared; ImageError for another kind of file."""
        path = self.images[index]
        image = read_mat(path, "img")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
            raise ImageError(path, f"img is {image.dtype} {list(image.shape)}, not uint8 [h,w,3 or 4]", ADVICE)
        return np.ascontiguousarray(image[..., :3])

    def class_numbers(self, path: Path) -> np.ndarray:
        label = read_mat(path, "gt")
        if label.dtype.kind not in "iu" or label.ndim != 2:
            raise ImageError(path, f"gt is {label.dtype} {list(label.shape)}, not integers [h,w]", ADVICE)
        return self.numbering(label, path)

    def size(self, index: int) -> tuple[int, int]:
        return self.image(index).shape[:2]


def read_mat(path: Path, name: str) -> np.ndarray:
    """Read the array `name` of a MATLAB file up to version 7, executing nothing. ImageError when it is not there."""
    from scipy.io import loadmat  # here, because few need it

    try:
        array = loadmat(path, variable_names=[name]).get(name)
    except NotImplementedError as error:  # version 7.3 is another format
        raise ImageError(path, "a MATLAB 7.3 file", "save it with -v7") from error
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(path, f"cannot be read as a MATLAB file ({reason.splitlines()[0]})") from error
    if not isinstance(array, np.ndarray):
        raise ImageError(path, f"holds no {name}", ADVICE)
    return array


def _prepared(root: Path) -> Layout | None:
    stems = {"train": "labelled_train", "val": "labelled_test", "unlabelled": "unlabelled_train", "all": "all"}
    lists = {split: root / f"{stem}.txt" for split, stem in stems.items()}
    if not (root / "imgs").is_dir() or not ((root / "gt").is_dir() or any(path.is_file() for path in lists.values())):
        return None
    parts = {split: partial(_open_prepared, root, split, path) for split, path in lists.items() if path.is_file()}
    parts.setdefault("train", partial(_open_prepared, root, "train", None))
    title = "Potsdam-3 (prepared .mat tiles, 3 classes)"
    return Layout(title=title, preset="potsdam", root=root, parts=parts, pictures=None)


def _open_prepared(root: Path, split: str, path: Path | None) -> NumberedFiles:
    present = files_below(root / "imgs", (".mat",))
    if path is not None:
        chosen, notes = pick(read_list(path), present, path)
    else:  # learn from everything but the evaluation's tiles
        test = root / "labelled_test.txt"
        held_out = set(read_list(test)) if test.is_file() else set()
        chosen = [file for file in present if file.stem not in held_out]
        notes = [f"no {root / 'labelled_train.txt'}: training uses all {len(chosen)} other tiles"]
    return numbered_files(
        f"Potsdam-3 {split}",
        root / "imgs",
        chosen,
        files_below(root / "gt", (".mat",)),
        NUMBERING,
        label_name=str,
        held_out=split == "val",
        where=str(root / "gt"),
        present=present,
        notes=notes,
        kind=MatTiles,
    )


# mosaics


@dataclass(frozen=True, kw_only=True)
class MosaicTiles:
    """Tiles of SIDE pixels from windows of WINDOW pixels. The last two mosaics (27 MB each) and their labels stay
    decoded.
    """

    name: str
    tiles: tuple[tuple[Path, Path | None, int, int], ...]  # mosaic, its labels, row and column of the tile
    held_out: bool
    notes: tuple[str, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(tile_name(image, row, column) for image, _, row, column in self.tiles)

    @cached_property
    def labelled(self) -> bool:
        return any(label is not None for _, label, _, _ in self.tiles)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return NAMES if self.labelled else None

    def __len__(self) -> int:
        return len(self.tiles)

    def image(self, index: int) -> np.ndarray:
        """Cut uint8 [SIDE,SIDE,3]; ImageError when the mosaic cannot be decoded."""
        path, _, row, column = self.tiles[index]
        return _tile(colours_of(path), row, column)

    def label(self, index: int) -> np.ndarray | None:
        """Cut uint8 [SIDE,SIDE], or None; UserError when the label mosaic's size is not the image's."""
        image, path, row, column = self.tiles[index]
        if path is None:
            return None
        if (label_size := image_size(path)) != (size := image_size(image)):
            raise UserError(
                f"{path}: the label is {extent(label_size)} pixels but {image} is {extent(size)}; copy both again"
            )
        return _tile(classes_of(path), row, column)

    def fingerprint(self) -> str:
        mosaics = dict.fromkeys(image for image, _, _, _ in self.tiles)
        parts = (f"{WINDOW}/{SHRINK}", *self.names, files_digest((path.name, path) for path in mosaics))
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def tile_name(mosaic: Path, row: int, column: int) -> str:
    return f"{mosaic.stem}/{row:02d}_{column:02d}.tif"


def _tile(mosaic: np.ndarray, row: int, column: int) -> np.ndarray:
    return mosaic[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE].copy()


_decoding = threading.Lock()  # threads that need one mosaic wait for the first to decode it


def colours_of(path: Path) -> np.ndarray:
    """Shrink a mosaic to uint8 [H/SHRINK,W/SHRINK,3]."""
    with _decoding:
        return _colours_of(path)


def classes_of(path: Path) -> np.ndarray:
    """Shrink a label mosaic to classes uint8 [H/SHRINK,W/SHRINK]; rounds colours to 0 or 255, IGNORE for other ones."""
    with _decoding:
        return _classes_of(path)


@lru_cache(maxsize=2)  # where one mosaic ends and the next begins, both are needed
def _colours_of(path: Path) -> np.ndarray:
    return np.concatenate([_mean(strip) for strip in read_strips(path, WINDOW)])


@lru_cache(maxsize=2)
def _classes_of(path: Path) -> np.ndarray:
    class_of = np.full(8, IGNORE, np.uint8)
    class_of[list(COLOURS)] = list(COLOURS.values())
    strips = (strip[::SHRINK, ::SHRINK] >= 128 for strip in read_strips(path, WINDOW))
    return np.concatenate([class_of[strip @ np.array([4, 2, 1], np.uint8)] for strip in strips])


def _mean(strip: np.ndarray) -> np.ndarray:
    """Average uint8 [h,w,3] -> [h/2,w/2,3], halves rounded up, without a last odd row or column."""
    h, w = strip.shape[0] // SHRINK * SHRINK, strip.shape[1] // SHRINK * SHRINK
    corners = [strip[y:h:SHRINK, x:w:SHRINK].astype(np.uint16) for y in range(SHRINK) for x in range(SHRINK)]
    total = sum(corners[1:], start=corners[0])
    return ((total + SHRINK**2 // 2) // SHRINK**2).astype(np.uint8)


def _mosaics(root: Path) -> Layout | None:
    folder = first_folder(*(root / name for name in MOSAICS))
    if folder is None:
        if (root / FALSE_COLOUR).is_dir():
            advice = f"unpack {' or '.join(MOSAICS)} next to it"
            raise UserError(f"--data {root}: Potsdam with {FALSE_COLOUR} alone, which has no blue; {advice}")
        return None
    mosaics = _by_place(folder, MOSAICS[folder.name])
    if not mosaics:
        return None
    labels_folder = first_folder(*(root / name for name in LABELS))
    labels = {} if labels_folder is None else _by_place(labels_folder, LABELS[labels_folder.name])
    paired = {mosaics[place]: labels.get(place) for place in sorted(mosaics)}
    where = "no labels" if labels_folder is None else labels_folder.name
    parts = {split: partial(_open_mosaics, paired, split) for split in ("train", "val", "unlabelled")}
    if not any(paired.values()):
        parts = {"train": partial(_open_mosaics, paired, "unlabelled")}
    elif all(paired.values()):
        del parts["unlabelled"]
    title = f"Potsdam-3 (mosaics in {folder.name} and {where}, cut into {SIDE}-pixel tiles, 3 classes)"
    # no pictures: a mosaic is not at the scale of its tiles
    return Layout(title=title, preset="potsdam", root=root, parts=parts, pictures=None)


def _by_place(folder: Path, kind: str) -> dict[tuple[int, int], Path]:
    """List the mosaics of a folder by their two numbers."""
    pattern = re.compile(rf"top_potsdam_(\d+)_(\d+)_{kind}", re.IGNORECASE)
    matches = ((pattern.fullmatch(file.stem), file) for file in files_below(folder, (".tif", ".tiff")))
    return {(int(match[1]), int(match[2])): file for match, file in matches if match}


def _open_mosaics(paired: dict[Path, Path | None], split: str) -> MosaicTiles:
    """Cut the tiles of a split. As many test tiles as published, a tenth of all, are drawn by a hash of their names."""
    tiles, small, broken = [], [], []
    for image, label in paired.items():
        try:
            height, width = image_size(image)
        except ImageError as error:
            broken.append(str(error))
            continue
        places = [(row, column) for row in range(height // WINDOW) for column in range(width // WINDOW)]
        tiles += [(image, label, row, column) for row, column in places]
        small += [] if places else [image]
    labelled = [tile for tile in tiles if tile[1] is not None]
    by_hash = sorted(labelled, key=lambda tile: hashlib.sha256(tile_name(tile[0], *tile[2:]).encode()).digest())
    test = set(by_hash[: max(1, round(TEST_SHARE * len(tiles)))])
    chosen = {
        "train": [tile for tile in labelled if tile not in test],
        "val": [tile for tile in labelled if tile in test],
        "unlabelled": [tile for tile in tiles if tile[1] is None],
    }[split]
    notes = [] if not small else [f"{len(small)} mosaics are smaller than a tile of {WINDOW} pixels, first {small[0]}"]
    notes += [] if not broken else [f"{len(broken)} mosaics cannot be used, first {broken[0]}"]
    if not chosen:
        raise UserError("; ".join([f"--data: no tiles of {WINDOW} x {WINDOW} pixels can be cut for {split}", *notes]))
    if split != "unlabelled":
        notes.append(
            "evaluation tiles are drawn by name from the labelled mosaics; they differ from the published list"
        )
    return MosaicTiles(name=f"Potsdam-3 {split}", tiles=tuple(chosen), held_out=split == "val", notes=tuple(notes))
