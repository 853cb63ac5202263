"""Picks the implementation that serves checked tensors."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from . import dense, moments, tiles
from .derivatives import refuse_forward_mode, refuse_transforms

HAS_TRITON = importlib.util.find_spec("triton") is not None  # a constant, which compiled code can guard
IMPLS = {"dense": dense, "torch": moments}
PAIR_IMPLS = {"dense": dense, "torch": tiles}  # for energies that do not factor


def resolve_impl(impl: str, prototypes: tuple[int, int], *tensors: Tensor) -> str:
    """Tells which implementation `impl` stands for.

    Args:
        impl: "auto", "triton", "torch" or "dense".
        prototypes: their shape (K, Z).
        tensors: the other inputs, or tensors of the same dtypes and devices.

    Returns:
        `impl` itself, or for "auto": "triton" where Triton serves all tensors (see `smooseg_loss`), else "torch".

    Raises:
        ValueError: `impl` is not one of the four names.
    """
    if impl not in ("auto", "triton", *IMPLS):
        raise ValueError(f'impl must be "auto", "triton", "torch" or "dense", got {impl!r}')
    if impl == "auto":
        return "triton" if triton_serves(prototypes, tensors) else "torch"
    return impl


def implementation(
    impl: str, prototypes: tuple[int, int], *tensors: Tensor, forms: dict[str, ModuleType] = IMPLS
) -> ModuleType:
    """Picks the module for checked `tensors`. An explicit choice is honoured or raises; it is never swapped."""
    impl = resolve_impl(impl, prototypes, *tensors)
    if impl in forms:
        return forms[impl]
    if not HAS_TRITON:
        raise RuntimeError(
            'impl="triton" needs Triton, which is not installed: pip install triton, or use impl="torch" (or "auto")'
        )
    if any(t.dtype == torch.float64 for t in tensors):
        raise TypeError('impl="triton" takes fp32, fp16 and bf16, got fp64: use impl="torch" or "dense"')
    from . import triton as fused

    if not fused.fits(*prototypes):
        raise ValueError(
            f'impl="triton" cannot keep K = {prototypes[0]} prototypes of Z = {prototypes[1]} channels on chip '
            '(K * Z to about 8000, Z to 256): use impl="torch"'
        )
    if tensors[0].device.type == "cpu":
        fused.require_interpreter()
    refuse_forward_mode(impl, *tensors)
    refuse_transforms(impl, *tensors)
    return fused


def triton_serves(prototypes: tuple[int, int], tensors: tuple[Tensor, ...]) -> bool:
    if not all(t.is_cuda and t.dtype != torch.float64 for t in tensors) or not HAS_TRITON:
        return False
    from . import triton as fused

    return fused.fits(*prototypes)


def fused_projection(features: Tensor, Z: int) -> type[torch.autograd.Function] | None:
    """Returns the projection in fused kernels (`triton.projection.Projection`) where it serves these features."""
    if not HAS_TRITON:
        return None
    from .triton.projection import Projection, serves

    return Projection if serves(features, Z) else None


def clamps_partners(module: ModuleType) -> bool:
    """Tells whether the implementation's kernels clamp partner numbers themselves, which spares a launch."""
    return getattr(module, "CLAMPS_PARTNERS", False)
