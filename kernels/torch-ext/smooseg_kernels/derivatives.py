"""Derivatives that an implementation does not have are refused: left to PyTorch, some would come out as zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_second(function: str, impl: str) -> None:
    """For a backward pass whose own operations leave no graph.

    once_differentiable would not do: a constant upstream gradient passes it, and torch.autograd.grad never gets to its error.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f'{function}: impl="{impl}" has no gradient of its gradient; use impl="dense" where create_graph=True is needed'
        )


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Registered operators would drop the tangents without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError('impl="triton" has no forward-mode derivatives (jvp, jacfwd, hessian): use impl="dense"')
