"""Rows of a feature store: evenly spaced, in batches, or a random sample of their patches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .store import FeatureStore

BATCH = 16


def batches(store: FeatureStore, device: torch.device, limit: int | None = None) -> Iterator[Tensor]:
    """Features [n,P,D] of all rows, or of `limit` rows evenly spaced over the store."""
    rows = spread(len(store), len(store) if limit is None else limit)
    for start in range(0, len(rows), BATCH):
        yield store.rows(rows[start : start + BATCH]).to(device)


def spread(total: int, count: int) -> Tensor:
    """`count` (at most `total`) numbers evenly spaced over 0 .. total - 1."""
    count = min(count, total)
    return torch.arange(count) * total // count


def sample_patches(store: FeatureStore, seed: int, images: int = 128, patches: int = 40_000) -> Tensor:
    """[N,D] random patches of evenly spaced rows: what k-means and the start's singular vectors are fitted to."""
    rows = spread(len(store), images)
    each = min(store.P, max(1, patches // len(rows)))
    g = torch.Generator().manual_seed(seed)
    return torch.cat([store.rows([int(row)])[0, torch.randperm(store.P, generator=g)[:each]] for row in rows])
