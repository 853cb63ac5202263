"""Cloud-optimised GeoTIFFs of bytes, written from parts that come in any order, in memory for the tiles under way.

A file begins with the directories of the picture and of its overviews, each half as large; their tiles follow, those
of the smallest overview first. Overviews take every second pixel, because labels have no mean.
"""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any, Protocol
from xml.sax.saxutils import escape

import numpy as np

from ..datasets.georeference import DOUBLE, KEYS, SHORT, WORDS, Georeference
from ..datasets.imageerror import decoding
from ..datasets.tiff import directories
from ..system.files import open_binary, write_atomic

SIDE = 512  # of a tile; a multiple of 32
LEVEL = 6  # of deflate
CLASSIC = 2**32 - 2**20  # bytes up to which offsets have 32 bits
BYTE, ASCII, LONG, LONG8 = 1, 2, 4, 16  # types of TIFF
LETTERS = {BYTE: "B", SHORT: "H", LONG: "I", LONG8: "Q", DOUBLE: "d"}
# GDAL's note that tiles follow the directories, each between its size and a copy of its last bytes
STRUCTURE = """LAYOUT=IFDS_BEFORE_DATA
BLOCK_ORDER=ROW_MAJOR
BLOCK_LEADER=SIZE_AS_UINT4
BLOCK_TRAILER=LAST_4_BYTES_REPEATED
KNOWN_INCOMPATIBLE_EDITION=NO
 """
AROUND = 4  # bytes before a tile, and after it

Field = tuple[int, int, Sequence[Any] | bytes]  # tag, type, values
Places = list[list[int]]  # place and bytes of the tiles of a row, one after the other, each with all its bands


class Keeper(Protocol):
    """Keeps the packed tiles of the picture in the file `path`, see `unfinished.Kept`."""

    path: Path
    rows: list[Places]

    def note(self, row: int, places: Places) -> None: ...


@dataclass(frozen=True)
class Layout:
    """The picture in a file.

    Attributes:
        shape: (height, width).
        nodata: the value without data, of every band.
        colours: uint8 [256,3] of the values of a single band; None for grey.
        bands: a name for each band.
        scale: what a value is multiplied with; None for numbers that are labels.
        place: where it lies on the earth.
    """

    shape: tuple[int, int]
    nodata: int
    colours: np.ndarray | None = None
    bands: Sequence[str] = ("",)
    scale: float | None = None
    place: Georeference | None = None

    def fields(self) -> list[Field]:
        """The tags that all levels have."""
        n = len(self.bands)
        fields: list[Field] = [
            (258, SHORT, [8] * n),
            (259, SHORT, [8]),  # deflate
            (262, SHORT, [1 if self.colours is None else 3]),
            (277, SHORT, [n]),
            (284, SHORT, [1 if n == 1 else 2]),  # one band after the other
            (322, SHORT, [SIDE]),
            (323, SHORT, [SIDE]),
            (339, SHORT, [1] * n),
            (42113, ASCII, f"{self.nodata}\0".encode()),
        ]
        if n > 1:
            fields.append((338, SHORT, [0] * (n - 1)))
        if self.colours is not None:  # of 16 bits, all reds first
            fields.append((320, SHORT, (self.colours.T.astype(np.uint16) * 257).ravel().tolist()))
        return fields

    def metadata(self) -> list[Field]:
        """The tags of the first level alone: place, names and scale."""
        fields: list[Field] = []
        for tag, values in (self.place.tags if self.place is not None else {}).items():
            fields.append((tag, ASCII if tag == WORDS else SHORT if tag == KEYS else DOUBLE, values))
        items = [("DESCRIPTION", "description", name) for name in self.bands]
        lines = [
            f'<Item name="{name}" sample="{number}" role="{role}">{escape(value)}</Item>'
            for number, (name, role, value) in enumerate(items)
            if value
        ]
        if self.scale is not None:
            lines += [f'<Item name="SCALE" sample="{n}" role="scale">{self.scale!r}</Item>' for n in range(len(items))]
        if lines:
            text = "<GDALMetadata>\n" + "\n".join(lines) + "\n</GDALMetadata>\n\0"
            fields.append((42112, ASCII, text.encode()))
        return fields


@dataclass
class Level:
    """The tiles of a picture or of one of its overviews, packed in a temporary file."""

    shape: tuple[int, int]
    bands: int
    nodata: int
    file: IO[bytes]
    smaller: Level | None
    open: dict[tuple[int, int], tuple[np.ndarray, int]] = field(default_factory=dict)  # tile, and pixels to come
    packed: dict[tuple[int, int, int], tuple[int, int]] = field(default_factory=dict)  # band, row, column: place, bytes
    to_come: dict[int, int] = field(default_factory=dict)  # tiles of the rows under way
    kept: Keeper | None = None

    @property
    def tiles(self) -> tuple[int, int]:
        """How many there are down and across."""
        return -(-self.shape[0] // SIDE), -(-self.shape[1] // SIDE)

    def put(self, top: int, left: int, block: np.ndarray) -> None:
        """Add pixels uint8 [n,m,bands]; tiles that are whole are packed."""
        bottom, right = top + block.shape[0], left + block.shape[1]
        for row in range(top // SIDE, -(-bottom // SIDE)):
            for column in range(left // SIDE, -(-right // SIDE)):
                y, x = row * SIDE, column * SIDE
                height, width = min(SIDE, self.shape[0] - y), min(SIDE, self.shape[1] - x)
                if (row, column) not in self.open:
                    fresh = np.full((SIDE, SIDE, self.bands), self.nodata, np.uint8)
                    self.open[row, column] = fresh, height * width
                tile, missing = self.open[row, column]
                first, last = (max(top, y), max(left, x)), (min(bottom, y + height), min(right, x + width))
                part = block[first[0] - top : last[0] - top, first[1] - left : last[1] - left]
                tile[first[0] - y : last[0] - y, first[1] - x : last[1] - x] = part
                missing -= part.shape[0] * part.shape[1]
                self.open[row, column] = tile, missing
                if not missing:
                    self._pack(row, column, height, width)

    def _pack(self, row: int, column: int, height: int, width: int) -> None:
        tile, _ = self.open.pop((row, column))
        for band in range(self.bands):
            data = zlib.compress(tile[..., band].tobytes(), LEVEL)
            self.packed[band, row, column] = self.file.tell(), len(data)
            self.file.write(data)
        self._shrink(row, column, tile[:height, :width])
        self.to_come[row] = self.to_come.get(row, self.tiles[1]) - 1
        if not self.to_come[row]:
            del self.to_come[row]
            if self.kept is not None:
                self.file.flush()
                across, bands = range(self.tiles[1]), range(self.bands)
                self.kept.note(row, [[*self.packed[band, row, column]] for column in across for band in bands])

    def _shrink(self, row: int, column: int, tile: np.ndarray) -> None:
        """Hand the pixels [n,m,bands] of a tile to the next overview."""
        if self.smaller is not None:
            self.smaller.put(row * SIDE // 2, column * SIDE // 2, tile[::2, ::2])

    def restore(self, row: int, places: Places) -> np.ndarray:
        """Take over the tiles of a row that are packed in the file -> the pixels of each value in the first band, int64
        [256]. zlib.error or ValueError where they are damaged."""
        if len(places) != self.tiles[1] * self.bands:
            raise ValueError("not as many tiles as a row has")
        counts, places_left, end = np.zeros(256, np.int64), iter(places), self.file.seek(0, 2)
        for column in range(self.tiles[1]):
            size = min(SIDE, self.shape[0] - row * SIDE), min(SIDE, self.shape[1] - column * SIDE)
            bands = []
            for band in range(self.bands):
                place, count = next(places_left)
                if place + count > end:
                    raise ValueError("a tile beyond the end")
                self.packed[band, row, column] = place, count
                self.file.seek(place)
                data = zlib.decompressobj().decompress(self.file.read(count), SIDE * SIDE + 1)
                bands.append(np.frombuffer(data, np.uint8).reshape(SIDE, SIDE)[: size[0], : size[1]])
            counts += np.bincount(bands[0].ravel(), minlength=256)
            self._shrink(row, column, np.stack(bands, -1))
        self.file.seek(0, 2)
        return counts

    def in_order(self) -> list[tuple[int, int]]:
        """Place and size of all tiles, row by row, band by band."""
        (down, across), bands = self.tiles, range(self.bands)
        return [self.packed[b, row, column] for b in bands for row in range(down) for column in range(across)]


class CogWriter:
    """Takes the parts of a picture, each pixel once, and writes the file when `close` is called.

    Args:
        folder: where temporary files of about the size of the result lie meanwhile; they have no name, so nothing is
            left after a stop.
        kept: keeps the tiles of the picture itself, if they are to outlast a stop.
    """

    def __init__(self, layout: Layout, folder: Path | None, kept: Keeper | None = None):
        self.layout, shapes = layout, [layout.shape]
        while max(shapes[-1]) > SIDE:
            shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
        self.levels: list[Level] = []  # from the smallest on
        for shape in reversed(shapes):
            smaller = self.levels[-1] if self.levels else None
            keeper = kept if shape == layout.shape else None
            # open until `discard`
            file: IO[bytes] = tempfile.TemporaryFile(dir=folder) if keeper is None else open(keeper.path, "a+b")  # noqa: SIM115
            self.levels.append(Level(shape, len(layout.bands), layout.nodata, file, smaller, kept=keeper))
        self.levels[-1].file.seek(0, 2)

    def restore(self, rows: Sequence[Places]) -> np.ndarray:
        """Take over the first rows of tiles, which are kept -> the pixels of each value in the first band, int64 [256].

        zlib.error or ValueError where they are damaged.
        """
        counts = np.zeros(256, np.int64)
        for row, places in enumerate(rows):
            counts += self.levels[-1].restore(row, places)
        return counts

    def put(self, top: int, left: int, block: np.ndarray) -> None:
        """Add pixels uint8 [n,m] or [n,m,bands]."""
        self.levels[-1].put(top, left, block if block.ndim == 3 else block[..., None])

    def close(self, path: Path) -> Path:
        """Write the file at `path`, whole or not at all. WriteError where that fails."""
        try:
            return write_atomic(path, self._write)
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget everything."""
        for level in self.levels:
            level.file.close()

    def _write(self, path: Path) -> None:
        counts = [count for level in self.levels for _, count in level.packed.values()]
        big = sum(counts) + 64 * len(counts) > CLASSIC
        structure = f"GDAL_STRUCTURAL_METADATA_SIZE={len(STRUCTURE):06} bytes\n{STRUCTURE}".encode()
        start = (16 if big else 8) + len(structure)
        start += start % 2
        largest_first = self.levels[::-1]
        places: dict[int, list[int]] = {}
        directories = b""
        for _ in range(2):  # the size of the directories, then the places of the tiles after them
            at = start + len(directories)
            for level in self.levels:
                offsets = places[id(level)] = []
                for _, count in level.in_order():
                    offsets.append(at + AROUND)
                    at += count + 2 * AROUND
            directories = b""
            for number, level in enumerate(largest_first):
                fields = self._fields(level, places[id(level)], big, number)
                last = number == len(largest_first) - 1
                directories += directory(fields, start + len(directories), big, last)
        with open(path, "wb") as file:
            first = struct.pack("<2sHHHQ", b"II", 43, 8, 0, start) if big else struct.pack("<2sHI", b"II", 42, start)
            file.write((first + structure).ljust(start, b"\0") + directories)
            for level in self.levels:
                for place, count in level.in_order():
                    level.file.seek(place)
                    data = level.file.read(count)
                    file.write(struct.pack("<I", count) + data + data[-AROUND:])

    def _fields(self, level: Level, offsets: Sequence[int], big: bool, number: int) -> list[Field]:
        height, width = level.shape
        fields = [
            (254, LONG, [1 if number else 0]),  # a reduced copy
            (256, LONG, [width]),
            (257, LONG, [height]),
            (324, LONG8 if big else LONG, offsets),
            (325, LONG, [count for _, count in level.in_order()]),
            *self.layout.fields(),
        ]
        return fields if number else fields + self.layout.metadata()


def directory(fields: Sequence[Field], at: int, big: bool, last: bool) -> bytes:
    """The bytes of a directory of tags that lies at `at`, with its long values after it; the next one follows."""
    room, entry, count_letter = (8, 20, "Q") if big else (4, 12, "I")
    head = (8 if big else 2) + entry * len(fields) + room
    entries, more = b"", b""
    for tag, kind, values in sorted(fields, key=lambda item: item[0]):
        data = values if isinstance(values, bytes) else struct.pack(f"<{len(values)}{LETTERS[kind]}", *values)
        entries += struct.pack(f"<HH{count_letter}", tag, kind, len(values))
        if len(data) <= room:
            entries += data.ljust(room, b"\0")
        else:
            entries += struct.pack(f"<{count_letter}", at + head + len(more))
            more += data + b"\0" * (len(data) % 2)
    size = head + len(more)
    following = struct.pack(f"<{count_letter}", 0 if last else at + size)
    return struct.pack("<Q" if big else "<H", len(fields)) + entries + following + more


def read_level(path: Path, most: int) -> np.ndarray:
    """The first band uint8 [h,w] of the largest picture or overview of a file that has at most `most` pixels, else of
    the smallest. ImageError where it is not as it was written here."""
    with decoding(path), open_binary(path) as file:
        tags = next(tags for tags in directories(file) if tags[256] * tags[257] <= most or not tags.next)
        out = np.empty((-(-tags[257] // SIDE) * SIDE, -(-tags[256] // SIDE) * SIDE), np.uint8)
        across = out.shape[1] // SIDE
        for number, (place, count) in enumerate(zip(tags[324], tags[325])):
            if number == out.size // SIDE**2:  # of the first band
                break
            file.seek(place)
            tile = np.frombuffer(zlib.decompress(file.read(count)), np.uint8).reshape(SIDE, SIDE)
            row, column = divmod(number, across)
            out[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE] = tile
        return out[: tags[257], : tags[256]]


def recolour(path: Path, colours: np.ndarray) -> Path:
    """Give the values of a file other colours, uint8 [256,3]. WriteError where it cannot be written."""
    new = (colours.T.astype("<u2") * 257).tobytes()

    def write(target: Path) -> None:
        with decoding(path), open_binary(path) as file, open(target, "wb") as copy:
            levels = list(directories(file))
            file.seek(0)
            head = file.read(min(levels[-1][324]) - AROUND)  # all directories
            copy.write(head.replace(struct.pack("<768H", *levels[0][320]), new))
            copyfileobj(file, copy)

    return write_atomic(path, write)
