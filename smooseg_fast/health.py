"""Label-free figures: how alike patches are before training, and what the labels of a trained head look like."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import smooseg_kernels as sk

from .model import Heads

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Closeness:
    """Closeness W of a sample of patch pairs of one kind, and what a threshold b makes of it."""

    mean: float
    std: float
    quantiles: tuple[float, ...]  # at QUANTILES
    threshold: float  # b, absolute

    @property
    def force(self) -> float:
        """mean(W) - b: above 0 the average pair is pulled together, below 0 pushed apart."""
        return self.mean - self.threshold

    def line(self) -> str:
        spread = "  ".join(f"{100 * q:g} % {value:+.3f}" for q, value in zip(QUANTILES, self.quantiles))
        return f"mean {self.mean:+.3f}  std {self.std:.3f}  [{spread}]  threshold {self.threshold:+.3f}  net force {self.force:+.3f}"


def closeness(features: Tensor, thresholds: Sequence[float], relative: bool) -> tuple[Closeness, Closeness]:
    """(within, across) from a sample of features [B,P,D], B >= 2: each image with itself and with one half the sample away.

    Neighbours in a folder are often neighbours in time. At most 256 patches of each image are looked at.
    """
    f = features[:, :: -(-features.shape[1] // 256)].float()
    f = f / f.norm(dim=-1, keepdim=True).clamp(min=1e-10)
    return tuple(_closeness(f, partner, b, relative) for partner, b in zip((f, f.roll(len(f) // 2, 0)), thresholds))


def _closeness(f: Tensor, partner: Tensor, threshold: float, relative: bool) -> Closeness:
    cosines = f @ partner.mT
    mean = float(cosines.double().mean())
    w = (cosines - cosines.mean(2, keepdim=True) + mean).flatten()
    ordered = w.sort().values
    quantiles = tuple(float(ordered[min(len(ordered) - 1, int(q * len(ordered)))]) for q in QUANTILES)
    return Closeness(mean, float(w.std()), quantiles, threshold + mean if relative else threshold)


def warning(within: Closeness, across: Closeness) -> str | None:
    """Why labels may turn into kinds of images, or None."""
    if within.force * across.force >= 0:
        return None
    tendency = "pull an image's patches together and push different images apart: labels may turn into kinds of images in a long run"
    if within.force < 0:
        tendency = "push an image's patches apart and pull different images together"
    return (
        f"net forces differ in sign (within {within.force:+.3f}, across {across.force:+.3f}): on average they {tendency}; "
        "--granularity has no such tendency"
    )


@dataclass(frozen=True)
class Health:
    """Of the labels that a head gives to N unlabelled squares."""

    shares: tuple[float, ...]  # [K] of all patches
    perplexity: float  # exp(H(label)), the effective number of labels in use: 1 to K
    labels_per_image: float  # mean over images of exp(H(label | image))
    image_information: float  # I(image; label) / H(label): 0 when every image has the same mix, 1 when a label tells the image
    agreement: float  # share of patches that teacher and student label alike


@torch.no_grad()
def health(heads: Heads, batches: Iterable[Tensor]) -> list[Health]:
    """Of every head, from one pass over `batches` of features [B,P,D] on the heads' device."""
    H, K, _ = heads.student.shape
    counts, agree, total = [[] for _ in range(H)], [0] * H, 0
    for features in batches:
        every = heads.codes(features)
        total += every[0, ..., 0].numel()
        for h, codes in enumerate(every):
            labels = sk.assign(codes, heads.teacher[h])
            agree[h] += int((labels == sk.assign(codes, heads.student[h])).sum())
            seen = torch.zeros(len(labels), K, dtype=torch.int64, device=labels.device)
            counts[h].append(seen.scatter_add_(1, labels, torch.ones_like(labels)))
    return [_health(torch.cat(of_head).cpu().double(), same / total) for of_head, same in zip(counts, agree)]


def _health(counts: Tensor, agreement: float) -> Health:
    """counts [N,K] of the labels of each image."""
    per_image = counts / counts.sum(1, keepdim=True)
    shares = per_image.mean(0)
    whole, inside = float(entropy(shares)), entropy(per_image)
    return Health(
        shares=tuple(shares.tolist()),
        perplexity=math.exp(whole),
        labels_per_image=float(inside.exp().mean()),
        image_information=float((whole - inside.mean()) / whole) if whole > 1e-9 else 0.0,
        agreement=agreement,
    )


def entropy(p: Tensor) -> Tensor:
    """Of the last axis, in nats."""
    return -(p * p.clamp(min=1e-30).log()).sum(-1)
