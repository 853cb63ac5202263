"""The objective from sums over patches: O(P D K) time, O(P (D + K)) memory, plain traceable PyTorch (`impl="torch"`).

The energy has no clamp. It is therefore bilinear in the unit features and the unit probs of both sides, and three
moments of an image hold all that a pair set needs of it. With weights w that add up to 1 over an image's patches (1 / P
each by default):

    g = sum_p w_p f_p c_p^T  [D,K],    u = sum_p w_p f_p  [D],    s = sum_p w_p c_p  [K]
    centred      E = mean over image pairs of (M - b) (1 - s.s') - <g, g' - u' s'^T>,    M = mean of u.u'
    not centred  E = mean over image pairs of u.u' - b (1 - s.s') - <g, g'>
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager
from .operators import operator
from .problem import Problem
from .rows import accumulation_dtype, inverse_norms, invert_norms, unit_rows

# upsampled scores are computed in strips of pixel rows, so that a large image never needs [K,H,W] floats at once
STRIP_ELEMENTS = 1 << 24


class Moments(NamedTuple):
    """The moments of every image; those of an image without any weight are 0."""

    g: Tensor  # [H,B,K,D]: as its transpose, the product is a third slower on a CPU
    u: Tensor  # [B,D]
    s: Tensor  # [H,B,K]
    present: Tensor  # [B]: 1 where the image has any weight, else 0, which leaves it out of every mean


def moments(problem: Problem, c: Tensor) -> Moments:
    """Takes c [H,B,P,K]: probs scaled to length 1, or rows of 0."""
    f = problem.features.to(c.dtype)
    H, _, P, K = c.shape
    channel_scale = problem.channel_scale
    if problem.feature_norms is not None:
        inverse = invert_norms(problem.feature_norms)
    elif channel_scale is not None:
        inverse = invert_norms(scaled_norms(f, channel_scale))
    else:
        inverse = inverse_norms(f)[..., 0]
    if problem.patch_weight is None:
        scaled, present, s = inverse / P, torch.ones_like(inverse[:, 0]), c.mean(2)
    else:
        shares, present = image_shares(problem.patch_weight)
        scaled, s = shares * inverse, torch.einsum("bp,hbpk->hbk", shares, c)
    # the features are read as they are: their norms and weights ride on the probs, which are smaller by D / K,
    # and u is one more group whose probability is 1 everywhere
    sides = torch.cat(((c * scaled[None, :, :, None]).permute(1, 2, 0, 3).flatten(2), scaled[..., None]), -1)
    sums = sides.mT @ f  # [B,H*K+1,D]
    if channel_scale is not None:
        sums = sums * channel_scale[:, None, :]
    return Moments(sums[:, :-1].unflatten(1, (H, K)).transpose(0, 1), sums[:, -1].detach(), s, present)


def image_shares(patch_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales weights [B,P] to add up to 1 over an image, or 0 without weight; also returns 1 where it has any, [B]."""
    total = patch_weight.sum(1, keepdim=True)
    shares = torch.where(total > 0, patch_weight / torch.where(total > 0, total, 1.0), 0.0)
    return shares, (total[:, 0] > 0).to(patch_weight.dtype)


def scaled_norms(f: Tensor, channel_scale: Tensor) -> Tensor:
    """Takes [B,P,D] and [B,D] to [B,P]. On a CPU image by image: one image's scaled features stay in the cache."""
    if f.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(f * channel_scale[:, None, :], dim=-1)
    return torch.stack([torch.linalg.vector_norm(image * scale, dim=-1) for image, scale in zip(f, channel_scale)])


def smoothness(problem: Problem, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns energy [H,T], distance [H,T] and mean [T] for probs [H,B,P,K]."""
    return energies(problem, moments(problem, unit_rows(probs.to(accumulation_dtype(problem.features, probs)))))


def energies(problem: Problem, m: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Returns energy [H,T], distance [H,T] and mean [T]."""
    sums = [pair_sums(m, entry, problem.center) for entry in problem.partners]
    pairs, likeness, agreement, inner = (torch.stack(parts, -1) for parts in zip(*sums))  # [T], [T], [H,T], [H,T]
    count = pairs.clamp(min=1.0)
    mean = likeness / count if problem.mean is None else problem.mean
    bias = problem.thresholds + mean if problem.relative else problem.thresholds
    distance = (pairs - agreement) / count
    closeness = (mean - bias) * distance if problem.center else likeness / count - bias * distance
    return closeness - inner / count, distance, mean


def pair_sums(m: Moments, entry: str | Tensor, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adds up over a pair set's image pairs: pairs [], u.u' [], s.s' [H], <g, g' - u' s'^T> or <g, g'> [H]."""
    other = m.g - m.s[..., None] * m.u[:, None, :] if center else m.g  # an image as a partner
    if isinstance(entry, Tensor):
        j = entry
        return (
            (m.present * m.present[j]).sum(),
            (m.u * m.u[j]).sum(),
            (m.s * m.s[:, j]).sum((1, 2)),
            (m.g * other.index_select(1, j)).sum((1, 2, 3)),  # the gradient of an index takes four times as long
        )
    own = m.present.sum(), m.u.square().sum(), m.s.square().sum((1, 2)), (m.g * other).sum((1, 2, 3))
    if entry == "self":
        return own
    # every ordered pair of different images: the product of the sums, less each image with itself
    crowd = (
        m.present.sum().square(),
        m.u.sum(0).square().sum(),
        m.s.sum(1).square().sum(1),
        (m.g.sum(1) * other.sum(1)).sum((1, 2)),
    )
    return crowd[0] - own[0], crowd[1] - own[1], crowd[2] - own[2], crowd[3] - own[3]


def raw_cosines(codes: Tensor, prototypes: Tensor, inverse: Tensor | None = None) -> Tensor:
    """Takes [H,B,P,Z] and [H,K,Z] to [H,B,P,K]. Unit codes are never written: the code norms divide the smaller
    product.

    `inverse` [H,B,P,1] gives 1 / norms of the codes where they are known.
    """
    dtype = accumulation_dtype(codes, prototypes)
    codes = codes.to(dtype)
    products = codes @ unit_rows(prototypes.to(dtype))[:, None].mT
    return products * (inverse_norms(codes) if inverse is None else inverse)


def probabilities(codes: Tensor, prototypes: Tensor, temperature: float | Tensor) -> Tensor:
    """Returns probs [H,B,P,K]."""
    return torch.softmax(raw_cosines(codes, prototypes) / temperature, -1)


def cross_entropy(logits: Tensor, labels: Tensor, patch_weight: Tensor | None) -> Tensor:
    """Takes [H,B,P,K] and [H,B,P] to [H]."""
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    if patch_weight is None:
        return loss.mean((1, 2))
    return (loss * patch_weight).sum((1, 2)) / patch_weight.sum().clamp(min=torch.finfo(loss.dtype).tiny)


def nearest(cosines: Tensor) -> Tensor:
    """Returns the lowest index of the largest cosine. Along a short last axis max is twice as fast as argmax."""
    return cosines.detach().max(-1).indices


def data_term(codes: Tensor, student: Tensor, teacher: Tensor, patch_weight: Tensor | None) -> Tensor:
    """Returns the data term [H]."""
    codes = codes.detach().to(accumulation_dtype(codes, student, teacher))
    inverse = inverse_norms(codes)
    labels = nearest(raw_cosines(codes, teacher, inverse))
    return cross_entropy(raw_cosines(codes, student, inverse), labels, patch_weight)


def loss(
    problem: Problem, codes: Tensor, student: Tensor, teacher: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns total [H], energy [H,T], data [H], distance [H,T] and mean [T]."""
    rows = row_work_eager if eager.serves(problem.features, codes, student, teacher) else row_work
    m, data = rows(problem, codes, student, teacher, temperature)
    energy, distance, mean = energies(problem, m)
    return energy.sum(1) + data, energy, data, distance, mean


def row_work(
    problem: Problem, codes: Tensor, student: Tensor, teacher: Tensor, temperature: float | Tensor
) -> tuple[Moments, Tensor]:
    """Returns the moments and the data term [H], in the form that traces and compiles."""
    codes = codes.to(accumulation_dtype(problem.features, codes, student, teacher))
    inverse = inverse_norms(codes)
    toward_teacher = raw_cosines(codes, teacher, inverse)
    # sqrt(softmax(2 x)) would give unit rows at once, but its gradient is ten times less exact where probs are peaked
    c = unit_rows(torch.softmax(toward_teacher / temperature, -1))
    toward_student = raw_cosines(codes.detach(), student, inverse.detach())
    return moments(problem, c), cross_entropy(toward_student, nearest(toward_teacher), problem.patch_weight)


def row_work_eager(
    problem: Problem, codes: Tensor, student: Tensor, teacher: Tensor, temperature: float | Tensor
) -> tuple[Moments, Tensor]:
    """Returns the same, with the gradient written out."""
    features, patch_weight = problem.features, problem.patch_weight
    dtype = accumulation_dtype(features, codes, student, teacher)
    shares = data_shares = None
    present = features.new_ones(len(features), dtype=dtype)
    if patch_weight is not None:
        shares, present = image_shares(patch_weight)
        data_shares = patch_weight / patch_weight.sum().clamp(min=torch.finfo(dtype).tiny)
    constants = eager.Constants(temperature, problem.channel_scale, shares, data_shares, problem.feature_norms)
    units = (unit_rows(rows.to(dtype)) for rows in (student, teacher))
    with torch.autocast("cpu", enabled=False):  # products have the accumulation dtype
        g, u, s, data = eager.LabelMoments.apply(features, codes, *units, constants)
    return Moments(g.unflatten(1, student.shape[:2]).transpose(0, 1), u, s, present), data


def assign(codes: Tensor, prototypes: Tensor, grid: tuple[int, int] | None, size: tuple[int, int] | None) -> Tensor:
    """Returns labels, int64 [B,P] or [B,H,W].

    Upsampling is linear and a code's norm is common to all prototypes, so K numerators are upsampled instead of Z
    codes.
    """
    dtype = accumulation_dtype(codes, prototypes)
    scores = codes.to(dtype) @ unit_rows(prototypes.to(dtype)).mT
    if grid is None or size is None:
        return scores.argmax(-1)
    if torch.compiler.is_compiling():
        return traced_labels(scores, list(grid), list(size))
    return upsampled_labels(scores, grid, size)


def upsampled_labels(scores: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Takes numerators [B,P,K] to labels of pixels, int64 [B,H,W]."""
    dtype = scores.dtype
    h, (H, W) = grid[0], size
    planes = scores.mT.unflatten(-1, (grid[0], grid[1]))  # [B,K,h,w]
    B, K = planes.shape[:2]
    # bilinear interpolation is separable: two taps for the rows here, the library for the columns, strip by strip
    y = ((torch.arange(H, device=scores.device, dtype=dtype) + 0.5) * (h / H) - 0.5).clamp(min=0.0)
    top = y.long().clamp(max=h - 1)
    bottom, share = (top + 1).clamp(max=h - 1), (y - top)[:, None]
    rows = max(1, STRIP_ELEMENTS // (B * K * W))
    strips = []
    for start in range(0, H, rows):
        part = slice(start, min(start + rows, H))
        lines = torch.lerp(planes[:, :, top[part]], planes[:, :, bottom[part]], share[part])
        upsampled = F.interpolate(lines, size=(lines.shape[2], W), mode="bilinear", align_corners=False)
        strips.append(upsampled.max(1).indices)  # the same as argmax, which is slower on a CPU
    return torch.cat(strips, 1)


@operator("upsampled_labels")
def traced_labels(scores: Tensor, grid: list[int], size: list[int]) -> Tensor:
    """Is one operator to compilers, whatever the number of strips."""
    return upsampled_labels(scores, grid, size)


@traced_labels.register_fake
def _(scores, grid, size):
    return torch.empty((scores.shape[0], size[0], size[1]), dtype=torch.int64, device=scores.device)
