"""Read rows of a feature store in batches, evenly spaced, or as a random sample of their patches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .store import FeatureStore

BATCH = 16  # rows


class Batch(NamedTuple):
    features: Tensor  # [n,P,D]
    valid: Tensor | None = None  # bool [n,P], which patches show data; None where the whole store does


def batches(store: FeatureStore, device: torch.device, limit: int | None = None) -> Iterator[Batch]:
    """Read all rows, or `limit` rows evenly spaced over the store, part by part on `device`."""
    rows = evenly_spaced(len(store), len(store) if limit is None else limit)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        valid = store.valid(part)
        yield Batch(store.rows(part).to(device), None if valid is None else valid.to(device))


def evenly_spaced(total: int, count: int) -> Tensor:
    """Return `count` (at most `total`) integers evenly spaced over 0 .. total - 1."""
    count = min(count, total)
    return torch.arange(count) * total // count


def sample_patches(store: FeatureStore, seed: int, images: int = 128, patches: int = 40_000) -> Tensor:
    """Draw random patches of evenly spaced rows -> [N,D], for k-means and the singular vectors of the start.

    Patches without data are not drawn, so rows that have some may give fewer.
    """
    rows = evenly_spaced(len(store), images)
    patches_per_row = min(store.P, max(1, patches // len(rows)))
    g = torch.Generator().manual_seed(seed)
    sample = []
    for row in rows.tolist():
        order, valid = torch.randperm(store.P, generator=g), store.valid([row])
        order = order if valid is None else order[valid[0, order]]
        sample.append(store.rows([row])[0, order[:patches_per_row]])
    return torch.cat(sample)
