"""`A+B`: the features of several backbones side by side, such as efficientnet-lite0+filterbank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .base import Backbone, digest_of

FIRST = 0.9  # share of the first backbone in the squared length of a row; the others have the rest in equal parts


class JoinedBackbone(Backbone):
    """Rows of every backbone side by side, so that a cosine of joined rows is a weighted mean of theirs.

    The first one leads, with nine tenths of the weight: with equal weights, EfficientNet-lite0 and the built-in
    features are worse than either alone on street scenes. The grid is that of the coarsest backbone. Finer ones are
    averaged over its patches, which are whole multiples of theirs.
    """

    def __init__(self, parts: Sequence[Backbone]) -> None:
        patches = [part.patch for part in parts]
        patch = max(patches)
        if any(patch % other for other in patches):
            raise UserError(f"patches of {' and '.join(map(str, patches))} pixels do not fit into each other")
        name, digest = (
            "+".join(part.name for part in parts),
            digest_of(f"joined-1 {FIRST}", *(part.digest for part in parts)),
        )
        super().__init__(
            name=name, digest=digest, patch=patch, dim=sum(part.dim for part in parts), device=parts[0].device
        )
        self.parts = parts
        self.licence = " and ".join(dict.fromkeys(part.licence for part in parts))
        precisions = list(dict.fromkeys(part.precision for part in parts))
        self.precision = "+".join(precisions)
        self.sizes = max(part.sizes for part in parts)

    def extract(self, images: Tensor) -> Tensor:
        grid = [side // self.patch for side in images.shape[2:]]
        shares = [FIRST, *[(1 - FIRST) / (len(self.parts) - 1)] * (len(self.parts) - 1)]
        rows = [
            self._unit_rows(part, images, grid) * math.sqrt(share * self.dim) for part, share in zip(self.parts, shares)
        ]
        return torch.cat(rows, -1)

    def _unit_rows(self, part: Backbone, images: Tensor, grid: list[int]) -> Tensor:
        """[B,P,D] on the common grid, float32."""
        rows, finer = F.normalize(part.extract(images).float(), dim=-1), self.patch // part.patch
        if finer == 1:
            return rows
        maps = F.avg_pool2d(rows.mT.unflatten(2, [side * finer for side in grid]), finer)
        return F.normalize(maps.flatten(2).mT, dim=-1)
