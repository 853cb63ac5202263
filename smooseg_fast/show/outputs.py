"""The files of one picture at one number of groups, filled part by part: mask, confidence and probabilities.

A photo gets PNG and NPZ, a map cloud-optimised GeoTIFFs that lie where it lies. Margins and probabilities p
are stored as round(254 p), and 255 where there is no data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from typing import IO
from xml.sax.saxutils import escape
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
from PIL import Image

from ..datasets import IGNORE
from ..datasets.georeference import Georeference
from ..segment.names import Group
from ..segment.parts import LEVELS, Part, margins, stored
from ..system.files import write_atomic
from . import cog
from .cog import CogWriter, Layout
from .unfinished import Unfinished

MASK, CONFIDENCE, PROBABILITIES = "mask", "confidence", "probabilities"  # the last two are folders, too
FURTHER = {CONFIDENCE: ".png", PROBABILITIES: ".npz"}  # suffixes in them, but for those of maps
NAME, VALUE, RED = 2, 5, 6  # usages of columns in GDAL's tables; green and blue follow red
INTEGER, TEXT = 0, 2  # types of columns


@dataclass(frozen=True)
class Plan:
    """The files that are written of a picture, and their places.

    Attributes:
        shape: (height, width).
        groups: with their names, in the order of the probabilities.
        colours: uint8 [256,3].
        mask: its path; of a photo, its labels are handed back instead.
        more: the paths of CONFIDENCE and PROBABILITIES, those that are asked for.
        scratch: a folder for temporary files without a name; None for the system's.
    """

    shape: tuple[int, int]
    groups: Sequence[Group]
    colours: np.ndarray
    mask: Path
    more: Mapping[str, Path]
    scratch: Path | None


def values_of(part: Part, kind: str) -> np.ndarray:
    """The margins uint8 [n,m] or probabilities uint8 [n,m,K] of a part, as they are stored."""
    assert part.probs is not None
    return margins(part.probs) if kind == CONFIDENCE else stored(part.probs)


class PhotoFiles:
    """The files of a photo; `close` writes all but the mask, whose labels uint8 [H,W] it returns."""

    rows = 0

    def __init__(self, plan: Plan):
        self.plan, self.labels = plan, np.empty(plan.shape, np.uint8)
        self._margins = np.empty(plan.shape, np.uint8) if CONFIDENCE in plan.more else None
        self._rows = Rows(plan) if PROBABILITIES in plan.more else None

    def put(self, part: Part) -> None:
        self.labels[part.place.inside] = part.labels
        if self._margins is not None:
            self._margins[part.place.inside] = values_of(part, CONFIDENCE)
        if self._rows is not None:
            self._rows.put(part)

    def close(self) -> np.ndarray:
        if self._margins is not None:
            picture = Image.fromarray(self._margins)
            write_atomic(self.plan.more[CONFIDENCE], lambda target: picture.save(target, "PNG"))
        if self._rows is not None:
            self._rows.close(self.plan.more[PROBABILITIES])
        return self.labels

    def discard(self) -> None:
        if self._rows is not None:
            self._rows.discard()


class Rows:
    """Probabilities as an NPZ of `probabilities` uint8 [H,W,K], `levels` (254), and the `numbers` and `names` of the K
    groups. Memory: a band of parts."""

    def __init__(self, plan: Plan):
        self._width, numbers = plan.shape[1], np.array([group.number for group in plan.groups])
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=plan.scratch)  # noqa: SIM115  # until `discard`
        self._zip = ZipFile(self._file, "w", ZIP_DEFLATED, compresslevel=1)
        names = np.array([group.name for group in plan.groups])
        for name, array in (("levels", np.array(LEVELS)), ("numbers", numbers), ("names", names)):
            with self._zip.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
        self._entry = self._zip.open("probabilities.npy", "w", force_zip64=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": (*plan.shape, len(numbers))}
        np.lib.format.write_array_header_2_0(self._entry, header)
        self._band = np.empty((0, 0, 0), np.uint8)

    def put(self, part: Part) -> None:
        values, (_, left, _, right) = values_of(part, PROBABILITIES), part.place
        if left == 0:
            self._band = np.empty((len(values), self._width, values.shape[2]), np.uint8)
        self._band[:, left:right] = values
        if right == self._width:
            self._entry.write(self._band.data)

    def close(self, path: Path) -> None:
        self._entry.close()
        self._zip.close()
        self._file.seek(0)

        def write(target: Path) -> None:
            with open(target, "wb") as copy:
                copyfileobj(self._file, copy)

        write_atomic(path, write)
        self.discard()

    def discard(self) -> None:
        """Let go of the file, full or not. The archive first: it would be ended later, in a file that is closed."""
        with suppress(OSError):
            self._entry.close()
            self._zip.close()
        self._file.close()


class MapFiles:
    """The files of a map, in memory for some rows of tiles; `close` returns how many pixels have each label, int64
    [256].

    Args:
        unfinished: keeps the rows of tiles that are done, of which the first are then taken over. `rows` tells how many
            rows of pixels these are; parts of them are left out.
        number: of groups, tells the files of one map apart.

    Raises:
        zlib.error, ValueError: where tiles that were kept are damaged.
    """

    def __init__(self, plan: Plan, place: Georeference | None, unfinished: Unfinished | None = None, number: int = 0):
        self.plan = plan
        layouts = {MASK: Layout(plan.shape, IGNORE, colours=plan.colours, place=place)}
        bands = {CONFIDENCE: ["confidence"], PROBABILITIES: [group.name for group in plan.groups]}
        for kind in plan.more:
            layouts[kind] = Layout(plan.shape, IGNORE, bands=bands[kind], scale=1 / LEVELS, place=place)
        keepers = {kind: None if unfinished is None else unfinished.kept(f"{number}-{kind}") for kind in layouts}
        self._writers = {kind: CogWriter(layout, plan.scratch, keepers[kind]) for kind, layout in layouts.items()}
        finished = [[] if keeper is None else keeper.rows for keeper in keepers.values()]
        together = min(map(len, finished))  # a kill may have come between two of the files
        self.rows = min(together * cog.SIDE, plan.shape[0])
        restored = [writer.restore(rows[:together]) for writer, rows in zip(self._writers.values(), finished)]
        self._counts = restored[0]

    def put(self, part: Part) -> None:
        (top, left, bottom, _), skip = part.place, max(0, self.rows - part.place.top)
        if top + skip >= bottom:
            return
        labels = part.labels[skip:]
        for row in labels:  # because bincount takes eight bytes a label
            self._counts += np.bincount(row, minlength=256)
        for kind, writer in self._writers.items():
            writer.put(top + skip, left, labels if kind == MASK else values_of(part, kind)[skip:])

    def close(self) -> np.ndarray:
        for kind, path in self.plan.more.items():
            self._writers[kind].close(path)
        self._writers[MASK].close(self.plan.mask)
        write_categories(self.plan.mask, self.plan.groups)
        return self._counts

    def discard(self) -> None:
        for writer in self._writers.values():
            writer.discard()


def write_categories(mask: Path, groups: Sequence[Group]) -> Path:
    """Write what GDAL and QGIS read about the values of a mask, next to it: the name and colour of each group."""
    by_number = {group.number: group for group in groups}
    names = [by_number[n].name if n in by_number else "" for n in range(max(by_number) + 1)]
    columns = [("Value", INTEGER, VALUE), ("Name", TEXT, NAME)]
    columns += [(name, INTEGER, RED + place) for place, name in enumerate(("Red", "Green", "Blue"))]
    lines = ["<PAMDataset>", '  <PAMRasterBand band="1">', "    <CategoryNames>"]
    lines += [f"      <Category>{escape(name)}</Category>" for name in names]
    lines += ["    </CategoryNames>", '    <GDALRasterAttributeTable tableType="thematic">']
    for index, (name, kind, usage) in enumerate(columns):
        defined = f"<Name>{name}</Name><Type>{kind}</Type><Usage>{usage}</Usage>"
        lines.append(f'      <FieldDefn index="{index}">{defined}</FieldDefn>')
    for index, group in enumerate(groups):
        values = (group.number, group.name, *group.colour)
        cells = "".join(f"<F>{escape(str(value))}</F>" for value in values)
        lines.append(f'      <Row index="{index}">{cells}</Row>')
    lines += ["    </GDALRasterAttributeTable>", "  </PAMRasterBand>", "</PAMDataset>", ""]
    return write_atomic(mask.with_name(f"{mask.name}.aux.xml"), "\n".join(lines))
