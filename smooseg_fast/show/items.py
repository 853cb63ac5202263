"""The images to segment: their files, names, pages and stamps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

from ..datasets import recognise
from ..datasets.formats import photo_suffixes
from ..datasets.reading import Reading
from ..datasets.scan import normal, scan
from ..datasets.survey import Place, page_counts, page_names, survey
from ..errors import UserError
from ..system.files import state_of
from ..system.progress import announced, say
from ..system.stores import File
from ..system.terminal import printable
from .streamed import maps_among


@dataclass(frozen=True)
class Item:
    """One image to segment."""

    file: File
    name: str  # path relative to --images, posix
    stem: str  # names the files written for it in the folders below --out
    page: int | None = None  # of the file, from 1; None for the one that the checkpoint reads
    map: bool = False  # lies on the earth, or is too large for PNG: its files are GeoTIFFs

    def stamp(self) -> list[str | int] | None:
        """[place, bytes, modification time in ns], which tell an image that changed; None when it is gone."""
        state = state_of(self.file)
        # the place too: sizes and times of uncompressed tiles from an archive are all alike
        name = str(self.file.absolute() if isinstance(self.file, Path) else self.file)
        return None if state is None else [name, state[0] or 0, state[1]]


def items_below(root: File) -> list[Item]:
    """The photos at or below `root`, with a line for each kind of file left out. UserError when none is left."""
    layout = recognise(root)
    if layout is not None:  # its label files are images too
        advice = layout.pictures or "the pictures alone"
        raise UserError(f"--images {root}: is {layout.title}, which holds more than pictures; give {advice}")
    found = scan(root, "--images")
    for note in found.notes:
        say(printable(f"note: {note}"))
    stems = output_stems([Path(photo) for photo in found.photos])
    return [Item(found.file(photo), photo.as_posix(), stem) for photo, stem in zip(found.photos, stems)]


def look_at(items: Sequence[Item], reading: Reading) -> tuple[list[Item], Reading]:
    """The images with an item for every page that is read, and `reading` with a range for every kind of value.

    Says what was measured and what of the images is not shown.
    """
    items = list(items)
    if reading.pages == "all":
        counts = page_counts([item.file for item in items])
        names = page_names([item.name for item in items], counts)
        pages = [(item.file, page) for item, count in zip(items, counts) for page in range(1, count + 1)]
        stems = output_stems([Path(name) for name in names])
        items = [Item(file, name, stem, page) for (file, page), name, stem in zip(pages, names, stems)]
    with announced(f"maps       looking for them among {len(items)} images"):
        items = [replace(item, map=is_map) for item, is_map in zip(items, maps_among(items, reading))]
    reading, notes = survey([Place(item.file, item.page) for item in items], reading)
    for note in notes:
        say(printable(f"data       {note}"))
    return items, reading


def output_stems(files: Sequence[Path]) -> list[str]:
    """Names for the files written for each image, no two alike even if neither case nor Unicode form counted.

    A name has no suffix. Of a.jpg and a.png in one folder, the first in the order of `photo_suffixes` is called so,
    whether or not the other is there, and the other keeps its suffix.
    """
    order, names = photo_suffixes(), [file.as_posix() for file in files]
    stems: dict[Path, str] = {}
    taken = Counter(map(normal, names))
    for file in sorted(files, key=lambda file: (order.index(file.suffix.lower()), file.as_posix())):
        stem, name = file.with_suffix("").as_posix(), file.as_posix()
        if normal(stem) in taken:
            stem = name if taken[normal(name)] == 1 else f"{name}.{crc32(name.encode(errors='surrogateescape')):08x}"
        stems[file] = stem
        taken[normal(stem)] += normal(stem) != normal(name)
    return [stems[file] for file in files]
