"""The formulas as written: every patch pair's closeness and label distance as a matrix; O(P^2 (D + K)) time and memory.

This is the oracle of the tests. It takes any dtype and has gradients of any order. Tensors have a head axis in front:
codes [H,B,P,Z], prototypes [H,K,Z], probs [H,B,P,K].
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import ClosenessProblem, PairProblem, PairSet, Problem
from .rows import accumulation_dtype, invert_norms, unit_rows
from .types import PairEnergy


def smoothness(problem: Problem, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns energy [H,T], distance [H,T] and mean [T] for probs [H,B,P,K]."""
    dtype = accumulation_dtype(problem.features, probs)
    B, P, _ = problem.features.shape
    f = problem.features.to(dtype)
    if problem.channel_scale is not None:
        f = f * problem.channel_scale[:, None, :]
    f = unit_rows(f) if problem.feature_norms is None else f * invert_norms(problem.feature_norms)[..., None]
    c = unit_rows(probs.to(dtype))
    weight = problem.patch_weight
    w = torch.ones(B, P, dtype=dtype, device=f.device) if weight is None else weight
    energies, distances, means = [], [], []
    for t, entry in enumerate(problem.partners):
        closeness, pair_weights, sides = [], [], partner_vectors(entry, B, f.device)
        for j in sides:
            closeness.append(f @ f[j].mT)
            pair_weights.append(mean_weights(w, w[j]))
        # images without any weight are left out of the mean over (image, i, j)
        images, measured = measured_mean(pair_weights, closeness)
        m = measured if problem.mean is None else problem.mean[t]
        bias = problem.thresholds[:, t] + (m if problem.relative else 0.0)
        energy = distance = f.new_zeros(c.shape[0])
        for j, s, pw in zip(sides, closeness, pair_weights):
            closer = s - (s * shares(w[j])[:, None, :]).sum(2, keepdim=True) + m if problem.center else s
            d = 1.0 - c @ c[:, j].mT  # [H,B,P,P]
            energy = energy + (pw * (closer - bias[:, None, None, None]) * d).sum((1, 2, 3)) / images
            distance = distance + (pw * d).sum((1, 2, 3)) / images
        energies.append(energy)
        distances.append(distance)
        means.append(m)
    return torch.stack(energies, 1), torch.stack(distances, 1), torch.stack(means)


def partner_vectors(entry: str | Tensor, B: int, device: torch.device) -> list[Tensor]:
    """Lists the partners of all images, int64 [B], once for each time that an image stands on the i side."""
    own = torch.arange(B, device=device)
    if isinstance(entry, Tensor):
        return [entry]
    return [own] if entry == "self" else [(own + shift) % B for shift in range(1, B)]


def mean_weights(w_i: Tensor, w_j: Tensor) -> Tensor:
    """Turns weights [B,P] and [B,P] into [B,P,P] weights of an image's pairs; they add up to 1, or 0 without weight."""
    return shares(w_i)[:, :, None] * shares(w_j)[:, None, :]


def shares(w: Tensor) -> Tensor:
    """Scales weights [B,P] to add up to 1 over an image, or 0. Products of two raw weights could overflow the dtype."""
    return w / w.sum(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)


def added(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def measured_mean(pair_weights: list[Tensor], closeness: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the number of image pairs that have any weight, at least 1, and the mean closeness M over them."""
    images = added((pw.sum((1, 2)) > 0).sum() for pw in pair_weights).clamp(min=1)
    return images, added((pw * s).sum() for pw, s in zip(pair_weights, closeness)) / images


def pair_energy(problem: PairProblem) -> list[PairEnergy]:
    """Returns the results of each pair set."""
    return [one_pair_set(problem, pair_set) for pair_set in problem.pair_sets]


def one_pair_set(problem: PairProblem, pair_set: PairSet) -> PairEnergy:
    tensors = (problem.features_i, problem.codes_i, problem.features_j, problem.codes_j)
    f_i, c_i, f_j, c_j = (unit_rows(rows.to(accumulation_dtype(*tensors))) for rows in tensors)
    w_i, w_j = (
        torch.ones_like(f[..., 0]) if w is None else w for f, w in ((f_i, problem.weight_i), (f_j, problem.weight_j))
    )
    if pair_set.partner is not None:
        f_j, c_j, w_j = (rows[pair_set.partner] for rows in (f_j, c_j, w_j))
    closeness, likeness = f_i @ f_j.mT, c_i @ c_j.mT  # [B,P_i,P_j]
    pw = mean_weights(w_i, w_j)
    images = (pw.sum((1, 2)) > 0).sum().clamp(min=1)

    def over_j(pairs: Tensor) -> Tensor:
        return pairs.mean(2) if problem.weight_j is None else (pairs * shares(w_j)[:, None]).sum(2)

    def over_all(pairs: Tensor) -> Tensor:
        return pairs.mean() if problem.weight_i is problem.weight_j is None else (pw * pairs).sum() / images

    centred = closeness
    if problem.center:
        mean = over_all(closeness) if pair_set.mean is None else pair_set.mean
        centred = closeness - over_j(closeness)[..., None] + mean
    force = centred - (pair_set.threshold if pair_set.threshold.dim() == 0 else pair_set.threshold[:, None, None])
    if problem.hinge:
        force = force.clamp(min=0.0)
    clamped = likeness if problem.clamp == (None, None) else likeness.clamp(*problem.clamp)
    taken = over_j if problem.rows else over_all
    counts = None
    if problem.bins:
        low, high = problem.limits
        place = ((likeness - low) * (problem.bins / (high - low))).floor().clamp(0, problem.bins - 1).long().flatten()
        counts = torch.zeros(problem.bins, dtype=torch.int64, device=place.device)
        counts = counts.scatter_add(0, place, torch.ones_like(place))
    means = problem.means
    return PairEnergy(
        energy=-taken(clamped * force),
        similarity=taken(likeness),
        clamped=taken(clamped) if means else None,
        closeness=taken(closeness) if means else None,
        histogram=counts,
    )


def similarity_statistics(problem: ClosenessProblem) -> tuple[Tensor, ...]:
    """Returns mean [T], row_mean [T,B,P], histogram int64 [T,bins], neighbour values and indices [T,B,P,k]."""
    dtype = accumulation_dtype(problem.features)
    B, P, _ = problem.features.shape
    f = unit_rows(problem.features.to(dtype))
    w = torch.ones(B, P, dtype=dtype, device=f.device) if problem.patch_weight is None else problem.patch_weight
    results = []
    for t, entry in enumerate(problem.partners):
        sides = partner_vectors(entry, B, f.device)
        closeness, pair_weights = [f @ f[j].mT for j in sides], [mean_weights(w, w[j]) for j in sides]
        m = measured_mean(pair_weights, closeness)[1] if problem.mean is None else problem.mean[t]
        rows = [(s * shares(w[j])[:, None]).sum(2) for j, s in zip(sides, closeness)]
        present_partners = added((w[j].sum(1) > 0).to(dtype) for j in sides).clamp(min=1)
        closer = [s - r[:, :, None] + m if problem.center else s for s, r in zip(closeness, rows)]
        row_mean = added(rows) / present_partners[:, None]
        results.append((m, row_mean, histogram(problem, closer, sides, w), *neighbours(problem, closer, sides, w)))
    return tuple(torch.stack(parts) for parts in zip(*results))


def histogram(problem: ClosenessProblem, closeness: list[Tensor], sides: list[Tensor], w: Tensor) -> Tensor:
    """Counts pairs [B,P,P] in int64 [bins], each once, where both weights are above 0."""
    bins, (low, high) = problem.bins, problem.limits
    counts = torch.zeros(bins, dtype=torch.int64, device=w.device)
    for j, closer in zip(sides, closeness if bins else ()):
        place = ((closer - low) * (bins / (high - low))).floor().clamp(0, bins - 1).long()
        both = (w > 0)[:, :, None] & (w[j] > 0)[:, None, :]
        counts.scatter_add_(0, place.flatten(), both.long().flatten())
    return counts


def neighbours(
    problem: ClosenessProblem, closeness: list[Tensor], sides: list[Tensor], w: Tensor
) -> tuple[Tensor, Tensor]:
    """Finds the k closest patches of each patch: values and indices [B,P,k], -inf and -1 where there are fewer."""
    k, (B, P) = problem.neighbours, w.shape
    flat = torch.arange(B * P, device=w.device).view(B, P)
    table = torch.full((B, P, B * P if k else 0), -torch.inf, dtype=w.dtype, device=w.device)
    for j, closer in zip(sides, closeness if k else ()):
        other = flat[j][:, None, :].expand(closer.shape)
        candidate = (w[j] > 0)[:, None, :] & (other != flat[:, :, None])  # a patch is not its own neighbour
        table.scatter_(2, other, torch.where(candidate, closer, -torch.inf))
    best = table.sort(dim=2, descending=True, stable=True)
    values, indices = best.values[:, :, :k], best.indices[:, :, :k]
    missing = k - values.shape[2]
    values, indices = F.pad(values, (0, missing), value=-torch.inf), F.pad(indices, (0, missing), value=-1)
    return values, torch.where(values > -torch.inf, indices, -1)


def cosines(codes: Tensor, prototypes: Tensor) -> Tensor:
    """Takes [H,B,P,Z] and [H,K,Z] to [H,B,P,K]."""
    dtype = accumulation_dtype(codes, prototypes)
    return unit_rows(codes.to(dtype)) @ unit_rows(prototypes.to(dtype))[:, None].mT


def probabilities(codes: Tensor, prototypes: Tensor, temperature: float | Tensor) -> Tensor:
    """Returns probs [H,B,P,K]."""
    return torch.softmax(cosines(codes, prototypes) / temperature, -1)


def data_term(codes: Tensor, student: Tensor, teacher: Tensor, patch_weight: Tensor | None) -> Tensor:
    """Returns the data term [H]."""
    labels = cosines(codes.detach(), teacher).argmax(-1)
    logits = cosines(codes.detach(), student)
    loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape)
    if patch_weight is None:
        return loss.mean((1, 2))
    return (loss * patch_weight).sum((1, 2)) / patch_weight.sum().clamp(min=torch.finfo(loss.dtype).tiny)


def loss(
    problem: Problem, codes: Tensor, student: Tensor, teacher: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns total [H], energy [H,T], data [H], distance [H,T] and mean [T]."""
    energy, distance, mean = smoothness(problem, probabilities(codes, teacher, temperature))
    data = data_term(codes, student, teacher, problem.patch_weight)
    return energy.sum(1) + data, energy, data, distance, mean


def assign(codes: Tensor, prototypes: Tensor, grid: tuple[int, int] | None, size: tuple[int, int] | None) -> Tensor:
    """Returns labels, int64 [B,P] or [B,H,W]: the argmax of cosines, to bilinearly upsampled codes with a grid."""
    codes = codes.to(accumulation_dtype(codes, prototypes))
    if grid is None:
        return cosines(codes[None], prototypes[None])[0].argmax(-1)
    planes = codes.mT.unflatten(-1, grid)  # [B,Z,h,w]
    fine = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    return cosines(fine.flatten(2).mT[None], prototypes[None])[0].argmax(-1).unflatten(-1, size)
