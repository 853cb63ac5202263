"""Read rows of a feature store in batches, evenly spaced, or as a random sample of their patches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .store import FeatureStore

BATCH = 16  # rows


def batches(store: FeatureStore, device: torch.device, limit: int | None = None) -> Iterator[Tensor]:
    """Read all rows, or `limit` rows evenly spaced over the store -> parts [n,P,D] on `device`."""
    rows = evenly_spaced(len(store), len(store) if limit is None else limit)
    for start in range(0, len(rows), BATCH):
        yield store.rows(rows[start : start + BATCH]).to(device)


def evenly_spaced(total: int, count: int) -> Tensor:
    """Return `count` (at most `total`) integers evenly spaced over 0 .. total - 1."""
    count = min(count, total)
    return torch.arange(count) * total // count


def sample_patches(store: FeatureStore, seed: int, images: int = 128, patches: int = 40_000) -> Tensor:
    """Draw random patches of evenly spaced rows -> [N,D], for k-means and the singular vectors of the start."""
    rows = evenly_spaced(len(store), images)
    patches_per_row = min(store.P, max(1, patches // len(rows)))
    g = torch.Generator().manual_seed(seed)
    return torch.cat(
        [store.rows([int(row)])[0, torch.randperm(store.P, generator=g)[:patches_per_row]] for row in rows]
    )
