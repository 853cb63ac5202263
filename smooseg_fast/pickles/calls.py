"""The calls that a weights file may ask for, by name: each is a function of ours that checks what it is given."""

from __future__ import annotations

import math
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .values import Global, Inert, Refused, Storage

MANY = 1 << 20  # elements that a tensor may repeat its storage to
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}

# of Python's own library, where classes too reach the machine (subprocess.Popen); a name is never looked up, so these are what may lie in
# a file, not what may run
DATA = re.compile(
    r"(pathlib|decimal|fractions|uuid|typing|collections|enum)\.[A-Z]\w*|collections\.deque"
    r"|datetime\.(date|datetime|time|timedelta|timezone)|argparse\.Namespace|types\.SimpleNamespace|functools\.partial|operator\.getitem"
    r"|copyreg\._reconstructor|builtins\.(object|slice|range)"
)
CLASS = re.compile(r"_*[A-Z]\w*(\._*[A-Z]\w*)*")


class Budget:
    """What the calls of one file may copy, in bytes, so that a small file cannot fill the memory."""

    def __init__(self, size: int):
        self.left = size

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise Refused("would take far more memory than it has bytes; get it again from where it was published")


def call(name: Global, args: tuple[Any, ...], budget: Budget, *, constructs: bool) -> Any:
    """What `name(*args)` stands for. constructs: the file makes an object without calling anything, so `name` is a class."""
    admitted = ADMITTED.get((name.module, name.name))
    if admitted is None:
        if is_data(name) or (constructs and CLASS.fullmatch(name.name)):
            return Inert(name, args)
        raise Refused(
            f"asks for a call of {name}, which weights have no need of; nothing was run: get the file from where it was published, "
            "or, where you trust it, save the weights alone again with torch.save"
        )
    try:
        return admitted(budget, *args)
    except (TypeError, ValueError, RuntimeError, OverflowError, LookupError, AttributeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise Refused(f"damaged: its {name} makes no sense ({reason}); copy or download it again") from error


def is_data(name: Global) -> bool:
    """Whether an unknown call only makes an object: of Python's own library those of DATA, of others whatever is named like a class."""
    if name.module.split(".")[0] in sys.stdlib_module_names:
        return DATA.fullmatch(f"{name.module}.{name.name}") is not None
    return CLASS.fullmatch(name.name) is not None


def constant(name: Global) -> Any:
    """What a global stands for by itself: torch's dtypes; everything else stays a name."""
    return DTYPES.get(name.name, name) if name.module == "torch" else name


def element_type(name: Any) -> torch.dtype:
    if isinstance(name, Global) and name.module in ("torch", "torch.cuda", "torch.storage") and name.name in STORAGES:
        return STORAGES[name.name]
    what = name if isinstance(name, Global) else type(name).__name__
    raise Refused(f"has numbers of a kind that is not read ({what}); save the weights again as float32 with torch.save")


# ------------------------------------------------------------------------------------------------------------------ tensors


def _naturals(values: Any) -> tuple[int, ...]:
    if (
        not isinstance(values, (tuple, list))
        or len(values) > 64
        or not all(type(n) is int and 0 <= n < 2**62 for n in values)
    ):
        raise ValueError("a shape that is none")
    return tuple(values)


def _view(numbers: Tensor, offset: Any, size: Any, stride: Any) -> Tensor:
    (offset,), size, stride = _naturals([offset]), _naturals(size), _naturals(stride)
    if len(size) != len(stride):
        raise ValueError("as many strides as sides are needed")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if count else offset - 1
    if last >= len(numbers) or count > max(len(numbers), MANY):
        raise ValueError("a tensor that reaches beyond its storage")
    return numbers.as_strided(size, stride, offset)


def _tensor(budget: Budget, storage: Storage, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    return _view(storage.numbers, offset, size, stride)


def _typed_tensor(
    budget: Budget,
    storage: Storage,
    offset: Any,
    size: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
    dtype: torch.dtype,
    *rest: Any,
) -> Tensor:
    return _view(storage.numbers.view(dtype), offset, size, stride)


def _parameter(budget: Budget, data: Any, *rest: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError("a parameter without a tensor")
    return data


def _from_type(budget: Budget, function: Global, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    return call(function, args, budget, constructs=False)  # a tensor with attributes, which are left out


# --------------------------------------------------------------------------------------------------------------- containers


def _copied(kind: type) -> Callable[..., Any]:
    def make(budget: Budget, values: Any = ()) -> Any:
        if not isinstance(values, (list, tuple, set, frozenset)):
            raise TypeError(f"a {kind.__name__} of no list")
        budget.spend(64 * len(values))
        if kind in (set, frozenset):
            require_keys(values)
        return kind(values)

    return make


def _dict(budget: Budget, pairs: Any = ()) -> OrderedDict[Any, Any]:
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not isinstance(pairs, (list, tuple)):
        raise TypeError("a dict of no pairs")
    budget.spend(128 * len(pairs))
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise TypeError("a dict of no pairs")
    require_keys([key for key, _ in pairs])
    return OrderedDict(pairs)


def _defaultdict(budget: Budget, factory: Any = None, pairs: Any = ()) -> OrderedDict[Any, Any]:
    return _dict(budget, pairs)


def _size(budget: Budget, sides: Any = ()) -> torch.Size:
    return torch.Size(_naturals(sides))


def _device(budget: Budget, kind: Any, index: Any = None) -> torch.device:
    return torch.device(str(kind)) if index is None else torch.device(str(kind), int(index))


def _bytes(budget: Budget, text: str, encoding: str) -> bytes:
    """Bytes as protocol 2 writes them."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"encoding {encoding!r}")
    budget.spend(len(text))
    return text.encode("latin-1")


def _bytearray(budget: Budget, value: Any = b"", encoding: str = "latin1") -> bytearray:
    raw = _raw(value) if value or isinstance(value, (str, bytes)) else b""
    budget.spend(len(raw))
    return bytearray(raw)


def _complex(budget: Budget, real: float, imaginary: float = 0.0) -> complex:
    return complex(float(real), float(imaginary))


SCALARS = (str, bytes, int, float, bool, complex, type(None), Global, Inert, torch.dtype)


def require_keys(keys: Any) -> None:
    """Refused for keys whose hash is not ours or could go deep."""
    for key in keys:
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, SCALARS) for part in parts):
            raise Refused(f"damaged: a {type(key).__name__} stands as a key in it; copy or download it again")


# -------------------------------------------------------------------------------------------------------------------- numpy


class NumpyType:
    """numpy.dtype while it is put together: a code such as f8, then the order of its bytes."""

    def __init__(self, code: str):
        if not re.fullmatch(r"[<>=|]?[biufc]\d{1,2}", code):
            raise ValueError(f"dtype {code!r} is not read, numbers alone are")
        self.code, self.order = code.lstrip("<>=|"), code[0] if code[0] in "<>=|" else "="

    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


def _raw(value: Any) -> bytes | bytearray:
    if isinstance(value, str):
        return value.encode("latin-1")  # as Python 2 wrote it
    if not isinstance(value, (bytes, bytearray)):
        raise TypeError("numbers without their bytes")
    return value


def _numpy_type(budget: Budget, code: str, *rest: Any) -> NumpyType:
    return NumpyType(code)


def _numpy_scalar(budget: Budget, kind: NumpyType, raw: Any) -> np.generic:
    return np.frombuffer(_raw(raw), kind.dtype(), count=1)[0]


def _numpy_empty(budget: Budget, *rest: Any) -> np.ndarray:
    return np.empty(0, np.uint8)  # filled by its state


def _numpy_array(budget: Budget, raw: Any, kind: NumpyType, shape: Any, order: str) -> np.ndarray:
    array = np.empty(0, np.uint8)
    fill_array(array, (1, shape, kind, order == "F", _raw(raw)), budget)
    return array


def fill_array(array: np.ndarray, state: Any, budget: Budget) -> None:
    """The state of a pickled array into an empty one."""
    try:
        _, shape, kind, columns, raw = state
        shape, raw, dtype = _naturals(shape), bytes(_raw(raw)), kind.dtype()
        if math.prod(shape) * dtype.itemsize != len(raw):
            raise ValueError("an array whose bytes are not as many as its shape says")
        budget.spend(len(raw))
        array.__setstate__((1, shape, dtype, bool(columns), raw))
    except (TypeError, ValueError, AttributeError) as error:
        raise Refused(f"damaged: a numpy array in it makes no sense ({error}); copy or download it again") from error


_NUMPY = ("numpy.core", "numpy._core")
ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _dict,
    ("collections", "Counter"): _dict,
    ("collections", "defaultdict"): _defaultdict,
    ("_codecs", "encode"): _bytes,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "complex"): _complex,
    ("builtins", "dict"): _dict,
    **{("builtins", kind.__name__): _copied(kind) for kind in (list, tuple, set, frozenset)},
    ("numpy", "dtype"): _numpy_type,
    **{(f"{top}.multiarray", "scalar"): _numpy_scalar for top in _NUMPY},
    **{(f"{top}.multiarray", "_reconstruct"): _numpy_empty for top in _NUMPY},
    **{(f"{top}.numeric", "_frombuffer"): _numpy_array for top in _NUMPY},
}
