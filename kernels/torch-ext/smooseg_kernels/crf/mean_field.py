"""The front door of the dense CRF, and its mean-field iterations over any filters."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .. import checks
from ..operators import operator
from ..precision import outside_autocast
from ..rows import accumulation_dtype
from . import dense, native
from .filters import SMALLEST_PROBABILITY, Filter, GridGaussian, Normalised, bilateral_points, positions
from .gaussian import IMPLS, AllPairs, triton_serves
from .lattice import Permutohedral

# the settings of the Gaussian of distance, and of that of distance and colour
Kernels = tuple[tuple[float, ...], tuple[float, ...]]
METHODS = {"lattice": ("auto", "torch", "cpp"), "exact": IMPLS}
# all pairs of one picture on a GPU: about where an H200 takes as long for the lattice, by the times in LOG.md
LARGEST_EXACT_PIXELS = 1 << 16
SLOW_BELOW = 16  # columns of a softmax over rows on a CPU


@outside_autocast
def dense_crf(
    probabilities: Tensor,
    image: Tensor,
    *,
    iterations: int = 10,
    gaussian: tuple[float, float] = (1, 3),
    bilateral: tuple[float, float, float] = (67, 3, 4),
    method: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """Refines class probabilities by the picture: mean-field inference of a fully connected CRF.

    Every pixel is joined to every other one, by a Gaussian of their distance and by a Gaussian of distance and colour.
    With the unary u = -log p and Potts compatibility, an iteration is Q <- softmax(-u + sum_m w_m n_i sum_j k_ij n_j
    Q_j) over all pixels j with i itself included, k_ij = exp(-|d_ij|^2 / 2) and n_i = (sum_j k_ij)^(-1/2), the
    symmetric normalisation. It starts from Q = softmax(-u). Kraehenbuehl and Koltun, NIPS 2011, arXiv 1210.5644. No
    gradient.

    Args:
        probabilities: [K,H,W] or [B,K,H,W], 0 to 1, a distribution over K at every pixel. p below 1e-5 counts as 1e-5.
        image: uint8 [H,W,3], or [B,H,W,3] with a batch, on the same device.
        iterations: 0 or more. With 0 the result is the probabilities, with their floor, scaled to add up to 1.
        gaussian: (sigma in pixels, weight) of the kernel of distance alone; sigma above 0, weight 0 or more.
        bilateral: (sigma in pixels, sigma of a colour channel in steps of 0..255, weight) of the kernel of distance and
            colour.
        method: "exact" sums over all pairs of pixels, O(H^2 W^2 K) time and O(H W K) memory. "lattice" approximates the
            kernels by permutohedral lattices (Adams et al. 2010), O(H W K) time, and gives the labels of pydensecrf2,
            which does the same. "auto" picks "exact" on a GPU with Triton for pictures to 2^16 pixels (256 x
            256), about where both take as long, and "lattice" everywhere else.
        impl: for "exact": "auto", "triton", "torch" (tiles of bounded size) or "dense" (the float64 oracle, to 4096
            pixels). For "lattice": "auto", "cpp" or "torch".

    Returns:
        Q, with the shape and dtype of `probabilities`. Computed in fp32, or fp64 for fp64 probabilities.

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
        RuntimeError: impl="triton" or "cpp" cannot run here.
    """
    batched = isinstance(probabilities, Tensor) and probabilities.dim() == 4
    checks.float_tensor(
        "probabilities", probabilities, ("B", "K", "H", "W") if batched else ("K", "H", "W"), constant=True
    )
    if not batched:
        probabilities = probabilities[None]
    check_image(image, probabilities, batched)
    check_probabilities(probabilities)
    iterations = checks.count("iterations", iterations)
    kernels = (
        settings("gaussian", gaussian, ("sigma", "weight")),
        settings("bilateral", bilateral, ("sigma", "sigma of colour", "weight")),
    )
    method = resolve_method(method, impl, probabilities)
    pictures = image if batched else image[None]
    refined = refine_batch(probabilities, pictures, *constants(kernels), iterations, method, impl)
    return refined if batched else refined[0]


def constants(kernels: Kernels) -> tuple[list[float] | None, Tensor | None]:
    """Turns the settings into arguments of the operator: numbers, or a tensor on the CPU if a compiler has symbols."""
    numbers = [number for kernel in kernels for number in kernel]
    cpu = torch.device("cpu")
    given = [checks.varying(number, torch.float64, cpu) for number in numbers]
    if any(isinstance(number, Tensor) for number in given):
        return None, torch.stack([checks.filled(number, torch.float64, cpu) for number in numbers])
    return numbers, None


# on a GPU it reads lattices and tiles back to the host, which no CUDA graph can hold
@operator("dense_crf", torch.Tag.cudagraph_unsafe)
def refine_batch(
    probabilities: Tensor,
    images: Tensor,
    numbers: Sequence[float] | None,
    numbers_tensor: Tensor | None,
    iterations: int,
    method: str,
    impl: str,
) -> Tensor:
    """Refines pictures one by one, [B,K,H,W] by [B,H,W,3]: one operator, whose filters depend on what they hold."""
    given = numbers if numbers_tensor is None else numbers_tensor.tolist()
    assert given is not None
    kernels = (tuple(given[:2]), tuple(given[2:]))
    refined = [refine(p, rgb, iterations, kernels, (method, impl)) for p, rgb in zip(probabilities, images)]
    return torch.stack(refined) if len(refined) > 1 else refined[0][None]


@refine_batch.register_fake
def _(probabilities, images, numbers, numbers_tensor, iterations, method, impl):
    return torch.empty_like(probabilities, memory_format=torch.contiguous_format)


def refine(
    probabilities: Tensor,
    image: Tensor,
    iterations: int,
    kernels: Kernels,
    way: tuple[str, str],
) -> Tensor:
    """Refines one picture, [K,H,W] by [H,W,3]. `way` is the method and the impl."""
    K, H, W = probabilities.shape
    dtype = torch.float64 if way[1] == "dense" else accumulation_dtype(probabilities)
    if way[0] == "lattice" and native.serves(way[1], probabilities.device, dtype):
        return native.mean_field(probabilities.to(dtype), image, *kernels, iterations).to(probabilities.dtype)
    p = probabilities.permute(1, 2, 0).reshape(H * W, K).to(dtype)
    filters: list[tuple[Filter, float]] = []
    (sigma, spatial_weight), (reach, sigma_color, color_weight) = kernels
    if way[1] == "dense":
        dense.require_small(H * W)
    scores = p.clamp(min=SMALLEST_PROBABILITY).log()
    if iterations and spatial_weight:
        filters.append((spatial_filter(image, sigma, scores, *way), spatial_weight))
    if iterations and color_weight:
        filters.append((bilateral_filter(image, reach, sigma_color, scores, *way), color_weight))
    q = mean_field(scores, filters, iterations)
    return q.view(H, W, K).permute(2, 0, 1).to(probabilities.dtype).contiguous()


def spatial_filter(image: Tensor, sigma: float, scores: Tensor, method: str, impl: str) -> Filter:
    """Builds the normalised filter of the pixels' places, for values like the scores [N,K]."""
    H, W, _ = image.shape
    if method == "lattice":
        return Permutohedral.normalised(positions(H, W, sigma, image.device), scores.dtype)
    if impl == "dense":
        return Normalised(dense.MatrixFilter(positions(H, W, sigma, image.device)), scores)
    return Normalised(GridGaussian(H, W, sigma), scores)


def bilateral_filter(image: Tensor, sigma: float, sigma_color: float, scores: Tensor, method: str, impl: str) -> Filter:
    """Builds the normalised filter of the pixels' places and colours, for values like the scores [N,K]."""
    if method == "lattice":  # fp64 on every device: which lattice points exist must not depend on rounding
        return Permutohedral.normalised(bilateral_points(image, sigma, sigma_color, torch.float64), scores.dtype)
    points = bilateral_points(image, sigma, sigma_color, scores.dtype)
    return Normalised(dense.MatrixFilter(points) if impl == "dense" else AllPairs(points, impl), scores)


def mean_field(scores: Tensor, filters: Sequence[tuple[Filter, float]], iterations: int) -> Tensor:
    """Returns Q [N,K] from scores -u [N,K] and pairs of a normalised filter and its weight."""
    q = softmax_rows(scores.clone())
    for _ in range(iterations):
        total = scores.clone()
        for filter, weight in filters:
            total.add_(filter(q), alpha=weight)
        q = softmax_rows(total)
    return q


def softmax_rows(x: Tensor) -> Tensor:
    """The softmax of rows [N,K], in place where K is small: PyTorch's own takes rows that fill no vector one by one."""
    K = x.shape[1]
    if x.device.type != "cpu" or K >= SLOW_BELOW:
        return torch.softmax(x, 1)
    x.sub_(x.amax(1, keepdim=True)).exp_()
    return x.div_(x @ x.new_ones(K, 1))


def resolve_method(method: str, impl: str, probabilities: Tensor) -> str:
    """Tells which method serves, and checks that `impl` is one of its own."""
    if method not in ("auto", *METHODS):
        raise ValueError(f'method must be "auto", "lattice" or "exact", got {method!r}')
    if method == "auto" and impl in ("triton", "dense"):
        method = "exact"
    elif method == "auto" and impl == "cpp":
        method = "lattice"
    elif method == "auto":
        small = probabilities.shape[-2] * probabilities.shape[-1] <= LARGEST_EXACT_PIXELS
        method = "exact" if small and triton_serves(probabilities) else "lattice"
    if impl not in METHODS[method]:
        names = ", ".join(f'"{name}"' for name in METHODS[method])
        raise ValueError(f'impl must be one of {names} with method="{method}", got {impl!r}')
    return method


def check_image(image: Tensor, probabilities: Tensor, batched: bool) -> None:
    """Checks a picture uint8 [H,W,3], or [B,H,W,3], for probabilities [B,K,H,W]."""
    B, _, H, W = probabilities.shape
    shape = (B, H, W, 3) if batched else (H, W, 3)
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        got = getattr(image, "dtype", type(image).__name__)
        raise TypeError(f"image must be a uint8 tensor {list(shape)}, got {got}")
    if tuple(image.shape) != shape:
        raise ValueError(f"image must have shape {list(shape)}, as the probabilities say, got {list(image.shape)}")
    if image.device != probabilities.device:
        raise ValueError(f"image is on {image.device}, but the probabilities are on {probabilities.device}: move it")


def check_probabilities(probabilities: Tensor) -> None:
    """Checks the values where they may be read."""
    if checks.is_inspectable(probabilities):
        low, high = (float(value) for value in probabilities.aminmax())
        if not (low >= 0 and high <= 1.001):  # NaN fails too; rounding may pass 1
            raise ValueError(f"probabilities must be 0 to 1, got {low:.6g} to {high:.6g}: pass them through a softmax")


def settings(name: str, values: Sequence[float], parts: tuple[str, ...]) -> tuple[float, ...]:
    """Checks the sigmas and the weight of a kernel."""
    expected = f"{len(parts)} numbers ({', '.join(parts)})"
    if isinstance(values, (str, Tensor)) or not isinstance(values, Sequence) or len(values) != len(parts):
        raise TypeError(f"{name} must be {expected}, got {values!r}")
    if any(isinstance(value, bool) or not isinstance(value, Real) for value in values):
        raise TypeError(f"{name} must be {expected}, got {values!r}")
    numbers = tuple(checks.number(f"{name}, its {part},", value) for part, value in zip(parts, values))
    if min(numbers[:-1]) <= 0 or numbers[-1] < 0:
        raise ValueError(f"{name} must have sigmas above 0 and a weight of 0 or more, got {tuple(values)}")
    return numbers
