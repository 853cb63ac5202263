"""Public functions compute the same inside a torch.autocast region as outside of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable)
# asked once: torch.compile of PyTorch 2.11 cannot trace the question
KINDS = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def outside_autocast(function: Function) -> Function:
    """Turns autocast off inside a function, whichever way its tensors are passed. Inputs may have 16 bits.

    Autocast would round the sums to 16 bits, and the terms of an energy nearly cancel.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        kind = None if first is None else first.device.type
        if kind not in KINDS or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return cast(Function, run)
