"""Figures on labelled images that training never sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..datasets import Dataset
from ..features.store import FeatureStore
from ..measure.scores import Scores, hungarian
from ..segment.model import Head
from .confusion import LabelSquares, confusion_of, head_codes


@dataclass
class Validation:
    """Labelled images to measure on; training never sees them unless the dataset has no split.

    Several processes share the counting: all ask for the same figures in the same order.
    """

    dataset: Dataset
    store: FeatureStore
    labels: LabelSquares

    def confusion(self, head: Head) -> np.ndarray:
        """int64 [K,classes] pixels of every group in every class."""
        return self._count(head_codes(head, self.store), head.teacher)

    def kmeans(self, centres: Tensor) -> Scores:
        """Scores of plain k-means centres [K,D] on the same features, which any learning has to beat."""
        centres = self.labels.processes.all(centres.cpu())[0].to(centres.device)
        return hungarian(self._count(self.store.rows, centres))

    def _count(self, codes: Callable[[Tensor], Tensor], prototypes: Tensor) -> np.ndarray:
        return confusion_of(codes, prototypes, self.store.grid, self.labels, len(self.dataset.class_names))
