"""What comes out of a pickle beside tensors and plain containers, and its translation to plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

NODES, DEPTH, LENGTH = 20_000, 64, 2_000  # of what `plain` makes: a small file can refer to one list very often


class Refused(Exception):
    """Why a file is not read: completes "FILE: ...", and says what to do."""


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class, a function or a constant. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:120]


@dataclass(eq=False, slots=True)
class Inert:
    """An object that was not made: the name of its class, and everything that the file says about it."""

    kind: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)  # of a dict's subclass
    elements: list[Any] = field(default_factory=list)  # of a list's or a set's

    def __repr__(self) -> str:
        return f"<{self.kind}>"


@dataclass(eq=False, slots=True)
class Storage:
    """The numbers that tensors are views of."""

    numbers: Tensor  # 1-D; uint8 where the file does not say what they are


def plain(value: Any) -> Any:
    """`value` as what JSON can hold: omegaconf's trees, namespaces and paths by their content, other objects as "<module.Class>"."""
    left = NODES

    def walk(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > DEPTH:
            return "..."
        if isinstance(value, np.generic):  # before float, of which float64 is a kind
            return value.item()
        if isinstance(value, str):
            return value[:LENGTH]
        if isinstance(value, int) and value.bit_length() > 1000:
            return "..."  # Python writes no such number as text
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, dict):
            return {str(walk(key, DEPTH - 1)): walk(item, depth + 1) for key, item in value.items() if left > 0}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [walk(item, depth + 1) for item in value if left > 0]
        if isinstance(value, (Tensor, np.ndarray)):
            return walk(value.item(), depth + 1) if value.ndim == 0 else f"{value.dtype} {list(value.shape)}"
        if isinstance(value, Inert):
            return walk(content(value), depth + 1)
        return str(value) if isinstance(value, (Global, torch.dtype, torch.device)) else f"<{type(value).__name__}>"

    return walk(value, 0)


def content(value: Inert) -> Any:
    """What an object was there for, one layer down."""
    state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    if isinstance(state, dict):
        for name in ("_content", "_val"):  # omegaconf's containers and leaves
            if name in state:
                return state[name]
    if value.kind.module.split(".")[0] == "pathlib" and all(isinstance(part, str) for part in value.args):
        return "/".join(value.args).replace("//", "/")
    if value.items:
        return dict(value.items)
    if value.elements:
        return value.elements
    if (
        isinstance(state, dict) and state and not any(str(name).startswith("_") for name in state)
    ):  # argparse.Namespace and its like
        return state
    return repr(value)
