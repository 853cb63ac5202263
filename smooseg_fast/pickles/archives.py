"""The two formats of torch.save: a zip of a pickle and its storages, and, before PyTorch 1.6, pickles with the storages behind them."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import UserError
from .calls import Budget, element_type
from .machine import Machine
from .values import Global, Refused, Storage

ZIP, PICKLE, MAGIC = b"PK\x03\x04", b"\x80", 0x1950A86A20F9469CFC6C  # the last opens a file of before PyTorch 1.6
PIECE = 1 << 24  # bytes that are read at once
AGAIN = "copy or download it again"


def is_pickle(path: Path) -> bool:
    """Whether a file begins as those of torch.save do, or as any pickle."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError:
        return False
    # safetensors: the length of its header in 8 bytes, then the header's brace
    return start[8:] != b"{" and (start.startswith(ZIP) or (start.startswith(PICKLE) and start[1:2] <= b"\x05"))


def read(path: Path, source: str) -> Any:
    """What torch.save wrote to `path`: tensors on the CPU, plain containers, and `Inert` and `Global` for everything else.

    Nothing in the file is imported or called. UserError in one line that begins with `source` (what the user gave) when the file is
    damaged, of another kind, or asks for a call that is not on the list of `calls`.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(264)
            file.seek(0)
            if start.startswith(ZIP):
                return _read_zip(file, path.stat().st_size)
            if start[257:262] == b"ustar":
                raise Refused("was written by a PyTorch of before 0.2; load it with that one and save it again")
            if start.startswith(PICKLE):
                return _read_legacy(file)
            raise Refused("is no file of torch.save; give one, or a folder that save_pretrained made")
    except Refused as error:
        raise UserError(f"{source}: {error}") from error
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from error


# ---------------------------------------------------------------------------------------------------------------------- zip


def _read_zip(file: BinaryIO, size: int) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
            pickles = [
                name for name in records if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)
            ]
            if len(pickles) != 1 or len(records) != len(archive.infolist()):
                raise Refused(
                    f"is a zip file, but none of torch.save ({len(pickles)} data.pkl in it); give a file of weights"
                )
            folder = pickles[0].removesuffix("data.pkl")
            if f"{folder}constants.pkl" in records:
                raise Refused("is a TorchScript program; give the weights that torch.save wrote of its state_dict")
            reader = _ZipStorages(archive, records, folder, size)
            if f"{folder}byteorder" in records and reader.record("byteorder").numpy().tobytes() != b"little":
                raise Refused(
                    "has its numbers in the byte order of another kind of machine; save it again on a little-endian one"
                )
            content = io.BytesIO(reader.record("data.pkl").numpy().tobytes())
            return Machine(reader.load, Budget(4 * size + (1 << 20))).run(content)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, LookupError) as error:
        # a RuntimeError also for encryption, and as NotImplementedError for a compression that zipfile does not know
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise Refused(f"cut short or damaged ({reason}); {AGAIN}") from error


class _ZipStorages:
    """Records of a zip as bytes. All of them together are no larger than the file: then none is compressed, and none is read twice."""

    def __init__(self, archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], folder: str, size: int):
        self._archive, self._records, self._folder, self._left = archive, records, folder, size
        self._storages: dict[str, Tensor] = {}

    def load(self, identifier: Any) -> Storage:
        kind, key, count = _identifier(identifier)
        if key not in self._storages:
            self._storages[key] = self.record(f"data/{key}")
        return Storage(_typed(self._storages[key], element_type(kind), count))

    def record(self, name: str) -> Tensor:
        """uint8, checked against the record's checksum."""
        info = self._records.get(self._folder + name)
        if info is None:
            raise Refused(f"damaged: there is no {name[:120]} in it; {AGAIN}")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.compress_size != info.file_size
            or info.file_size > self._left
        ):
            raise Refused(f"damaged or packed anew: its {name[:120]} is not stored as torch.save does; {AGAIN}")
        self._left -= info.file_size
        content = torch.empty(info.file_size, dtype=torch.uint8)
        view, done = memoryview(content.numpy()), 0
        with self._archive.open(info) as source:
            while piece := source.read(PIECE):
                view[done : done + len(piece)] = piece
                done += len(piece)
        if done != info.file_size:
            raise Refused(f"cut short: {done} of {info.file_size} bytes of {name[:120]} are there; {AGAIN}")
        return content


# ------------------------------------------------------------------------------------------------------------------- legacy


def _read_legacy(file: BinaryIO) -> Any:
    """Magic number, protocol, machine, the value, the keys of its storages; then each storage: its length as int64, its bytes."""
    with mmap.mmap(
        file.fileno(), 0, access=mmap.ACCESS_READ
    ) as content:  # reads no more than is there, whatever length is asked for
        size = len(content)
        storages = _LegacyStorages(size)
        budget = Budget(4 * size + (1 << 20))
        magic = Machine(_no_storage, budget).run(content)
        if type(magic) is not int or magic != MAGIC:
            raise Refused("is a pickle, but none of torch.save; give a file of weights")
        Machine(_no_storage, budget).run(content)  # 1001
        machine = Machine(_no_storage, budget).run(content)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise Refused(
                "has its numbers in the byte order of another kind of machine; save it again on a little-endian one"
            )
        value = Machine(storages.load, budget).run(content)
        storages.fill(Machine(_no_storage, budget).run(content), content)
        return value


def _no_storage(identifier: Any) -> Any:
    raise Refused(f"damaged: numbers are referred to before their place; {AGAIN}")


class _LegacyStorages:
    """Storages whose bytes come behind the value: made of zeros where the value names them, filled at the end."""

    def __init__(self, size: int):
        self._left = size
        self._storages: dict[str, tuple[int, Tensor]] = {}  # key -> (bytes of an element, uint8)

    def load(self, identifier: Any) -> Storage | Global:
        if (
            isinstance(identifier, tuple)
            and len(identifier) == 4
            and identifier[0] == "module"
            and isinstance(identifier[1], Global)
        ):
            return identifier[1]  # a class, with its source behind it
        kind, key, count = _identifier(identifier)
        dtype = element_type(kind)
        if key not in self._storages:
            self._left -= count * dtype.itemsize
            if self._left < 0:
                raise Refused(f"cut short or damaged: it names more numbers than it has bytes; {AGAIN}")
            self._storages[key] = dtype.itemsize, torch.zeros(count * dtype.itemsize, dtype=torch.uint8)
        return Storage(_typed(self._storages[key][1], dtype, count))

    def fill(self, keys: Any, content: mmap.mmap) -> None:
        if (
            not isinstance(keys, list)
            or not all(isinstance(key, str) for key in keys)
            or sorted(keys) != sorted(self._storages)
        ):
            raise Refused(f"damaged: its list of storages does not belong to its value; {AGAIN}")
        for key in keys:
            itemsize, storage = self._storages[key]
            length = content.read(8)
            if len(length) < 8 or int.from_bytes(length, "little") * itemsize != len(storage):
                raise Refused(f"cut short or damaged at storage {key[:120]}; {AGAIN}")
            view, done = memoryview(storage.numpy()), 0
            while done < len(storage):
                piece = content.read(min(PIECE, len(storage) - done))
                if not piece:
                    raise Refused(
                        f"cut short: {done} of {len(storage)} bytes of storage {key[:120]} are there; {AGAIN}"
                    )
                view[done : done + len(piece)] = piece
                done += len(piece)


# --------------------------------------------------------------------------------------------------------------------- both


def _identifier(identifier: Any) -> tuple[Any, str, int]:
    """(kind, key, elements) of torch's ("storage", kind, key, device, elements), which before 1.6 has a view at its end."""
    if (
        not isinstance(identifier, tuple)
        or len(identifier) not in (5, 6)
        or identifier[0] != "storage"
        or not isinstance(identifier[2], str)
        or type(identifier[4]) is not int
        or identifier[4] < 0
        or (len(identifier) == 6 and identifier[5] is not None)
    ):
        raise Refused(f"damaged: it refers to numbers in a way that torch.save does not; {AGAIN}")
    return identifier[1], identifier[2], identifier[4]


def _typed(storage: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    if count * dtype.itemsize > len(storage):
        raise Refused(f"cut short or damaged: a storage of {count} numbers has {len(storage)} bytes; {AGAIN}")
    return storage[: count * dtype.itemsize].view(dtype)
