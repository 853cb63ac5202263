"""Reads files of torch.save and runs nothing in them: PyTorch's restricted loader, and inert stand-ins for all else.

A pickle is a program that may call any function by name. `torch.load(weights_only=True)` calls only those on a list.
Weights need the few of that list in `REAL`; every other name is refused here, or stands for an `Inert` that stores its
arguments and does nothing. The size of the file bounds the memory for tensors. A file built to copy its own texts and
lists over and over, or to nest keys without end, can still exhaust memory and crash the process.
"""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
import re
import sys
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2's names of the library, which torch.save writes
from collections import Counter, OrderedDict
from collections.abc import Iterable
from encodings import normalize_encoding
from encodings.aliases import aliases
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from ..errors import UserError

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # opens a file of before PyTorch 1.6
LEGACY_PICKLES = 5  # magic number, protocol, machine, value, keys of the storages
SLACK_BYTES = 1 << 20  # by repeating its elements a tensor may be this much larger than its file
AGAIN = "copy or download it again"
SAVE_AGAIN = "get it from where it was published or, if you trust it, save its state_dict alone again with torch.save"
REAL = {
    *(f"torch.{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "ComplexFloat", "ComplexDouble")),
    *(f"torch.{kind}Storage" for kind in ("Long", "Int", "Short", "Char", "Byte", "Bool")),
    *(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)),
    *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "parameter")),
    *("torch.Size", "torch.device", "collections.OrderedDict", "collections.Counter", "builtins.set", "_codecs.encode"),
}
# names of the standard library that data has; any other (builtins.exec, os.system) is a sign of a hostile file
DATA = re.compile(
    r"(pathlib|decimal|fractions|uuid|typing|collections|enum|datetime|argparse|types)\.\w+"
    r"|builtins\.(object|slice|range|list|dict|tuple|frozenset|str|bytes|bytearray|int|float|bool|complex)"
    r"|functools\.partial|copyreg\._reconstructor"
)
# codecs from bytes to bytes: a chain of them grows without end
GROWING = {"hex_codec", "base64_codec", "uu_codec", "quopri_codec", "bz2_codec", "zlib_codec"}
_LOADING = threading.Lock()  # torch has one list of safe names for the whole process


class Inert:
    """Stands for an object, or a call, of something that was not imported: its name (`kind`), arguments and state."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any
    kind = ""

    def __new__(cls, *args: Any) -> Inert:
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:  # stores: without it pickle sets attributes of any name
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class _Refused(Exception):
    """Completes "FILE: ..." and says what to do."""


def is_pickle(path: Path) -> bool:
    """True when a file begins like those of torch.save, or like any other pickle."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError:
        return False
    # safetensors: the length of its header in 8 bytes, then the header's brace
    return start[8:] != b"{" and (start.startswith(ZIP) or (start.startswith(PICKLE) and start[1:2] <= b"\x05"))


def read(path: Path, source: str) -> Any:
    """The value that torch.save wrote: CPU tensors without gradient, plain containers, and `Inert` for everything else.

    Raises UserError, one line that begins with `source`, for a damaged or hostile file and for one of another kind.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            names = _names_in_zip(file, size) if file.read(4) == ZIP else _names_in_legacy(file)
        value = _load(path, size, names - REAL)
        _require_plain(value, size)
        return value
    except _Refused as error:
        raise UserError(f"{source}: {error}") from error
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:  # torch's own refusal ends a long text of advice
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().splitlines()[0][:120]
        raise UserError(f"{source}: holds more than weights ({reason}); {SAVE_AGAIN}") from error
    except Exception as error:  # zipfile, pickletools and torch raise many kinds over bytes that make no sense
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{source}: cut short or damaged ({reason}); {AGAIN}") from error


def _names_in_zip(file: BinaryIO, size: int) -> set[str]:
    """Names in data.pkl of a zip whose records are uncompressed, fit into the file and match their checksums."""
    with zipfile.ZipFile(file) as archive:
        sizes = {record.filename: record.file_size for record in archive.infolist()}
        folder = next(iter(sizes), "").partition("/")[0]
        # torch ignores the case of names: it must not find another record than zipfile does
        if f"{folder}/data.pkl" not in sizes or len({name.casefold() for name in sizes}) != len(archive.infolist()):
            raise _Refused("is a zip file, but none of torch.save (no data.pkl in it); give a file of weights")
        if f"{folder}/constants.pkl" in sizes:
            raise _Refused("is a TorchScript program; give the weights that torch.save wrote of its state_dict")
        if any(record.compress_type for record in archive.infolist()) or sum(sizes.values()) > size:
            raise _Refused(f"damaged or repacked: its data is not stored as torch.save does; {AGAIN}")
        if name := archive.testzip():
            raise _Refused(f"cut short or damaged (the checksum of {name[:120]}); {AGAIN}")
        return _names([io.BytesIO(archive.read(f"{folder}/data.pkl"))])


def _names_in_legacy(file: BinaryIO) -> set[str]:
    file.seek(0)
    if file.read(1) != PICKLE:
        raise _Refused("is no file of torch.save; give one, or a folder that save_pretrained made")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:  # a lie about a length takes no memory
        if content[: len(LEGACY)] != LEGACY:
            raise _Refused("is a pickle, but none of torch.save; give a file of weights")
        names = _names([content] * LEGACY_PICKLES)
    if foreign := names - REAL:
        raise _Refused(
            f"dates from before PyTorch 1.6 and holds more than weights ({min(foreign)[:120]}); {SAVE_AGAIN}"
        )
    return names


def _names(pickles: Iterable[Any]) -> set[str]:
    """All classes and functions that the pickles name. Refuses those of Python's own library that no data has."""
    names, texts = set(), set()
    for content in pickles:
        for opcode, value, _ in pickletools.genops(content):
            if opcode.name == "PROTO" and value != 2:
                raise _Refused(f"uses protocol {value} of pickle; save it again with torch.save's own, which is 2")
            if opcode.name == "GLOBAL":
                module, name = str(value).split(" ")
                names.add(".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))))
            elif isinstance(value, str) and len(value) < 40:
                texts.add(normalize_encoding(value).lower())
    for name in sorted(names - REAL):
        if name.split(".")[0] in sys.stdlib_module_names and not DATA.fullmatch(name):
            raise _Refused(f"asks for {name[:120]}, which weights have no need of; nothing was run: {SAVE_AGAIN}")
    if "_codecs.encode" in names and GROWING & {aliases.get(text, text) for text in texts}:
        raise _Refused(f"asks for its own bytes to be packed, which weights have no need of; {SAVE_AGAIN}")
    return names


def _load(path: Path, size: int, foreign: set[str]) -> Any:
    """torch.load, with an `Inert` for each of the `foreign` names, and storages no larger than the file together."""
    storages: list[tuple[torch.UntypedStorage, int]] = []
    left = size

    def keep(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        nonlocal left
        left -= storage.nbytes()
        storages.append((storage, storage.nbytes()))
        if left < 0:
            raise _Refused(f"cut short or damaged: it names more numbers than it has bytes; {AGAIN}")
        return storage

    with _LOADING:
        declared = get_safe_globals()  # by other libraries in this process
        try:
            clear_safe_globals()
            # a name that torch knows stays torch's, whatever stands in for it
            known = foreign.difference(torch.serialization.get_unsafe_globals_in_checkpoint(path)) if foreign else ()
            if known:
                raise _Refused(f"asks for {min(known)[:120]}, which weights have no need of; {SAVE_AGAIN}")
            add_safe_globals([(type("Inert", (Inert,), {"__slots__": (), "kind": name}), name) for name in foreign])
            # torch passes untyped storages, which its stubs do not say
            value = torch.load(path, map_location=keep, weights_only=True, mmap=False)  # type: ignore[arg-type]
        finally:
            clear_safe_globals()
            add_safe_globals(declared)
    if any(storage.nbytes() != nbytes for storage, nbytes in storages):
        raise _Refused(f"damaged: a tensor reaches beyond its storage; {AGAIN}")
    return value


def _require_plain(value: Any, size: int) -> None:
    """Bounds every tensor; drops gradients and the attributes of dicts (one named `get` would hide the method)."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if item.numel() * item.element_size() > size + SLACK_BYTES:
                raise _Refused(f"damaged: a tensor of {list(item.shape)} repeats the few numbers it has; {AGAIN}")
            item.requires_grad_(False)
        elif isinstance(item, dict):
            if isinstance(item, (OrderedDict, Counter)):
                vars(item).clear()
            waiting += (*dict.keys(item), *dict.values(item))
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        elif isinstance(item, Inert):
            waiting += (item.args, item.state)
