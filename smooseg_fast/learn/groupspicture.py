"""groups.png: some images under their groups. Their tiles stay in the folder, so that new names, merges and numbers of
groups are drawn without the images and the backbone."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..datasets import IGNORE
from ..segment.checkpoint import Checkpoint
from ..segment.colours import palette
from ..segment.names import Group
from ..show import pictures
from ..show.report_tiles import LEVEL, read_tiles, resized
from ..show.sheet import NAMED, Shown, TruthLook, sheet_pages
from ..system.files import write_atomic
from .runfolder import GROUPS, GROUPS_TILES

MOST_BYTES = 120_000  # of a tile


def with_truth(tile: dict[str, Any], truth: np.ndarray | None) -> dict[str, Any]:
    """A tile with the ground truth uint8 [h,w] of what it shows."""
    if truth is None:
        return tile
    height, width = tile["shape"]
    small = resized(np.ascontiguousarray(truth), (height, width))
    return tile | {"truth": base64.b64encode(zlib.compress(small.tobytes(), LEVEL)).decode()}


def write_tiles(folder: Path, header: Mapping[str, Any], tiles: Iterable[Mapping[str, Any]]) -> None:
    """Write the tiles of the picture. WriteError when the disk is full."""
    write_atomic(folder / GROUPS_TILES, "".join(json.dumps(line) + "\n" for line in (header, *tiles)))


def redraw(folder: Path, checkpoint: Checkpoint) -> Path | None:
    """Draw groups.png of a run from its tiles; None where there are none that can be read."""
    header, tiles = read_tiles(folder / GROUPS_TILES)
    if not header or not tiles or header.get("fine") != (0 if checkpoint.fine is None else len(checkpoint.fine.tree)):
        return None
    return pictures.save(folder / GROUPS, picture_of(checkpoint, header, list(tiles.values())))


def picture_of(checkpoint: Checkpoint, header: Mapping[str, Any], tiles: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The picture of tiles, at the number of groups and with the names, colours and merges of a checkpoint."""
    groups = checkpoint.listed
    title = f"{in_use(group.share or 0.0 for group in groups)} of {len(groups)} groups in use, found without labels"
    shown = [one for tile in tiles if (one := shown_of(tile, checkpoint, header)) is not None]
    (page,) = sheet_pages(shown, groups, title, truth_look(checkpoint, groups))
    return page


def shown_of(tile: Mapping[str, Any], checkpoint: Checkpoint, header: Mapping[str, Any]) -> Shown | None:
    """The image of a tile with its labels at a checkpoint's cut; None where the tile is damaged."""
    with suppress(OSError, ValueError, zlib.error, Image.DecompressionBombError):
        with Image.open(io.BytesIO(base64.b64decode(tile["picture"])), formats=["WEBP", "JPEG"]) as picture:
            image = np.asarray(picture.convert("RGB"))
        planes, shape = unpacked(tile["labels"]).reshape(header["planes"], *tile["shape"]), image.shape[:2]
        if header["fine"] == 0 or (header["planes"] == 2 and uses_masks(checkpoint, header)):
            labels = checkpoint.names.table[planes[0]]
        else:
            table = np.full(256, IGNORE, np.uint8)
            table[: header["fine"]] = checkpoint.names.table[checkpoint.cut]
            labels = table[planes[-1]]
        truth = resized(unpacked(tile["truth"]).reshape(tile["shape"]), shape) if "truth" in tile else None
        return Shown(tile["name"], image, resized(labels, shape), truth)
    return None


def unpacked(text: str) -> np.ndarray:
    """The labels uint8 [n] that a tile holds. ValueError or zlib.error where they are damaged."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)


def uses_masks(checkpoint: Checkpoint, header: Mapping[str, Any]) -> bool:
    """Whether masks come from the trained head, and what was merged in them when they were made still is."""
    table = checkpoint.names.table
    merged = all(len(set(table[numbers].tolist())) == 1 for numbers in header["merge"])
    return checkpoint.grouping.groups is None and merged


def truth_look(checkpoint: Checkpoint, groups: Sequence[Group]) -> TruthLook | None:
    """Classes in the colours of the groups that they match, and the others in colours that no group has."""
    scores = checkpoint.report.get("scores")
    if scores is None:
        return None
    colours, table = {group.number: group.colour for group in groups}, checkpoint.names.table
    numbers = {cluster["class"]: int(table[cluster["cluster"]]) for cluster in scores["hungarian"]["clusters"]}
    matched = {name: colours[number] for name, number in numbers.items() if number in colours}
    spare = (tuple(colour) for colour in palette(256).tolist() if tuple(colour) not in colours.values())
    shades, legend = np.zeros((256, 3), np.uint8), []
    for number, row in enumerate(scores["hungarian"]["classes"]):
        shades[number] = matched.get(row["name"]) or next(spare)
        if row["pixels"]:
            legend.append((shades[number].tolist(), f"truth: {row['name']}"))
    return TruthLook(shades, legend)


def in_use(shares: Iterable[float]) -> int:
    """Number of groups that a legend names."""
    return sum(share >= NAMED for share in shares)
