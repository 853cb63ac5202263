"""Score how well the borders of a segmentation follow those of the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets import IGNORE

TOLERANCE = 0.0075  # of the diagonal, as in the Berkeley benchmark (Martin, Fowlkes and Malik, PAMI 26:530, 2004)


@dataclass
class BoundaryCounts:
    """Counts of border pixels over any number of pictures, and the F-measure that they give.

    A border pixel differs from its right or lower neighbour. It is found when the other picture has one no farther than
    `TOLERANCE` of the diagonal (at least one pixel), measured along the longer axis. Each may be found by many: unlike
    the Berkeley benchmark, pixels are not matched one to one.
    """

    predicted: int = 0
    predicted_near: int = 0  # of these, near a border of the truth
    true: int = 0
    true_near: int = 0  # of these, near a predicted border

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count pictures: predicted and truth, integers [B,H,W]. Borders with pixels of truth 255 are left out."""
        known = (truth != IGNORE).float()
        known = -F.max_pool2d(-known[:, None], 3, stride=1, padding=1)[:, 0] > 0
        radius = max(1, round(TOLERANCE * (truth.shape[-1] ** 2 + truth.shape[-2] ** 2) ** 0.5))
        borders = [borders_of(labels) & known for labels in (predicted, truth)]
        near = [F.max_pool2d(border[:, None].float(), 2 * radius + 1, 1, radius)[:, 0] > 0 for border in borders]
        self.predicted += int(borders[0].sum())
        self.predicted_near += int((borders[0] & near[1]).sum())
        self.true += int(borders[1].sum())
        self.true_near += int((borders[1] & near[0]).sum())

    @property
    def f_measure(self) -> float:
        """The harmonic mean of precision and recall, 0..1; nan where the truth has no border."""
        if not self.true:
            return float("nan")
        if not self.predicted_near or not self.true_near:
            return 0.0
        precision, recall = self.predicted_near / self.predicted, self.true_near / self.true
        return 2 * precision * recall / (precision + recall)


def borders_of(labels: Tensor) -> Tensor:
    """Whether a pixel differs from its right or lower neighbour: integers [B,H,W] -> bool [B,H,W]."""
    borders = torch.zeros_like(labels, dtype=torch.bool)
    borders[:, :, :-1] |= labels[:, :, :-1] != labels[:, :, 1:]
    borders[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return borders
