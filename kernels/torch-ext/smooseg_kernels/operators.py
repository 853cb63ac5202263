"""The namespace of registered operators, and their registration on every device."""

from __future__ import annotations

from collections.abc import Callable

from torch.library import custom_op

try:  # a kernel project built for the Hugging Face hub generates this file
    from ._ops import add_op_namespace_prefix
except ImportError:

    def add_op_namespace_prefix(name: str) -> str:
        return f"smooseg::{name}"


def operator(name: str) -> Callable:
    """Registers a function of plain PyTorch as one operator, which compilers and export take as a whole."""
    return custom_op(add_op_namespace_prefix(name), mutates_args=())
