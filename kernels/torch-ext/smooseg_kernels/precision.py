"""Public functions inside a torch.autocast region compute as they do outside of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable)


def outside_autocast(function: Function) -> Function:
    """Autocast would round the sums to 16 bits, and energies are what is left of terms that nearly cancel. Inputs may be 16 bits wide."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        kind = None if first is None else first.device.type
        if kind is None or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run
