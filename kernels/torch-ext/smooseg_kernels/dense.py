"""The formulas as written: every patch pair's closeness and label distance as a matrix. The oracle, in any dtype; O(P^2 (D + K)).

Arguments come canonical from `api`: a head axis in front (codes [H,B,P,Z], prototypes [H,K,Z], probabilities [H,B,P,K], thresholds [H,T]),
partners as a tuple of "self", "all" or int64 [B], constants already in the accumulation dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import accumulation_dtype, invert_norms, unit_rows


def smoothness(
    features, probs, partners, thresholds, relative, center, channel_scale, patch_weight, feature_norms, mean
):
    """-> energy [H,T], distance [H,T], mean [T]."""
    dtype = accumulation_dtype(features, probs)
    B, P, _ = features.shape
    f = features.to(dtype)
    if channel_scale is not None:
        f = f * channel_scale[:, None, :]
    f = unit_rows(f) if feature_norms is None else f * invert_norms(feature_norms)[..., None]
    c = unit_rows(probs.to(dtype))
    w = torch.ones(B, P, dtype=dtype, device=f.device) if patch_weight is None else patch_weight
    energies, distances, means = [], [], []
    for t, entry in enumerate(partners):
        closeness, pair_weights, sides = [], [], partner_vectors(entry, B, f.device)
        for j in sides:
            closeness.append(f @ f[j].mT)
            pair_weights.append(mean_weights(w, w[j]))
        # every (image, i, j) of the pair set: images without any weight are left out of the mean
        images = sum((pw.sum((1, 2)) > 0).sum() for pw in pair_weights).clamp(min=1)
        measured = sum((pw * s).sum() for pw, s in zip(pair_weights, closeness)) / images
        m = measured if mean is None else mean[t]
        bias = thresholds[:, t] + (m if relative else 0.0)
        energy, distance = 0.0, 0.0
        for j, s, pw in zip(sides, closeness, pair_weights):
            closer = s - (s * shares(w[j])[:, None, :]).sum(2, keepdim=True) + m if center else s
            d = 1.0 - c @ c[:, j].mT  # [H,B,P,P]
            energy = energy + (pw * (closer - bias[:, None, None, None]) * d).sum((1, 2, 3)) / images
            distance = distance + (pw * d).sum((1, 2, 3)) / images
        energies.append(energy)
        distances.append(distance)
        means.append(m)
    return torch.stack(energies, 1), torch.stack(distances, 1), torch.stack(means)


def partner_vectors(entry: str | Tensor, B: int, device: torch.device) -> list[Tensor]:
    """The partner of every image, once per time that an image stands on the i side."""
    here = torch.arange(B, device=device)
    if isinstance(entry, Tensor):
        return [entry]
    return [here] if entry == "self" else [(here + shift) % B for shift in range(1, B)]


def mean_weights(w_i: Tensor, w_j: Tensor) -> Tensor:
    """[B,P], [B,P] -> [B,P,P] weights of one image's pairs that add up to 1, or to 0 where an image has no weight."""
    return shares(w_i)[:, :, None] * shares(w_j)[:, None, :]


def shares(w: Tensor) -> Tensor:
    """[B,P] weights -> the same with a sum of 1 over an image, or 0. Products of two raw weights could leave the dtype's range."""
    return w / w.sum(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)


def pair_energy(features_i, codes_i, features_j, codes_j, threshold, partner, clamp, hinge, center):
    """[B,P_i,.] against [N,P_j,.], partner int64 [B] or None -> energy [], similarity []."""
    dtype = accumulation_dtype(features_i, codes_i, features_j, codes_j)
    f_i, c_i, f_j, c_j = (unit_rows(rows.to(dtype)) for rows in (features_i, codes_i, features_j, codes_j))
    if partner is not None:
        f_j, c_j = f_j[partner], c_j[partner]
    closeness, likeness = f_i @ f_j.mT, c_i @ c_j.mT  # [B,P_i,P_j]
    if center:
        closeness = closeness - closeness.mean(2, keepdim=True) + closeness.mean()
    force = closeness - threshold
    if hinge:
        force = force.clamp(min=0.0)
    clamped = likeness if clamp == (None, None) else likeness.clamp(*clamp)
    return -(clamped * force).mean(), likeness.mean()


def similarity_statistics(features, partners, patch_weight, mean, center, bins, limits, neighbours):
    """-> mean [T], row_mean [T,B,P], histogram int64 [T,bins], neighbour_values and neighbour_indices [T,B,P,k]."""
    dtype = accumulation_dtype(features)
    B, P, _ = features.shape
    f = unit_rows(features.to(dtype))
    w = torch.ones(B, P, dtype=dtype, device=f.device) if patch_weight is None else patch_weight
    here = (w > 0)[:, :, None]
    flat = torch.arange(B * P, device=f.device).view(B, P)
    found = []
    for t, entry in enumerate(partners):
        sides = partner_vectors(entry, B, f.device)
        closeness, pair_weights = [f @ f[j].mT for j in sides], [mean_weights(w, w[j]) for j in sides]
        images = sum((pw.sum((1, 2)) > 0).sum() for pw in pair_weights).clamp(min=1)
        m = sum((pw * s).sum() for pw, s in zip(pair_weights, closeness)) / images if mean is None else mean[t]
        rows = [(s * shares(w[j])[:, None]).sum(2) for j, s in zip(sides, closeness)]
        partners_here = sum((w[j].sum(1) > 0).to(dtype) for j in sides).clamp(min=1)
        counts = torch.zeros(bins, dtype=torch.int64, device=f.device)
        table = torch.full((B, P, B * P if neighbours else 0), -torch.inf, dtype=dtype, device=f.device)
        for j, s, r in zip(sides, closeness, rows):
            closer = s - r[:, :, None] + m if center else s
            there = (w[j] > 0)[:, None, :].expand(s.shape)
            if bins:
                place = ((closer - limits[0]) * (bins / (limits[1] - limits[0]))).floor().clamp(0, bins - 1).long()
                counts.scatter_add_(0, place.flatten(), (here & there).long().flatten())
            if neighbours:
                other = flat[j][:, None, :].expand(s.shape)
                itself = other == flat[:, :, None]  # a patch is no neighbour of its own
                table.scatter_(2, other, torch.where(there & ~itself, closer, -torch.inf))
        best = table.sort(dim=2, descending=True, stable=True)
        values, indices = best.values[:, :, :neighbours], best.indices[:, :, :neighbours]
        missing = neighbours - values.shape[2]
        values, indices = F.pad(values, (0, missing), value=-torch.inf), F.pad(indices, (0, missing), value=-1)
        found.append(
            (m, sum(rows) / partners_here[:, None], counts, values, torch.where(values > -torch.inf, indices, -1))
        )
    return tuple(torch.stack(parts) for parts in zip(*found))


def cosines(codes: Tensor, prototypes: Tensor) -> Tensor:
    """[H,B,P,Z], [H,K,Z] -> [H,B,P,K]."""
    dtype = accumulation_dtype(codes, prototypes)
    return unit_rows(codes.to(dtype)) @ unit_rows(prototypes.to(dtype))[:, None].mT


def probabilities(codes: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    return torch.softmax(cosines(codes, prototypes) / temperature, -1)


def data_term(codes: Tensor, student: Tensor, teacher: Tensor, patch_weight: Tensor | None) -> Tensor:
    """-> [H]."""
    labels = cosines(codes.detach(), teacher).argmax(-1)
    logits = cosines(codes.detach(), student)
    loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape)
    if patch_weight is None:
        return loss.mean((1, 2))
    return (loss * patch_weight).sum((1, 2)) / patch_weight.sum().clamp(min=torch.finfo(loss.dtype).tiny)


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
    probs = probabilities(codes, teacher, temperature)
    energy, distance, mean = smoothness(
        features, probs, partners, thresholds, relative, center, channel_scale, patch_weight, feature_norms, mean
    )
    data = data_term(codes, student, teacher, patch_weight)
    return energy.sum(1) + data, energy, data, distance, mean


def assign(codes: Tensor, prototypes: Tensor, grid: tuple[int, int] | None, size: tuple[int, int] | None) -> Tensor:
    """The argmax of cosines to bilinearly upsampled codes; -> [B,P] or [B,H,W]."""
    codes = codes.to(accumulation_dtype(codes, prototypes))
    if grid is None:
        return cosines(codes[None], prototypes[None])[0].argmax(-1)
    planes = codes.mT.unflatten(-1, grid)  # [B,Z,h,w]
    fine = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    return cosines(fine.flatten(2).mT[None], prototypes[None])[0].argmax(-1).unflatten(-1, size)
