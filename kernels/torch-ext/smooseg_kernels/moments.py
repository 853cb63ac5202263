"""The objective from sums over patches, in O(P D K) time and O(P (D + K)) memory: plain traceable PyTorch (`impl="torch"`).

The energy has no clamp, so it is bilinear in the unit features and the unit label rows of both sides, and three moments of an image hold
all that a pair set needs of it. With weights w that add up to 1 over an image's patches (1 / P each by default):

    g = sum_p w_p f_p c_p^T  [D,K],    u = sum_p w_p f_p  [D],    s = sum_p w_p c_p  [K]
    centred      E = mean over image pairs of (M - b) (1 - s.s') - <g, g' - u' s'^T>,    M = mean of u.u'
    not centred  E = mean over image pairs of u.u' - b (1 - s.s') - <g, g'>

Arguments come canonical from `api`, as `dense` takes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager
from .rows import accumulation_dtype, inverse_norms, invert_norms, unit_rows

# upsampled scores are made in strips of rows so that a large image never needs [K,H,W] floats at once
STRIP_ELEMENTS = 1 << 24


class Moments(NamedTuple):
    g: Tensor  # [H,B,K,D]: as its transpose, the product is a third slower on a CPU
    u: Tensor  # [B,D]
    s: Tensor  # [H,B,K]
    present: (
        Tensor  # [B] 1 where the image has any weight, else 0: then its moments are 0 and it is left out of every mean
    )


def moments(features, labels, channel_scale, patch_weight, feature_norms) -> Moments:
    """labels [H,B,P,K]: rows of length 1, or 0."""
    f = features.to(labels.dtype)
    H, _, P, K = labels.shape
    if feature_norms is not None:
        inverse = invert_norms(feature_norms)
    elif channel_scale is not None:
        inverse = invert_norms(scaled_norms(f, channel_scale))
    else:
        inverse = inverse_norms(f)[..., 0]
    if patch_weight is None:
        scaled, present, s = inverse / P, torch.ones_like(inverse[:, 0]), labels.mean(2)
    else:
        shares, present = image_shares(patch_weight)
        scaled, s = shares * inverse, torch.einsum("bp,hbpk->hbk", shares, labels)
    # the features are read as they are: their norms and weights ride on the label rows, which are smaller by D / K,
    # and u is one more label whose probability is 1 everywhere
    sides = torch.cat(((labels * scaled[None, :, :, None]).permute(1, 2, 0, 3).flatten(2), scaled[..., None]), -1)
    sums = sides.mT @ f  # [B,H*K+1,D]
    if channel_scale is not None:
        sums = sums * channel_scale[:, None, :]
    return Moments(sums[:, :-1].unflatten(1, (H, K)).transpose(0, 1), sums[:, -1].detach(), s, present)


def image_shares(patch_weight: Tensor) -> tuple[Tensor, Tensor]:
    """[B,P] -> [B,P] that add up to 1 over an image, or are 0 where it has no weight; [B] 1 where it has any."""
    total = patch_weight.sum(1, keepdim=True)
    shares = torch.where(total > 0, patch_weight / torch.where(total > 0, total, 1.0), 0.0)
    return shares, (total[:, 0] > 0).to(patch_weight.dtype)


def scaled_norms(f: Tensor, channel_scale: Tensor) -> Tensor:
    """[B,P,D], [B,D] -> [B,P]. On a CPU image by image: the scaled features of one stay in the cache, those of all would not."""
    if f.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(f * channel_scale[:, None, :], dim=-1)
    return torch.stack([torch.linalg.vector_norm(image * scale, dim=-1) for image, scale in zip(f, channel_scale)])


def smoothness(
    features, probs, partners, thresholds, relative, center, channel_scale, patch_weight, feature_norms, mean
):
    """-> energy [H,T], distance [H,T], mean [T]."""
    labels = unit_rows(probs.to(accumulation_dtype(features, probs)))
    return energies(
        moments(features, labels, channel_scale, patch_weight, feature_norms),
        partners,
        thresholds,
        relative,
        center,
        mean,
    )


def energies(m: Moments, partners, thresholds, relative, center, mean):
    """-> energy [H,T], distance [H,T], mean [T]."""
    sums = [pair_sums(m, entry, center) for entry in partners]
    pairs, likeness, agreement, inner = (torch.stack(parts, -1) for parts in zip(*sums))  # [T], [T], [H,T], [H,T]
    count = pairs.clamp(min=1.0)
    mean = likeness / count if mean is None else mean
    bias = thresholds + mean if relative else thresholds
    distance = (pairs - agreement) / count
    energy = ((mean - bias) * distance if center else likeness / count - bias * distance) - inner / count
    return energy, distance, mean


def pair_sums(m: Moments, entry: str | Tensor, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the image pairs (n, n') of one pair set: pairs [], u.u' [], s.s' [H], <g, g' - u' s'^T> or <g, g'> [H]."""
    other = m.g - m.s[..., None] * m.u[:, None, :] if center else m.g  # what an image shows as a partner
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
    return tuple(a - b for a, b in zip(crowd, own))


def raw_cosines(codes: Tensor, prototypes: Tensor, inverse: Tensor | None = None) -> Tensor:
    """[H,B,P,Z], [H,K,Z] -> [H,B,P,K] without writing unit codes: the code norms divide the smaller product.

    inverse [H,B,P,1]: of the code norms, where they are known.
    """
    dtype = accumulation_dtype(codes, prototypes)
    codes = codes.to(dtype)
    return (codes @ unit_rows(prototypes.to(dtype))[:, None].mT) * (
        inverse_norms(codes) if inverse is None else inverse
    )


def probabilities(codes: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    return torch.softmax(raw_cosines(codes, prototypes) / temperature, -1)


def cross_entropy(logits: Tensor, labels: Tensor, patch_weight: Tensor | None) -> Tensor:
    """[H,B,P,K], [H,B,P] -> [H]."""
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    if patch_weight is None:
        return loss.mean((1, 2))
    return (loss * patch_weight).sum((1, 2)) / patch_weight.sum().clamp(min=torch.finfo(loss.dtype).tiny)


def nearest(cosines: Tensor) -> Tensor:
    """The lowest index of the largest cosine; max is twice as fast as argmax along a short last axis."""
    return cosines.detach().max(-1).indices


def data_term(codes: Tensor, student: Tensor, teacher: Tensor, patch_weight: Tensor | None) -> Tensor:
    """-> [H]."""
    codes = codes.detach().to(accumulation_dtype(codes, student, teacher))
    inverse = inverse_norms(codes)
    return cross_entropy(
        raw_cosines(codes, student, inverse), nearest(raw_cosines(codes, teacher, inverse)), patch_weight
    )


def loss(
    features,
    codes,
    student,
    teacher,
    partners,
    thresholds,
    temperature,
    relative,
    center,
    channel_scale,
    patch_weight,
    feature_norms,
    mean,
):
    """-> total [H], energy [H,T], data [H], distance [H,T], mean [T]."""
    rows = row_work_eager if eager.serves(features, codes, student, teacher) else row_work
    m, data = rows(features, codes, student, teacher, temperature, channel_scale, patch_weight, feature_norms)
    energy, distance, mean = energies(m, partners, thresholds, relative, center, mean)
    return energy.sum(1) + data, energy, data, distance, mean


def row_work(
    features, codes, student, teacher, temperature, channel_scale, patch_weight, feature_norms
) -> tuple[Moments, Tensor]:
    """-> the moments and the data term [H]."""
    codes = codes.to(accumulation_dtype(features, codes, student, teacher))
    inverse = inverse_norms(codes)
    toward_teacher = raw_cosines(codes, teacher, inverse)
    # sqrt(softmax(2 x)) would be unit rows at once, but where the softmax is peaked its gradient is ten times less exact
    labels = unit_rows(torch.softmax(toward_teacher / temperature, -1))
    data = cross_entropy(raw_cosines(codes.detach(), student, inverse.detach()), nearest(toward_teacher), patch_weight)
    return moments(features, labels, channel_scale, patch_weight, feature_norms), data


def row_work_eager(
    features, codes, student, teacher, temperature, channel_scale, patch_weight, feature_norms
) -> tuple[Moments, Tensor]:
    """The same, with the gradient written out."""
    dtype = accumulation_dtype(features, codes, student, teacher)
    shares = data_shares = None
    present = features.new_ones(len(features), dtype=dtype)
    if patch_weight is not None:
        shares, present = image_shares(patch_weight)
        data_shares = patch_weight / patch_weight.sum().clamp(min=torch.finfo(dtype).tiny)
    prototypes = (unit_rows(rows.to(dtype)) for rows in (student, teacher))
    constants = (temperature, channel_scale, shares, data_shares, feature_norms)
    with torch.autocast("cpu", enabled=False):  # products are of the accumulation dtype
        g, u, s, data = eager.LabelMoments.apply(features, codes, *prototypes, *constants)
    return Moments(g.unflatten(1, student.shape[:2]).transpose(0, 1), u, s, present), data


def assign(codes: Tensor, prototypes: Tensor, grid: tuple[int, int] | None, size: tuple[int, int] | None) -> Tensor:
    """-> [B,P] or [B,H,W]. Upsampling is linear and a code's norm common to all prototypes: K numerators are upsampled, not Z codes."""
    dtype = accumulation_dtype(codes, prototypes)
    scores = codes.to(dtype) @ unit_rows(prototypes.to(dtype)).mT
    if grid is None:
        return scores.argmax(-1)
    h, (H, W) = grid[0], size
    planes = scores.mT.unflatten(-1, grid)  # [B,K,h,w]
    B, K = planes.shape[:2]
    # bilinear is separable: rows by two taps here, columns by the library, strip by strip
    y = ((torch.arange(H, device=codes.device, dtype=dtype) + 0.5) * (h / H) - 0.5).clamp(min=0.0)
    top = y.long().clamp(max=h - 1)
    bottom, share = (top + 1).clamp(max=h - 1), (y - top)[:, None]
    rows = max(1, STRIP_ELEMENTS // (B * K * W))
    strips = []
    for start in range(0, H, rows):
        part = slice(start, min(start + rows, H))
        lines = torch.lerp(planes[:, :, top[part]], planes[:, :, bottom[part]], share[part])
        strips.append(F.interpolate(lines, size=(lines.shape[2], W), mode="bilinear", align_corners=False).argmax(1))
    return torch.cat(strips, 1)
