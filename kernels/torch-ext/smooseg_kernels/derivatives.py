"""Refuses derivatives that an implementation does not have. PyTorch would return zeros for some of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_second(function: str, impl: str) -> None:
    """Raises in a backward pass whose own operations leave no graph, where a graph is asked for.

    once_differentiable does not suffice: a constant upstream gradient passes it, and torch.autograd.grad never reaches
    its error.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f'{function}: impl="{impl}" has no gradient of its gradient; use impl="dense" with create_graph=True'
        )


def refuse_forward_mode(impl: str, *tensors: Tensor) -> None:
    """Raises for forward-mode tangents, which registered operators would drop silently."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f'impl="{impl}" has no forward-mode derivatives (jvp, jacfwd, hessian): use impl="dense"')


def refuse_transforms(impl: str, *tensors: Tensor) -> None:
    """Raises for tensors inside a transform of torch.func, which registered operators do not take."""
    if torch.compiler.is_compiling():
        return
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        raise RuntimeError(f'impl="{impl}" cannot run inside torch.func (vmap, grad, jvp): use impl="dense" there')
