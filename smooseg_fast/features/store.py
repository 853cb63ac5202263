"""Feature store: patch features on disk as shards of about 64 MB, read through memory maps, so that it may exceed the memory.

A shard is a .safetensors file with one tensor, `features` [rows,P,D] in fp16 or bf16, and in its header, as JSON under one key, what
the rows are: image name and square of each, the images skipped on the way, and where in the dataset the shard starts and ends. The
shards of a folder form a chain: each starts where the one before ended. Nothing outside the shards is needed to read them.

Two CRC-32 guard a shard: one of the JSON, looked at whenever the shard is opened, and one of the features, in the JSON, for which all of
them have to be read (`require_sound`). A CRC finds every change within 32 neighbouring bits for certain, and all but one in 2^32 of any
others; against malice it does nothing. It runs at twice the speed of SHA-256 where the processor helps with that: 2.2 and 1.15 GB/s.
"""

from __future__ import annotations

import bisect
import itertools
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..system.files import write_atomic
from ..system.locks import Lock

FORMAT = 2  # changes when shards written before can no longer be used
SHARD_BYTES = 64 * 2**20
SHARDS = "shard-*.safetensors"  # their names

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}  # as the format calls them
_KEY = "smooseg_fast"  # one key only: safetensors does not keep the order of several, and shards must be equal byte for byte


@dataclass(frozen=True)
class Contents:
    """What a shard's rows are. Positions in the dataset are (image number, square number within the image)."""

    start: tuple[int, int]
    end: tuple[int, int]  # the position after the last row, past any skipped images
    grid: tuple[int, int]  # (h, w) patches, P = h * w row-major
    names: tuple[str, ...]  # image of each row
    crops: tuple[
        tuple[int, int], ...
    ]  # (top, left) of each row's square in the image at that scale (images.cut_squares)
    skipped: tuple[tuple[str, str], ...]  # (name, reason)
    batch: int = 0  # squares that went through the backbone at once; 0: not known


@dataclass(frozen=True)
class Shard:
    contents: Contents
    features: Tensor  # [rows,P,D] fp16 or bf16, a memory map: pages are read when touched
    crc: int  # of the features


class DamagedShard(Exception):
    """A file that stands in a shard's place and is none, or is not as it was written; says how."""


class FeatureStore:
    """Rows of patch features, one for each square of each image, in the order of the dataset.

    `names` and `crops` tell the image and the (top, left) of each row's square, at the squares' scale (`images.cut_squares`);
    `grid` (h, w), `P` = h * w patches row-major, `D` channels; `skipped` holds (name, reason) of images that could not be used;
    `nbytes` is the size of the features on disk. `lock`, if any, is held as long as the store is there.
    """

    def __init__(self, shards: Sequence[Shard], lock: Lock | None = None):
        contents = [shard.contents for shard in shards]
        self._features = [shard.features for shard in shards]
        self._starts = [0, *itertools.accumulate(len(features) for features in self._features)]
        self.names = tuple(itertools.chain.from_iterable(each.names for each in contents))
        self.crops = tuple(itertools.chain.from_iterable(each.crops for each in contents))
        self.skipped = list(itertools.chain.from_iterable(each.skipped for each in contents))
        self.grid = contents[0].grid
        self.P, self.D = self._features[0].shape[1:]
        self.nbytes = sum(features.nbytes for features in self._features)
        self._lock = lock

    @property
    def folder(self) -> Path | None:
        """Where it lies, if it has a lock."""
        return None if self._lock is None else self._lock.path.parent

    def close(self) -> None:
        """Lets go of the files and the lock; nothing can be read after it."""
        self._features = []
        if self._lock is not None:
            self._lock.release()

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, index: Tensor | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """[n,P,D] in `dtype` on the CPU: the rows numbered `index` [n], in any order, repeats allowed. IndexError outside 0..N-1."""
        numbers = index.tolist() if isinstance(index, Tensor) else list(index)
        out = torch.empty(len(numbers), self.P, self.D, dtype=dtype)
        for place, number in enumerate(numbers):
            if not 0 <= number < len(self):
                raise IndexError(f"row {number} of a store of {len(self)} rows")
            shard = bisect.bisect_right(self._starts, number) - 1
            row = self._features[shard][number - self._starts[shard]]
            out[place] = (
                row if dtype in (row.dtype, torch.float32) else row.float()
            )  # from 16 bits to other 16 bits a third of the time
        return out

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """Everything as one [N,P,D] on `device`. Without `dtype` it is the store's own: fp16 or bf16, fp32 when shards differ."""
        kinds = {features.dtype for features in self._features}
        dtype = dtype or (kinds.pop() if len(kinds) == 1 else torch.float32)
        out = torch.empty(len(self), self.P, self.D, dtype=dtype, device=device)
        for start, features in zip(self._starts, self._features):
            out[start : start + len(features)] = features
        return out


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, contents: Contents, *parts: Tensor) -> None:
    """Whole or not at all. `parts` [n,P,D] one behind the other, finite, any float type; kept as `to_storage` has it."""
    features = to_storage(*parts)
    guarded = {
        **asdict(contents),
        "dtype": _DTYPES[features.dtype],
        "shape": list(features.shape),
        "crc": _crc(features),
    }
    text = json.dumps(guarded, separators=(",", ":"))
    # bytes, not save_file: that makes a file only its owner can read, and reports a full disk as an error of its own kind
    write_atomic(path, save({"features": features}, {_KEY: f"{zlib.crc32(text.encode()):08x}{text}"}))


def read_shard(path: Path) -> Shard | None:
    """The shard at `path` with its features memory-mapped and not looked at; None when there is none. DamagedShard when it is not whole."""
    try:
        with safe_open(path, "pt") as file:  # refuses a file whose size is not what its header says
            crc, text = file.metadata()[_KEY][:8], file.metadata()[_KEY][8:]
            view = file.get_slice("features")
            shape, dtype = view.get_shape(), view.get_dtype()
        if crc != f"{zlib.crc32(text.encode()):08x}":
            raise DamagedShard("its header has changed since it was written")
        header = json.loads(text)
        contents = _contents(header)
        rows, patches, _ = shape
        fits = rows == len(contents.names) == len(contents.crops) and patches == contents.grid[0] * contents.grid[1]
        if not fits or (shape, dtype) != (header["shape"], header["dtype"]):
            raise DamagedShard("its header does not fit its features")
        size, kind = path.stat().st_size, {name: each for each, name in _DTYPES.items()}[dtype]
        # not safe_open's tensors, whose laziness is no promise, nor numpy's maps, each of which would hold a file descriptor
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        offset = size - torch.Size(shape).numel() * kind.itemsize
        return Shard(contents, whole[offset:].view(kind).view(shape), header["crc"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DamagedShard:
        raise
    except (
        Exception
    ) as error:  # a damaged header may raise nearly anything, and the answer is always to extract the shard again
        raise DamagedShard(f"cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})") from error


def require_sound(path: Path, shard: Shard) -> None:
    """Reads the features of the `shard` at `path` from the disk; DamagedShard unless they are as they were written.

    Not through the memory map: where the disk gives an error, that would end the process.
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
    """Finite `parts` [n,...] as one, in fp16, or in bf16 where the largest magnitude is beyond fp16's range or below its normal numbers."""
    half = torch.finfo(torch.float16)
    largest = max((abs(float(end)) for part in parts if part.numel() for end in part.aminmax()), default=0.0)
    wide = largest > half.max or 0 < largest < half.tiny
    limit = torch.finfo(torch.bfloat16).max  # the last fp32 numbers before infinity would round up to it
    out = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=torch.bfloat16 if wide else torch.float16)
    start = 0
    for part in parts:  # each straight to its place: all of them in their own type would be as much again or twice
        out[start : start + len(part)] = part.clamp(-limit, limit) if wide else part
        start += len(part)
    return out


def _crc(features: Tensor) -> int:
    return zlib.crc32(features.flatten().view(torch.uint8).numpy())


def _contents(header: dict) -> Contents:
    def pairs(values: list) -> tuple:
        return tuple((first, second) for first, second in values)

    start, end, grid = pairs([header["start"], header["end"], header["grid"]])
    return Contents(
        start, end, grid, tuple(header["names"]), pairs(header["crops"]), pairs(header["skipped"]), header["batch"]
    )
