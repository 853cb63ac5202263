"""Refuses derivatives that an implementation does not have. PyTorch would return zeros for some of them."""

from __future__ import annotations

from dataclasses import is_dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef


def refuse_second(function: str, impl: str) -> None:
    """Raises in a backward pass whose own operations leave no graph, where a graph is asked for.

    once_differentiable does not suffice: a constant upstream gradient passes it, and torch.autograd.grad never reaches
    its error.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f'{function}: impl="{impl}" has no gradient of its gradient; use impl="dense" with create_graph=True'
        )


def refuse_second_of(op: CustomOpDef, function: str) -> None:
    """Makes a registered operator that gives gradients, and has none, say so in a second backward pass."""

    def backward(ctx, *_):
        raise RuntimeError(f'{function}: impl="triton" has no gradient of its gradient; use impl="dense"')

    op.register_autograd(backward)


def refuse_func(function: str, *tensors: Tensor) -> None:
    """Raises inside a transform of torch.func for what has no other form there."""
    if torch.compiler.is_compiling():
        return
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        raise RuntimeError(f"{function} cannot run inside torch.func (vmap, grad, jvp): call it outside")


def refuse_func_gradients(function: str, *tensors: Tensor) -> None:
    """Raises for what drops the gradients of operators without another form: forward mode, and torch.func but vmap."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            dual = dual or torch._C._functorch.is_gradtrackingtensor(tensor)
            tensor = torch._C._functorch.get_unwrapped(tensor)
        if dual:
            raise RuntimeError(
                f"{function} has no forward-mode derivatives and runs in no torch.func but vmap: "
                "use torch.autograd.grad or backward()"
            )


def refuse_forward_mode(impl: str, *tensors: Tensor) -> None:
    """Raises for forward-mode tangents, which registered operators would drop silently."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f'impl="{impl}" has no forward-mode derivatives (jvp, jacfwd, hessian): use impl="dense"')


def refuse_tangents(impl: str, *values: object) -> None:
    """Raises for forward-mode tangents of any tensor in `values`, tuples, or dataclasses of them."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for value in values:
        if isinstance(value, Tensor):
            refuse_forward_mode(impl, value)
        elif isinstance(value, tuple):
            refuse_tangents(impl, *value)
        elif is_dataclass(value):
            refuse_tangents(impl, *vars(value).values())


def refuse_transforms(impl: str, *tensors: Tensor) -> None:
    """Raises for tensors inside a transform of torch.func, which registered operators do not take."""
    if torch.compiler.is_compiling():
        return
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        raise RuntimeError(f'impl="{impl}" cannot run inside torch.func (vmap, grad, jvp): use impl="dense" there')
