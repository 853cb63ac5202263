"""From codes to groups: the prototypes of a head, each a group or merged into groups by the tree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smooseg_kernels.rows import unit_rows

from .model import Head


@dataclass(frozen=True)
class Grouping:
    """A rule that labels codes: upsample `scores` of them, and take the best of `prototypes` by cosine.

    groups: the group of every prototype of the head, int64 [K]; None where each is a group.
    """

    head: Head
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.head.teacher) if self.groups is None else int(self.groups.max()) + 1

    @property
    def prototypes(self) -> Tensor:
        """[N,Z] for codes, or [N,N] for the scores of N merged groups."""
        return self.head.teacher if self.groups is None else torch.eye(len(self), device=self.head.teacher.device)

    def scores(self, codes: Tensor) -> Tensor:
        """Codes [...,Z] as they are; where prototypes are merged, the best cosine in each group [...,N].

        The sum of their probabilities in place of the best one gives groups of many prototypes an advantage: 24.8
        instead of 26.5 mIoU (mean of three sets and of 2 to 16 groups).
        """
        if self.groups is None:
            return codes
        return self.merged(unit_rows(codes.float()) @ unit_rows(self.head.teacher.float()).mT)

    def merged(self, cosines: Tensor) -> Tensor:
        """The best of the cosines [...,K] with all prototypes in each group [...,N]."""
        return torch.stack([cosines[..., np.flatnonzero(self.groups == k)].amax(-1) for k in range(len(self))], -1)
