"""Keep patch features on disk in shards of about 64 MB, read through memory maps, which need little memory.

A shard is a .safetensors file with one tensor, `features` [rows,P,D] in fp16, bf16 or fp32: all squares of some
consecutive images of a dataset. Its header describes them, as JSON under one key: the numbers of the images, image name
and square of each row, which patches show data where some do not, and the images that were skipped. Nothing outside the
shards is needed to read them.

Two CRC-32 guard a shard. One covers the JSON and the features' shape and dtype, and is checked whenever the shard is
opened. The other covers the features; it is part of the JSON, and checking it reads them all (`require_sound`). A CRC
finds every change within 32 neighbouring bits for certain, and all but one in 2^32 of any others; against malice it
does nothing. It runs at twice the speed of a hardware SHA-256: 2.2 and 1.15 GB/s.
"""

from __future__ import annotations

import base64
import bisect
import itertools
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..system.files import regular, write_atomic
from ..system.locks import Lock

FORMAT = 4  # raise it when shards written before can no longer be used
SHARD_BYTES = 64 * 2**20
SHARDS = "shard-*.safetensors"  # names of the files

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # by their names in the format
_KEY = "smooseg_fast"  # the only key: the order of several may change, and shards must be equal byte for byte


@dataclass(frozen=True)
class Contents:
    """Describe the rows of a shard."""

    images: tuple[int, int]  # the first image's number in the dataset, and that behind the last
    grid: tuple[int, int]  # (h, w) patches, P = h * w row-major
    names: tuple[str, ...]  # image of each row
    crops: tuple[tuple[int, int], ...]  # (top, left) of each row's square at the squares' scale (cutting.Cutting)
    skipped: tuple[tuple[str, str], ...]  # (name, reason)
    batch: int  # squares that went through the backbone at once
    valid: str | None = None  # `packed`: which patches show data; None where every pixel of every row does


def packed(valid: np.ndarray) -> str:
    """Base64 of a bit for each of bool [rows,P]; a row fills whole bytes, the most significant bit first."""
    return base64.b64encode(np.packbits(valid, axis=1).tobytes()).decode()


@dataclass(frozen=True)
class Shard:
    contents: Contents
    features: Tensor  # [rows,P,D] fp16, bf16 or fp32, a memory map: pages are read when touched
    crc: int  # checksum of the features

    @cached_property
    def bits(self) -> np.ndarray | None:
        """`Contents.valid` as bytes, uint8 [rows,ceil(P/8)]. ValueError where they are not as many."""
        if self.contents.valid is None:
            return None
        rows, patches, _ = self.features.shape
        content = base64.b64decode(self.contents.valid, validate=True)
        return np.frombuffer(content, np.uint8).reshape(rows, -(-patches // 8))


class DamagedShard(Exception):
    """A file in a shard's place is no shard, or has changed since it was written; the message says how."""


class FeatureStore:
    """Rows of patch features, one for each square of each image, in the order of the dataset.

    `names` and `crops` give the image and the (top, left) of each row's square, at the squares' scale
    (`cutting.Cutting`). A row has `P` = h * w patches of `grid` (h, w), row-major, and `D` channels. `skipped` holds
    (name, reason) of images that could not be used; `nbytes` is the size of the features on disk. `masked` tells
    whether some pixels are no data, and `valid` which patches then count. The store holds `lock`, if any, until it is
    closed or forgotten.
    """

    def __init__(self, shards: Sequence[Shard], lock: Lock | None = None):
        contents = [shard.contents for shard in shards]
        self._features = [shard.features for shard in shards]
        self._starts = [0, *itertools.accumulate(len(features) for features in self._features)]
        self.names = tuple(name for part in contents for name in part.names)
        self.crops = tuple(crop for part in contents for crop in part.crops)
        self.skipped = [image for part in contents for image in part.skipped]
        self.grid = contents[0].grid
        self.P, self.D = self._features[0].shape[1:]
        self.nbytes = sum(features.nbytes for features in self._features)
        self._bits = [shard.bits for shard in shards]
        self.masked = any(bits is not None for bits in self._bits)
        self._lock = lock

    @property
    def folder(self) -> Path | None:
        """Its folder, if it has a lock."""
        return None if self._lock is None else self._lock.path.parent

    def close(self) -> None:
        """Let go of the files and the lock. Nothing can be read afterwards."""
        self._features = []
        if self._lock is not None:
            self._lock.release()

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, index: Tensor | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Read the rows `index` [n], in any order, repeats allowed -> [n,P,D] in `dtype` on the CPU.

        IndexError outside 0..N-1.
        """
        numbers = index.tolist() if isinstance(index, Tensor) else list(index)
        out = torch.empty(len(numbers), self.P, self.D, dtype=dtype)
        for place, number in enumerate(numbers):
            shard, offset = self._place(number)
            row = self._features[shard][offset]
            # between two 16-bit types the way by float32 takes a third of the time
            out[place] = row if dtype in (row.dtype, torch.float32) else row.float()
        return out

    def valid(self, index: Tensor | Sequence[int]) -> Tensor | None:
        """Which patches of the rows `index` [n] show data, bool [n,P] on the CPU; None where all pixels of the store
        do. A row has at least one such patch.

        IndexError outside 0..N-1.
        """
        if not self.masked:
            return None
        numbers = index.tolist() if isinstance(index, Tensor) else list(index)
        out = torch.ones(len(numbers), self.P, dtype=torch.bool)
        for place, number in enumerate(numbers):
            shard, offset = self._place(number)
            if (bits := self._bits[shard]) is not None:
                out[place] = torch.from_numpy(np.unpackbits(bits[offset], count=self.P).view(bool))
        return out

    def marked(self, number: int) -> bool:
        """Whether the shard of row `number` has pixels that are no data."""
        return self._bits[self._place(number)[0]] is not None

    def _place(self, number: int) -> tuple[int, int]:
        """The shard of a row, and its place there. IndexError outside 0..N-1."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of a store of {len(self)} rows")
        shard = bisect.bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """Read everything -> [N,P,D] on `device`.

        The default dtype is that of the shards, fp16, bf16 or fp32, or fp32 where they differ.
        """
        dtypes = {features.dtype for features in self._features if len(features)}
        dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else torch.float32)
        out = torch.empty(len(self), self.P, self.D, dtype=dtype, device=device)
        for start, features in zip(self._starts, self._features):
            out[start : start + len(features)] = features
        return out


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, contents: Contents, *parts: Tensor, exact: bool = False) -> None:
    """Write a shard whole or not at all.

    Its rows are `parts` [n,P,D] one behind the other: finite, of any float dtype; `exact` keeps them in fp32.
    """
    features = torch.cat([part.float() for part in parts]) if exact else to_storage(*parts)
    crc = zlib.crc32(features.flatten().view(torch.uint8).numpy().data)
    header = {name: value for name, value in asdict(contents).items() if value is not None}
    text = json.dumps({**header, "crc": crc}, separators=(",", ":"))
    # not save_file: it makes a file that only its owner can read, and has an error of its own for a full disk
    write_atomic(path, save({"features": features}, {_KEY: _checksum(text, features.shape, features.dtype) + text}))


def read_shard(path: Path) -> Shard | None:
    """The shard at `path`, its features memory-mapped and not read; None when there is none. DamagedShard if broken."""
    try:
        with safe_open(regular(path), "pt") as file:  # refuses a file whose size is not what its header says
            crc, text = file.metadata()[_KEY][:8], file.metadata()[_KEY][8:]
            view = file.get_slice("features")
            shape, dtype = view.get_shape(), _DTYPES[view.get_dtype()]
        if crc != _checksum(text, shape, dtype):
            raise DamagedShard("its header has changed since it was written")
        header = {name: _tuples(value) for name, value in json.loads(text).items()}
        features_crc, contents = header.pop("crc"), Contents(**header)
        rows, patches, _ = shape
        if not rows == len(contents.names) == len(contents.crops) or patches != contents.grid[0] * contents.grid[1]:
            raise DamagedShard("its header does not fit its features")
        size = path.stat().st_size
        # safe_open does not promise lazy tensors, and each of numpy's maps would hold a file descriptor
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        offset = size - torch.Size(shape).numel() * dtype.itemsize
        shard = Shard(contents, mapped[offset:].view(dtype).view(shape), features_crc)
        _ = shard.bits  # raises where they do not fit
        return shard
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DamagedShard:
        raise
    except Exception as error:  # a damaged header may raise nearly anything; the shard is then extracted again
        raise DamagedShard(f"cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})") from error


def require_sound(path: Path, shard: Shard) -> None:
    """Read all features of the `shard` at `path` from the disk. DamagedShard unless they are as they were written.

    It does not read through the memory map, where an error of the disk would end the process.
    """
    try:
        with open(path, "rb") as file:
            file.seek(-shard.features.nbytes, 2)
            crc, buffer = 0, memoryview(bytearray(2**20))
            while count := file.readinto(buffer):
                crc = zlib.crc32(buffer[:count], crc)
    except OSError as error:
        raise DamagedShard(f"cannot be read ({error.strerror or error})") from error
    if crc != shard.crc:
        raise DamagedShard("its features have changed since they were written")


def to_storage(*parts: Tensor) -> Tensor:
    """Join finite `parts` [n,...] in fp16, or in bf16 where the largest magnitude is no normal number of fp16."""
    half = torch.finfo(torch.float16)
    largest = max((abs(float(end)) for part in parts if part.numel() for end in part.aminmax()), default=0.0)
    wide = largest > half.max or 0 < largest < half.tiny
    limit = torch.finfo(torch.bfloat16).max  # the last fp32 numbers before infinity would round up to it
    out = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=torch.bfloat16 if wide else torch.float16)
    start = 0
    for part in parts:  # straight to its place: joining them in their own dtype first would take three times the memory
        out[start : start + len(part)] = part.clamp(-limit, limit) if wide else part
        start += len(part)
    return out


def _checksum(text: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    """Eight digits that guard the JSON of a shard and the shape and dtype of its features."""
    return f"{zlib.crc32(f'{text}{list(shape)}{dtype}'.encode()):08x}"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
