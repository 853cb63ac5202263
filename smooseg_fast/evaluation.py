"""Cached features and labels -> confusion counts over a whole set, of a trained head or of plain k-means."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import smooseg_kernels as sk

from .datasets import Dataset
from .errors import UserError
from .features.store import FeatureStore
from .images import cut_squares
from .model import Head
from .processes import ALONE, Processes
from .segmenter import project

BATCH = 16


def label_squares(dataset: Dataset, store: FeatureStore, size: int) -> np.ndarray:
    """uint8 [N,size,size]: the label of each row of a store of central squares, 255 where nobody labelled.

    UserError when a label does not fit its image, or no image of the set has one.
    """
    places = {name: index for index, name in enumerate(dataset.names)}
    labels = np.full((len(store), size, size), 255, np.uint8)
    found = 0
    for row, name in enumerate(store.names):
        label = dataset.label(places[name])
        if label is not None:
            labels[row] = cut_squares(label, size, "center")[0][1]
            found += 1
    if not found:
        raise UserError(f"--data: none of the {len(store)} images of {dataset.name} has a label")
    return labels


def confusion_of(
    codes: Callable[[Tensor], Tensor],
    rows: int,
    prototypes: Tensor,
    grid: tuple[int, int],
    labels: np.ndarray,
    classes: int,
    processes: Processes = ALONE,
) -> np.ndarray:
    """int64 [K,classes] over all labelled pixels. `codes` gives [n,P,Z] of the rows numbered by an int64 [n].

    Several processes count every so many batches each, and all get the sum, which is that of one process to the last pixel.
    """
    counts = torch.zeros(len(prototypes), classes, dtype=torch.int64)
    for start in range(processes.rank * BATCH, rows, processes.size * BATCH):
        index = torch.arange(start, min(start + BATCH, rows))
        truth = torch.from_numpy(labels[start : start + BATCH]).to(prototypes.device)
        _, part = sk.assign(codes(index), prototypes, grid=grid, size=truth.shape[1:], labels=truth, classes=classes)
        counts += part.cpu()
    return processes.sum(counts).numpy()


def head_codes(head: Head, store: FeatureStore, mirrored: FeatureStore | None = None) -> Callable[[Tensor], Tensor]:
    """Codes of a store's rows; with a store of the mirrored squares their average, as in the paper."""
    device = head.teacher.device

    def codes(index: Tensor) -> Tensor:
        found = project(head, store.rows(index).to(device))
        return found if mirrored is None else (found + project(head, mirrored.rows(index).to(device))) / 2

    return codes


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
