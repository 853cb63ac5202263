"""Reads files of torch.save and runs nothing in them: PyTorch's restricted loader, and inert stand-ins for all else.

A pickle is a program that may call any function by name. `torch.load(weights_only=True)` calls only those on a list.
Weights need the few of that list in `REAL`; every other name is refused here, or stands for an `Inert` that stores its
arguments and does nothing. Tensors are views of the mapped file, so no lie about a size takes memory (of before
PyTorch 1.6 they are read, and torch checks their sizes).
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import sys
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2's names of the library, which torch.save writes
from collections import Counter, OrderedDict
from encodings import normalize_encoding
from encodings.aliases import aliases
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals, get_unsafe_globals_in_checkpoint

from ..errors import UserError
from ..system.files import regular

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # opens a file of before PyTorch 1.6
LEGACY_PICKLES = 5  # magic number, protocol, machine, value, keys of the storages
SLACK_BYTES = 1 << 20  # by repeating its elements a tensor may be this much larger than its file
# four a tensor; as many that hash alike take a dict seconds; hashing one in another in another ... overflows the stack
MOST_TUPLES = 15_000
MOST_WIDE, WIDE_BITS = 1000, 61  # whole numbers so wide that any number of them can be made to hash alike
REMEDY = "get it again or, if you trust it, save its state_dict alone again with torch.save"
STORAGES = "Double Float Half BFloat16 ComplexFloat ComplexDouble Long Int Short Char Byte Bool"
REAL = {
    *(f"torch.{kind}Storage" for kind in STORAGES.split()),
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


def is_pickle(path: Path) -> bool:
    """True when a file begins like those of torch.save, or like any other pickle."""
    try:
        with open(regular(path), "rb") as file:
            start = file.read(9)
    except OSError:
        return False
    # safetensors: the length of its header in 8 bytes, then the header's brace
    return start[8:] != b"{" and (start.startswith(ZIP) or (start.startswith(PICKLE) and start[1:2] <= b"\x05"))


def read(path: Path) -> Any:
    """The value that torch.save wrote: CPU tensors without gradient, plain containers, and `Inert` for everything else.

    Raises UserError, one line, for a damaged or hostile file and for one of another kind.
    """
    try:
        value = _load(path, _names_in(path) - REAL)
        _require_plain(value, path.stat().st_size)
    except UserError as error:
        raise UserError(f"{error}; {REMEDY}") from error
    except Exception as error:  # zipfile, pickletools and torch raise many kinds over bytes that make no sense
        text = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
        problem = f"cut short or damaged, or holds more than weights ({text.splitlines()[0][:120]})"
        raise UserError(f"{problem}; {REMEDY}") from error
    return value


def _names_in(path: Path) -> set[str]:
    """The names of all classes and functions in a file of torch.save."""
    with open(path, "rb") as file:
        start = file.read(len(LEGACY))
        file.seek(0)
        if start.startswith(ZIP):
            return _scan(io.BytesIO(_checked_pickle(file)))
        if start != LEGACY:
            raise UserError("is no file of torch.save")
        names = set().union(*(_scan(file) for _ in range(LEGACY_PICKLES)))
    if foreign := names - REAL:
        raise UserError(f"dates from before PyTorch 1.6 and holds more than weights ({min(foreign)[:120]})")
    return names


def _checked_pickle(file: IO[bytes]) -> bytes:
    """data.pkl of a zip whose records are uncompressed, fit into the file and match their checksums."""
    with zipfile.ZipFile(file) as archive:
        sizes = {record.filename: record.file_size for record in archive.infolist()}
        folder = next(iter(sizes), "").partition("/")[0]
        # torch ignores the case of names: it must not find another record than zipfile does
        unique = len({name.casefold() for name in sizes}) == len(archive.infolist())
        if not unique or f"{folder}/data.pkl" not in sizes or f"{folder}/constants.pkl" in sizes:
            raise UserError("is a zip file or a TorchScript program, and no file of torch.save")
        packed = any(record.compress_type for record in archive.infolist())
        if packed or sum(sizes.values()) > file.seek(0, io.SEEK_END):
            raise UserError("cut short or damaged, or its data is not stored as torch.save does")
        if name := archive.testzip():
            raise UserError(f"cut short or damaged (the checksum of {name[:120]})")
        return archive.read(f"{folder}/data.pkl")


def _scan(content: IO[bytes]) -> set[str]:
    """All classes and functions that a pickle names. Refuses those of Python's own library that no data has."""
    names, texts, tuples, wide = set(), set(), 0, 0
    for opcode, value, _ in pickletools.genops(content):
        tuples += opcode.name.startswith("TUPLE")
        wide += isinstance(value, int) and value.bit_length() >= WIDE_BITS
        if opcode.name == "PROTO" and value != 2:
            raise UserError(f"uses protocol {value} of pickle, and torch.save's own is 2")
        if opcode.name == "GLOBAL":
            module, name = str(value).split(" ")
            names.add(".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))))
        elif isinstance(value, str) and len(value) < 40:
            text = normalize_encoding(value).lower()
            texts.add(aliases.get(text, text))
    for name in sorted(names - REAL):
        if name.split(".")[0] in sys.stdlib_module_names and not DATA.fullmatch(name):
            raise UserError(f"asks for {name[:120]}, which weights do not need; nothing was run")
    if "_codecs.encode" in names and GROWING & texts:
        raise UserError("asks for its own bytes to be packed, which weights do not need")
    if tuples > MOST_TUPLES:
        raise UserError(f"holds {tuples:,} tuples, more than any weights")
    if wide > MOST_WIDE:
        raise UserError(f"holds {wide:,} integers of {WIDE_BITS} bits or more, which weights do not need")
    return names


def _load(path: Path, foreign: set[str]) -> Any:
    """torch.load, with an `Inert` for each of the `foreign` names."""
    with _LOADING:
        declared = get_safe_globals()  # by other libraries in this process
        try:
            clear_safe_globals()
            # a name that torch knows stays torch's, whatever stands in for it
            if known := foreign.difference(get_unsafe_globals_in_checkpoint(path) if foreign else ()):
                raise UserError(f"asks for {min(known)[:120]}, which weights do not need")
            add_safe_globals([(type("Inert", (Inert,), {"__slots__": (), "kind": name}), name) for name in foreign])
            # torch maps no legacy files, and checks their sizes itself
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        finally:
            clear_safe_globals()
            add_safe_globals(declared)


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
                raise UserError(f"damaged: a tensor of {list(item.shape)} repeats the few numbers it has")
            item.requires_grad_(False)
        elif isinstance(item, dict):
            if isinstance(item, (OrderedDict, Counter)):
                vars(item).clear()
            waiting += (*dict.keys(item), *dict.values(item))
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        elif isinstance(item, Inert):
            waiting += (item.args, item.state)
