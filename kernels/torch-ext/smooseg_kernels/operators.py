"""The namespace of registered operators, and their registration on every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import custom_op

try:  # a kernel project built for the Hugging Face hub generates this file
    from ._ops import add_op_namespace_prefix
except ImportError:

    def add_op_namespace_prefix(name: str) -> str:
        return f"smooseg::{name}"


def operator(name: str, *tags: torch.Tag) -> Callable:
    """Registers a function of plain PyTorch as one operator, which compilers and export take as a whole."""
    return custom_op(add_op_namespace_prefix(name), mutates_args=(), tags=tags)


def as_arguments(value: float | Tensor) -> tuple[float | None, Tensor | None]:
    """Turns a number or a tensor [] into two arguments of an operator, one of which is None."""
    return (None, value) if isinstance(value, Tensor) else (value, None)


def either(value: float | None, tensor: Tensor | None) -> float | Tensor:
    """Undoes `as_arguments`."""
    if tensor is not None:
        return tensor
    assert value is not None
    return value
