"""Checks of the public functions' arguments. Each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def is_inspectable(tensor: Tensor) -> bool:
    """Tells whether values may be read: on a CPU, or anywhere with SMOOSEG_CHECK_INDICES=1, which makes a GPU sync."""
    real = (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and tensor.device.type != "meta"
    )
    real = real and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return real and (tensor.device.type == "cpu" or os.environ.get("SMOOSEG_CHECK_INDICES") == "1")


def float_tensor(
    name: str, tensor: Tensor, shape: tuple[int | str, ...], like: Tensor | None = None, constant: bool = False
) -> None:
    """Checks a tensor of floats. `shape` holds sizes, or letters for free sizes of at least 1."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {describe(shape)}, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be fp32, fp16, bf16 or fp64, got {tensor.dtype}")
    fits = tensor.dim() == len(shape) and all(
        size >= 1 if isinstance(want, str) else size == want for size, want in zip(tensor.shape, shape)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {describe(shape)}, got {list(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but the other inputs are on {like.device}: move it there")
    if constant and tensor.requires_grad:
        raise ValueError(f"{name} is a constant of this function and gets no gradient: pass {name}.detach()")


def describe(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def number(name: str, value: float, expected: str = "a number") -> float:
    """Checks a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    # traced with dynamic shapes a number is a symbol, which math.isfinite does not take
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def threshold(name: str, value: float | Tensor) -> float | Tensor:
    """Checks a finite number or a tensor of floats."""
    if not isinstance(value, Tensor):
        return number(name, value, "a number or a tensor")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be a number or a tensor of floats, got {value.dtype}")
    return value


def temperature(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """Checks a temperature. Returns a number, or a tensor [] as in `varying`."""
    if isinstance(value, Tensor):
        return constant("temperature", value, dtype, device)
    value = number("temperature", value, "a number above 0 or a tensor, a constant of this function")
    if value <= 0:
        raise ValueError(f"temperature must be a finite number above 0, got {value}")
    return varying(value, dtype, device)


def varying(value: float, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """Makes a tensor [] of a number that a compiler takes for a symbol, after it met several of them.

    Operators and kernels would take the number as a constant, and be compiled again for the next one.
    """
    if not torch.compiler.is_compiling():
        return value
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return value if has_static_value(value) else filled(value, dtype, device)


def constant(name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor [] on the device. Numbers are filled in there: a copy from the host would wait for it.

    A tensor is read only when it is used, so a captured graph can be given another value.
    """
    value = threshold(name, value)
    if not isinstance(value, Tensor):
        return filled(value, dtype, device)
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a tensor of shape [], got shape {list(value.shape)}")
    if value.requires_grad:
        raise ValueError(f"{name} is a constant of this function and gets no gradient: pass {name}.detach()")
    return value.to(device=device, dtype=dtype)


def pair_sets(
    partners: Tensor | Sequence, B: int, device: torch.device, clamp: bool = True
) -> tuple[str | Tensor, ...]:
    """Returns "self", "all" or int64 [B] for each pair set. Values that may not be read are clamped with `clamp`."""
    if isinstance(partners, str) or not isinstance(partners, (Tensor, Sequence)):
        raise TypeError(f"partners must be an int64 tensor [T, B] or a sequence of T entries, got {partners!r}")
    if isinstance(partners, Tensor) and partners.dim() != 2:
        raise ValueError(f"partners must have shape [T, {B}], got {list(partners.shape)}")
    entries = tuple(partners.unbind(0)) if isinstance(partners, Tensor) else tuple(partners)
    if not entries:
        raise ValueError("partners is empty: name at least one pair set")
    return tuple(partner_entry(f"partners[{t}]", entry, B, device, clamp) for t, entry in enumerate(entries))


def partner_entry(name: str, entry: str | Tensor, B: int, device: torch.device, clamp: bool) -> str | Tensor:
    """Checks one entry of `partners`."""
    if isinstance(entry, str):
        if entry not in ("self", "all"):
            raise ValueError(f'{name} must be "self", "all" or an int64 tensor [{B}], got {entry!r}')
        if entry == "all" and B < 2:
            raise ValueError(
                f'{name} is "all", the pairs of different images, which needs a batch of at least 2 images, got {B}'
            )
        return entry
    if not isinstance(entry, Tensor):
        raise TypeError(f'{name} must be "self", "all" or an int64 tensor [{B}], got {type(entry).__name__}')
    return index_vector(name, entry, B, B, device, clamp)


def index_vector(name: str, numbers: Tensor, B: int, N: int, device: torch.device, clamp: bool) -> Tensor:
    """Checks int64 [B] image numbers, 0 to N - 1. Values that may not be read are clamped with `clamp`."""
    if not isinstance(numbers, Tensor):
        raise TypeError(f"{name} must be an int64 tensor [{B}], got {type(numbers).__name__}")
    if numbers.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {numbers.dtype}")
    if tuple(numbers.shape) != (B,):
        raise ValueError(f"{name} must have shape [{B}], got {list(numbers.shape)}")
    if numbers.device != device:
        raise ValueError(f"{name} is on {numbers.device}, but the other inputs are on {device}: move it there")
    if is_inspectable(numbers):
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= N:
            raise ValueError(f"{name} must hold image numbers 0 to {N - 1}, got {low} to {high}")
        return numbers
    return numbers.clamp(0, N - 1) if clamp else numbers


def threshold_table(
    values: Tensor | Sequence[float] | float, T: int, H: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Returns thresholds [H,T] in `dtype`, with H = 1 where there are no heads."""
    if isinstance(values, Tensor):
        if values.requires_grad:
            raise ValueError("thresholds is a constant of this function and gets no gradient: pass thresholds.detach()")
        table = values.to(device=device, dtype=dtype)
    else:
        if isinstance(values, Sequence) and any(isinstance(value, Tensor) and value.requires_grad for value in values):
            raise ValueError("thresholds is a constant of this function and gets no gradient: detach its elements")
        try:
            table = numbers("thresholds", values, dtype, device)
        except (TypeError, ValueError):
            raise TypeError(f"thresholds must be numbers, {describe_thresholds(T, H)}, got {values!r}") from None
    if tuple(table.shape) == (T,):
        return table[None].expand(H or 1, T)
    if H is not None and tuple(table.shape) == (H, T):
        return table
    raise ValueError(
        f"thresholds must have shape {describe_thresholds(T, H)}, one for each pair set, got {list(table.shape)}"
    )


def numbers(name: str, values: Tensor | Sequence[float] | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Makes a tensor of numbers, which may differ from call to call of compiled code."""
    if (
        torch.compiler.is_compiling()
        and isinstance(values, Sequence)
        and values
        and all(isinstance(value, Real) for value in values)
    ):
        return torch.stack([filled(number(name, value), dtype, device) for value in values])
    return torch.as_tensor(values, dtype=dtype, device=device)


def describe_thresholds(T: int, H: int | None) -> str:
    return f"[{T}]" if H is None else f"[{T}] or [{H}, {T}]"


def filled(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor [] made on the device, which compilers take for any value: a sum is, torch.full is not."""
    return torch.zeros((), dtype=dtype, device=device) + value


def pair_thresholds(
    name: str, value: float | Tensor, sets: int | None, B: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Returns a tensor [] or [B] for each pair set; `sets` is None for one.

    A tensor is read only when it is used, so a captured graph can be given another value.
    """
    if not isinstance(value, Tensor):
        expected = "a number or a tensor"
        return [filled(number(name, value, expected), dtype, device)] * (sets or 1)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be a number or a tensor of floats, got {value.dtype}")
    value = value.to(device=device, dtype=dtype)
    if value.dim() == 0 or (value.dim() == 1 and value.shape[0] == B):
        return [value] * (sets or 1)
    if sets and value.dim() == 2 and value.shape[0] == sets and value.shape[1] in (1, B):
        return [row.squeeze(0) if value.shape[1] == 1 else row for row in value.unbind()]
    shape, several = list(value.shape), f", [{sets}, 1] or [{sets}, {B}]" if sets else ""
    raise ValueError(f"{name} must be a number or a tensor of shape [], [{B}]{several}, got shape {shape}")


def given_mean(
    name: str, value: float | Tensor | None, sets: int | None, dtype: torch.dtype, device: torch.device
) -> list[Tensor | None]:
    """Returns a tensor [] or None for each pair set. The mean of several sets may be one number or [sets]."""
    if value is None:
        return [None] * (sets or 1)
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} is a constant of this function and gets no gradient: pass {name}.detach()")
    if not isinstance(value, Tensor):
        return [filled(number(name, value, "a number or a tensor"), dtype, device)] * (sets or 1)
    shape = tuple(value.shape)
    if shape not in ((), (sets,)):
        several = f" or [{sets}]" if sets else ""
        raise ValueError(f"{name} must be a number or a tensor of shape []{several}, got shape {list(shape)}")
    value = value.to(device=device, dtype=dtype)
    return list(value.unbind()) if shape else [value] * (sets or 1)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def bounds(name: str, pair: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Checks (low, high), each a number or None for no bound."""
    if isinstance(pair, (str, Tensor)) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (low, high), each a number or None, got {pair!r}")
    if any(isinstance(side, bool) or not isinstance(side, (int, float, type(None))) for side in pair):
        raise TypeError(f"{name} must be a pair (low, high), each a number or None, got {tuple(pair)}")
    low, high = (None if side is None else float(side) for side in pair)
    if any(side is not None and side != side for side in (low, high)):  # traced floats are symbols
        raise ValueError(f"{name} must not hold NaN, got {(low, high)}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"{name} must be (low, high) with low <= high, got {(low, high)}")
    return low, high


def optional_constant(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Checks a constant that may be left out, and converts it to `dtype`."""
    if tensor is None:
        return None
    float_tensor(name, tensor, shape, like, constant=True)
    return tensor.to(dtype)


def weights(
    tensor: Tensor | None, shape: tuple[int, int], like: Tensor, dtype: torch.dtype, name: str = "patch_weight"
) -> Tensor | None:
    """Checks weights of patches."""
    tensor = optional_constant(name, tensor, shape, like, dtype)
    if tensor is not None and is_inspectable(tensor) and not bool(((tensor >= 0) & (tensor < math.inf)).all()):
        low, high = tensor.aminmax()
        raise ValueError(f"{name} must be 0 or more everywhere and finite, got {float(low)} to {float(high)}")
    return tensor


def truth(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Checks ground truth: integers of the given shape, on the device of `like`."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in INTEGERS:
        got = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name} must be an integer tensor {list(shape)}, got {got}")
    if tuple(tensor.shape) != shape or tensor.device != like.device:
        raise ValueError(
            f"{name} must have shape {list(shape)} on {like.device}, got {list(tensor.shape)} on {tensor.device}"
        )


def histogram_limits(limits: tuple[float, float]) -> tuple[float, float]:
    """Checks the lower and upper limit of a histogram."""
    try:
        low, high = (float(limit) for limit in limits)
    except (TypeError, ValueError):
        raise TypeError(f"limits must be two numbers, lower and upper, got {limits!r}") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"limits must be two finite numbers, the lower first, got {(low, high)}")
    return low, high


def count(name: str, value: int) -> int:
    """Checks an integer that is 0 or more."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")
    return int(value)


def size_pair(name: str, pair: Sequence[int] | None) -> tuple[int, int] | None:
    """Checks (rows, columns), or None."""
    if pair is None:
        return None
    if (
        not isinstance(pair, Sequence)
        or len(pair) != 2
        or any(not isinstance(side, (Integral, torch.SymInt)) or side < 1 for side in pair)
    ):
        raise ValueError(f"{name} must be two positive integers (rows, columns), got {pair!r}")
    if torch.compiler.is_compiling():  # a size that may change stays a symbol
        return pair[0], pair[1]
    return int(pair[0]), int(pair[1])
