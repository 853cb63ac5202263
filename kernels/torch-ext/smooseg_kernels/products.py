"""Matrix products, on a CPU by oneDNN where PyTorch's own library leaves vector units idle.

PyTorch multiplies fp32 matrices by MKL, which keeps processors of other makers than Intel to AVX2. oneDNN, which
PyTorch has too, and whose operator compiled PyTorch programs call, takes AVX-512 on all: twice as fast there.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

# multiplications in one image from which oneDNN gains more than its call costs; several threads also wait for each
# other in every call, where PyTorch's library shares out the images
LEAST_PRODUCTS, LEAST_SHARED_PRODUCTS = 1 << 20, 1 << 24
LEAST_SHARED_PRODUCT = 1 << 26  # in one matrix that several threads share: a loss at 51 million, a gain at 128


@functools.cache
def library_idles() -> bool:
    """Tells whether PyTorch's library leaves vector units of this processor idle."""
    maker = platform.processor()  # empty on Linux, or the architecture
    with contextlib.suppress(OSError):
        maker += Path("/proc/cpuinfo").read_text()
    has_library = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return has_library and "AuthenticAMD" in maker and torch.backends.cpu.get_cpu_capability() == "AVX512"


def onednn_multiplies(a: Tensor, b: Tensor, least_shared: int) -> bool:
    """Tells whether oneDNN multiplies matrices [R,K] and [K,C] of these tensors faster."""
    least = LEAST_PRODUCTS if torch.get_num_threads() == 1 else least_shared
    if a.device.type != "cpu" or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    large = a.shape[-2] * a.shape[-1] * b.shape[-1] >= least
    return large and library_idles() and bool(torch.backends.mkldnn.enabled)


def onednn_serves(a: Tensor, b: Tensor) -> bool:
    """Tells whether oneDNN multiplies these rows [n,R,K] and [N,C,K] faster."""
    return onednn_multiplies(a, b.mT, LEAST_SHARED_PRODUCTS)


def product(a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Writes a [R,K] @ b [K,C], plus bias [C], to `out`."""
    if onednn_multiplies(a, b, LEAST_SHARED_PRODUCT):
        rows = one_product(a, b.mT)
        return out.copy_(rows) if bias is None else torch.add(rows, bias, out=out)
    torch.mm(a, b, out=out)
    return out if bias is None else out.add_(bias)  # by addmm, `out` would be written first and read again


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Adds a [R,K] @ b [K,C] to `total`, rounded to its dtype alone where the operands have it too."""
    if total.dtype != a.dtype:
        return total.add_(a @ b)
    return total.add_(one_product(a, b.mT)) if onednn_multiplies(a, b, LEAST_SHARED_PRODUCT) else total.addmm_(a, b)


def products(a: Tensor, b: Tensor, met: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Takes rows a [n,R,K] and b [N,C,K] to the inner products [n,R,C] of image k of a with image met[k] of b.

    `met` is int64 [n]; without it image k meets image k. `out` takes the result.
    """
    if not onednn_serves(a, b):
        return torch.bmm(a, (b if met is None else b[met]).mT, out=out)
    if out is not None:
        return out.copy_(products(a, b, met))
    images = range(len(a)) if met is None else met.tolist()
    by_image = [one_product(rows, b[image]) for rows, image in zip(a.unbind(), images)]
    return by_image[0][None] if len(by_image) == 1 else torch.stack(by_image)


def one_product(a: Tensor, b: Tensor) -> Tensor:
    """Takes a [R,K] and b [C,K] to [R,C]."""
    if not (b.is_contiguous() or b.mT.is_contiguous()):  # oneDNN's form for other strides is a thousand times slower
        b = b.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")
