"""Products of rows image by image, on a CPU by oneDNN where PyTorch's own library leaves vector units idle.

PyTorch multiplies fp32 matrices by MKL, which keeps processors of other makers than Intel to AVX2. oneDNN, which
PyTorch has too, and whose operator compiled PyTorch programs call, takes AVX-512 on all: twice as fast there.
"""

from __future__ import annotations

import torch
from torch import Tensor

# multiplications in one image from which oneDNN gains more than its call costs; several threads also wait for each
# other in every call, where PyTorch's library shares out the images
LEAST_PRODUCTS, LEAST_SHARED_PRODUCTS = 1 << 20, 1 << 24


def onednn_serves(a: Tensor, b: Tensor) -> bool:
    """Tells whether oneDNN multiplies these rows [n,R,K] and [N,C,K] faster."""
    least = LEAST_PRODUCTS if torch.get_num_threads() == 1 else LEAST_SHARED_PRODUCTS
    large = a.shape[1] * a.shape[2] * b.shape[1] >= least
    if not large or a.device.type != "cpu" or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    has_library = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return has_library and torch.backends.cpu.get_cpu_capability() == "AVX512"


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
