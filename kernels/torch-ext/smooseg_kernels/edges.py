"""Labels that follow a picture's edges: the guided filter on probability maps, and joint upsampling of scores.

Both are plain PyTorch, differentiable in the maps, and local: a pixel depends on those within twice the radius, or on
the patches of its window, alone. Windows of a picture that overlap by as much give the values of the whole picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, edge_blocks
from .derivatives import refuse_func_gradients
from .edge_blocks import box
from .precision import outside_autocast
from .rows import accumulation_dtype

SUBSAMPLED = 4  # least radius in subsampled pixels that auto leaves (He and Sun, 2015)
WINDOWS = (3, 5)
NOISE_PIXELS = 1 << 16  # that lose their noise at a time


@outside_autocast
def guided_filter(
    probabilities: Tensor,
    image: Tensor,
    *,
    radius: int,
    eps: float,
    subsample: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Filters maps so that their edges follow the picture's: within a window, a map is linear in the colours.

    The fast guided filter (He, Sun and Tang, PAMI 35:1397, 2013; He and Sun, arXiv 1505.00996, 2015). In the window of
    each pixel, the map is fitted by a^T colour + b with a = (covariance of the colours + eps)^-1 (covariance of colours
    and map); a pixel gets the mean fit of all windows that it lies in. The maps of a pixel keep their sum, so
    probabilities still add up to 1, but single values may leave 0 .. 1 a little.

    Args:
        probabilities: [K,H,W] or [B,K,H,W], any maps. Get gradients.
        image: the guide, uint8 (0 .. 255) or floats (0 .. 1), [H,W,3] colour or [H,W] grey; with [B,K,H,W] also
            [B,H,W,3] or [B,H,W]. A constant.
        radius: of the square windows of 2 radius + 1 pixels, at least 1. At the border, pixels of the picture count.
        eps: variance of the colours (0 .. 1) below which a window is flat and its map becomes the mean, above 0.
        subsample: pixels a side of the cells in which the coefficients are computed, before they are upsampled
            bilinearly; 1 is the exact filter. By default a quarter of the radius, at least 1.
        mask: bool [H,W] or [B,H,W], the pixels that count in windows. The others get what the windows with some of
            those give them, or their own values where there are none.

    Returns:
        Maps of the shape of `probabilities`, fp32 (fp64 for fp64 input). The memory's order is [.., H, W, K].

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
    """
    maps, guide = fronts("probabilities", probabilities, image)
    refuse_func_gradients("guided_filter", maps, guide)
    radius, eps = checks.count("radius", radius), checks.number("eps", eps, "a number above 0")
    step = max(1, radius // SUBSAMPLED) if subsample is None else checks.count("subsample", subsample)
    for name, value in (("radius", radius), ("subsample", step)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if eps <= 0:
        raise ValueError(f"eps must be a finite number above 0, got {eps}")
    shape = tuple(guide.shape[:3])
    if guide.shape[1:3] != maps.shape[2:]:
        raise ValueError(f"image must have the {list(maps.shape[2:])} pixels of probabilities, got {list(shape[1:])}")
    if mask is not None:
        allowed = (shape, shape[1:]) if probabilities.dim() == 4 else (shape[1:],)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if tuple(mask.shape) not in allowed or mask.device != maps.device:
            expected = " or ".join(str(list(size)) for size in allowed)
            got = f"{list(mask.shape)} on {mask.device}"
            raise ValueError(f"mask must have shape {expected} on {maps.device}, got {got}")
        mask = mask.expand(shape)
    filtered = guided(maps.permute(0, 2, 3, 1), guide, mask, radius=radius, eps=eps, step=step).permute(0, 3, 1, 2)
    return filtered if probabilities.dim() == 4 else filtered[0]


@outside_autocast
def joint_upsample(
    scores: Tensor,
    image: Tensor,
    *,
    size: Sequence[int] | None = None,
    window: int = 3,
    sigma_position: float = 0.75,
    sigma_colour: float = 20.0,
) -> Tensor:
    """Upsamples scores of patches to pixels: each takes those of the patches around it that have its colour.

    Joint bilateral upsampling (Kopf et al., SIGGRAPH 2007): the mean over a window of patches about the pixel's own,
    weighted by exp(-d^2 / 2), d^2 = |pixel - centre of the patch|^2 / sigma_position^2 + |colour - mean colour of the
    patch|^2 / sigma_colour^2.

    Args:
        scores: [K,h,w] or [B,K,h,w], of a grid of patches that covers the picture. Get gradients.
        image: uint8 (0 .. 255) or floats (0 .. 1), [H,W,3] colour or [H,W] grey; with [B,K,h,w] also [B,H,W,3] or
            [B,H,W]. At least h x w pixels. A constant.
        size: (height, width) in pixels that the patches cover, from the same corner, where the grid reaches beyond the
            picture; at least (H, W) and less than a patch more. By default (H, W).
        window: 3 or 5 patches a side; those outside of the grid do not count.
        sigma_position: in patches, above 0.
        sigma_colour: in steps of an 8-bit picture, as 0 .. 255, above 0.

    Returns:
        [K,H,W] or [B,K,H,W], fp32 (fp64 for fp64 input). The memory's order is [.., H, W, K].

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
    """
    maps, guide = fronts("scores", scores, image)
    refuse_func_gradients("joint_upsample", maps, guide)
    (h, w), (H, W) = maps.shape[2:], guide.shape[1:3]
    height, width = checks.size_pair("size", size) or (H, W)
    if window not in WINDOWS:
        raise ValueError(f"window must be 3 or 5, got {window!r}")
    for name, value in (("sigma_position", sigma_position), ("sigma_colour", sigma_colour)):
        if checks.number(name, value, "a number above 0") <= 0:
            raise ValueError(f"{name} must be a finite number above 0, got {value}")
    for name, side, pixels, patches in (("height", height, H, h), ("width", width, W, w)):
        if not pixels <= side < pixels + side / patches:
            expected = f"at least the image's {pixels} pixels and less than a patch more"
            raise ValueError(f"size must have a {name} of {expected}, got {side} under {patches} patches")
        if patches > pixels:
            raise ValueError(f"image must have a pixel for each of the {[h, w]} patches, got {[H, W]} pixels")
    cells = (pixel_centres(H, h, height, guide), pixel_centres(W, w, width, guide))
    colours = cell_means(guide, cells, (h, w))
    sigmas = (float(sigma_position), float(sigma_colour) / 255)
    fine = joint(maps.permute(0, 2, 3, 1), guide, colours, cells, window=window, sigmas=sigmas).permute(0, 3, 1, 2)
    return fine if scores.dim() == 4 else fine[0]


def fronts(name: str, maps: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Checks maps [K,h,w] or [B,K,h,w] and a picture -> maps [B,K,h,w] and its colours [B,H,W,C] in 0 .. 1."""
    batched = isinstance(maps, Tensor) and maps.dim() == 4
    checks.float_tensor(name, maps, ("B", "K", "H", "W") if batched else ("K", "H", "W"))
    lead = ("B",) if batched else ()
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a tensor uint8 or of floats [H, W, 3] or [H, W], got {type(image).__name__}")
    if image.dtype != torch.uint8 and image.dtype not in checks.FLOATS:
        raise TypeError(f"image must be uint8 (0 .. 255) or floats (0 .. 1), got {image.dtype}")
    colour = image.dim() == len(lead) + 3 and image.shape[-1] == 3
    fits = (colour or image.dim() == len(lead) + 2) and min(image.shape) >= 1
    if not fits or (batched and image.shape[0] != maps.shape[0]):
        B = [maps.shape[0]] if batched else []
        shapes = " or ".join(checks.describe((*B, "H", "W", *end)) for end in ((3,), ()))
        raise ValueError(f"image must have shape {shapes}, got {list(image.shape)}")
    if image.device != maps.device:
        raise ValueError(f"image is on {image.device}, but the other inputs are on {maps.device}: move it there")
    if image.requires_grad:
        raise ValueError("image is a constant of this function and gets no gradient: pass image.detach()")
    dtype = accumulation_dtype(maps)
    guide = image.to(dtype) / 255 if image.dtype == torch.uint8 else image.to(dtype)
    guide = guide if colour else guide[..., None]
    return (maps if batched else maps[None]).to(dtype), guide if batched else guide[None]


# the guided filter; maps have the order [B,H,W,K], in which all maps of a pixel lie side by side


def guided(maps: Tensor, guide: Tensor, mask: Tensor | None, *, radius: int, eps: float, step: int) -> Tensor:
    """The guided filter of maps [B,H,W,K] by colours [B,H,W,C] -> [B,H,W,K]; mask bool [B,H,W] or None."""
    if mask is None:  # [B,h,w,1], counted pixels of each cell
        rows, columns = ((side - torch.arange(0, side, step)).clamp(max=step).to(guide) for side in guide.shape[1:3])
        weight, counted = (rows[:, None] * columns)[..., None].expand(guide.shape[0], -1, -1, -1), (maps, guide)
    else:
        inside = mask.to(guide.dtype)[..., None]
        weight, counted = pooled(inside, step), (inside * maps, inside * guide)
    p, colours = (pooled(values, step) / weight.clamp(min=1) for values in counted)
    lines, around = fitted(p, colours, weight, radius=max(1, round(radius / step)), eps=eps)
    filtered = applied(lines, guide, step)
    if mask is None:
        return filtered
    outside = (around == 0)[..., 0].repeat_interleave(step, 1).repeat_interleave(step, 2)
    return torch.where(outside[:, : maps.shape[1], : maps.shape[2], None], maps, filtered)


def fitted(p: Tensor, colours: Tensor, weight: Tensor, *, radius: int, eps: float) -> tuple[Tensor, Tensor]:
    """The mean fit of the windows that each cell lies in: slopes and offset [B,h,w,(C+1)*K], and how many of these
    windows have a counted pixel [B,h,w,1].

    p, colours: means over the counted pixels of the cells, [B,h,w,K] and [B,h,w,C]; weight: their number [B,h,w,1].
    """
    C, K = colours.shape[-1], p.shape[-1]
    terms = torch.cat([p, colours, torch.ones_like(weight)], -1)
    sums = box(((weight * terms[..., K:])[..., None] * terms[..., None, :]).flatten(-2), radius)
    sums = sums.unflatten(-1, (C + 1, K + C + 1))
    counted = sums[..., -1:, -1:]
    seen = counted > 0
    means = sums * torch.where(seen, 1 / torch.where(seen, counted, 1), 0)  # of products; the last ones with 1
    covariance = torch.addcmul(means[..., :C, :-1], means[..., :C, -1:], means[..., C:, :-1], value=-1)
    variance = covariance[..., K:] + eps * torch.eye(C, dtype=p.dtype, device=p.device)
    inverted = inverse_symmetric(variance)
    slope = inverted[..., :, :1] * covariance[..., :1, :K]  # batched products of such sizes are slower
    for c in range(1, C):
        slope = torch.addcmul(slope, inverted[..., :, c, None], covariance[..., c, None, :K])
    offset = means[..., C, :K]
    for c in range(C):
        offset = torch.addcmul(offset, slope[..., c, :], means[..., C, K + c, None], value=-1)
    lines = torch.cat([slope.flatten(-2), offset], -1)
    # a pixel has the mean of the windows that it lies in; those without a counted pixel have no fit
    fits = seen[..., 0].to(p.dtype)
    around = box(fits, radius)
    return box(lines * fits, radius) / around.clamp(min=1), around


def pooled(values: Tensor, step: int) -> Tensor:
    """Sums over cells of step x step pixels: [B,H,W,N] -> [B,h,w,N]; cells at the end may be cut."""
    if step == 1:
        return values
    planes, size = values.permute(0, 3, 1, 2), (step, step)
    if planes.stride(3) == 1 and step <= planes.shape[2]:  # sums of rows first are half the time
        full = planes[:, :, : planes.shape[2] // step * step]
        sums = full[:, :, ::step] + full[:, :, 1::step]
        for row in range(2, step):
            sums += full[:, :, row::step]
        rest = planes[:, :, full.shape[2] :]
        planes, size = torch.cat([sums, rest.sum(2, keepdim=True)], 2) if rest.shape[2] else sums, (1, step)
    return F.avg_pool2d(planes, size, ceil_mode=True, divisor_override=1).permute(0, 2, 3, 1).contiguous()


def inverse_symmetric(matrices: Tensor) -> Tensor:
    """The inverses of positive definite matrices [..., C, C], C = 1 or 3."""
    if matrices.shape[-1] == 1:
        return 1 / matrices
    a, b, c, _, d, e, _, _, f = matrices.flatten(-2).unbind(-1)
    first = d * f - e * e, c * e - b * f, b * e - c * d
    determinant = a * first[0] + b * first[1] + c * first[2]
    middle, corner, last = a * f - c * c, b * c - a * e, a * d - b * b
    cofactors = (*first, first[1], middle, corner, first[2], corner, last)
    return (torch.stack(cofactors, -1) / determinant[..., None]).unflatten(-1, (3, 3))


def denoised(guide: Tensor, counted: Tensor, *, radius: int, eps: float) -> Tensor:
    """The guided filter of every channel of colours [B,H,W,C] by itself: noise goes, edges stay.

    counted: 1 for the pixels that count in windows and 0 for the others, [B,H,W,1]. Others may get any value.
    """
    rows, reach, strips = max(4 * radius, NOISE_PIXELS // guide.shape[2], 1), 2 * radius, []
    for top in range(0, guide.shape[1], rows):
        first = max(0, top - reach)
        around = slice(first, top + rows + reach)
        strip = denoised_strip(guide[:, around], counted[:, around], radius=radius, eps=eps)
        strips.append(strip[:, top - first :][:, :rows])
    return torch.cat(strips, 1)


def denoised_strip(guide: Tensor, counted: Tensor, *, radius: int, eps: float) -> Tensor:
    sums = box(counted * torch.cat([guide, guide * guide, torch.ones_like(counted)], -1), radius)
    mean, square = (sums[..., :-1] / sums[..., -1:].clamp(min=1)).chunk(2, -1)
    variance = (square - mean * mean).clamp(min=0)
    slope = variance / (variance + eps)
    fits = box(torch.cat([slope, mean - slope * mean, torch.ones_like(counted)], -1), radius)
    slope, offset = (fits[..., :-1] / fits[..., -1:]).chunk(2, -1)
    return torch.addcmul(offset, slope, guide)


def applied(lines: Tensor, guide: Tensor, step: int) -> Tensor:
    """Upsamples lines [B,h,w,(C+1)*K] by `step`, and evaluates them at the colours [B,H,W,C] -> [B,H,W,K]."""
    return edge_blocks.lines_at(lines, guide, step, *lines.shape[1:3])


# joint upsampling


def pixel_centres(pixels: int, patches: int, length: float, like: Tensor) -> Tensor:
    """Where the centres of pixels lie on the grid, in patches: [pixels]; `length` pixels lie under all patches."""
    numbers = torch.arange(pixels, dtype=torch.float64) + 0.5
    return (numbers * (patches / length)).to(like)


def cell_means(
    guide: Tensor, cells: tuple[Tensor, Tensor], grid: tuple[int, int], mask: Tensor | None = None
) -> Tensor:
    """The mean colour of the pixels of every patch [B,h,w,C]; with a mask bool [B,H,W], of those that count."""
    counted = guide if mask is None else guide * mask[..., None]
    counts = torch.ones_like(guide[..., :1]) if mask is None else mask[..., None].to(guide)
    sums = torch.cat([counted, counts], -1)
    for dim, centres, patches in zip((1, 2), cells, grid):
        place = centres.long().clamp(max=patches - 1)
        shape = (*sums.shape[:dim], patches, *sums.shape[dim + 1 :])
        sums = sums.new_zeros(shape).index_add_(dim, place, sums)
    return sums[..., :-1] / sums[..., -1:].clamp(min=1)


def joint(
    scores: Tensor,
    guide: Tensor,
    colours: Tensor,
    cells: tuple[Tensor, Tensor],
    *,
    window: int,
    sigmas: tuple[float, float],
    weight: Tensor | None = None,
) -> Tensor:
    """Joint upsampling of scores [B,h,w,K] -> [B,H,W,K].

    guide: [B,H,W,C]; colours: of the patches [B,h,w,C]; cells: `pixel_centres` of rows [H] and columns [W]; sigmas: of
    position in patches, and of colour. weight: of the patches, above 0, [B,h,w].
    """
    scalars = (checks.filled(sigma, torch.float64, torch.device("cpu")) for sigma in sigmas)
    return edge_blocks.joint(scores, guide, colours, *cells, weight, *scalars, window=window)
