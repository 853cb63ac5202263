"""A picture at the scales of a head, and the features of a rectangle of its patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones import Backbone
from ..datasets.images import Resample, resize_short_side
from ..datasets.scaled import Scaled
from .tiles import Tile


class Views:
    """A picture uint8 [H,W,3] at one or more scales, of which the finest one defines the grid of patches.

    Args:
        scales: "fit" (the short side has `short_side` pixels), "native", or a factor such as "0.5".
        margin: pixels of context around every tile whose features are thrown away; rounded up to whole patches.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        scales: Sequence[str],
        backbone: Backbone,
        *,
        short_side: int,
        resample: Resample,
        margin: int,
    ):
        self.backbone, self.patch = backbone, backbone.patch
        self.border = -(-margin // self.patch)  # patches
        self.pictures = [_at_scale(pixels, scale, short_side, resample) for scale in scales]
        self.finest = max(self.pictures, key=lambda picture: picture.size)
        height, width = self.finest.size
        self.grid = h, w = -(-height // self.patch), -(-width // self.patch)
        H, W = pixels.shape[:2]
        covered = round(h * self.patch * H / height), round(w * self.patch * W / width)
        self.covered = max(H, covered[0]), max(W, covered[1])  # pixels of the picture under the grid, and padding

    def features(self, tile: Tile, mirror: bool = False) -> Tensor:
        """Compute the features [1,P,D] of a tile; with `mirror` those of its mirror image, mirrored back.

        Of several scales: unit rows side by side, each from as many pixels around the same centre, those of a coarser
        scale upsampled where they cover the tile.
        """
        parts = [self._features(picture, tile, mirror) for picture in self.pictures]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([F.normalize(part.float(), dim=-1, eps=1e-10) for part in parts], -1)

    def _features(self, picture: Scaled, tile: Tile, mirror: bool) -> Tensor:
        sides = (tile.rows, tile.columns)
        ratios = [here / finest for here, finest in zip(picture.size, self.finest.size)]
        starts = [
            round(self.patch * ((first + side / 2) * ratio - side / 2 - self.border))
            for first, side, ratio in zip((tile.top, tile.left), sides, ratios)
        ]
        height, width = ((side + 2 * self.border) * self.patch for side in sides)
        window = picture.window(starts[0], starts[1], height, width)
        pixels = torch.from_numpy(np.ascontiguousarray(window)).permute(2, 0, 1)[None]
        features, grid = self.backbone(pixels.flip(-1) if mirror else pixels)
        features = features.unflatten(1, grid)
        if mirror:
            features = features.flip(2)
        b = self.border
        features = features[:, b : b + tile.rows, b : b + tile.columns]
        if picture is not self.finest:
            features = spread(features.float(), ratios)
        return features.flatten(1, 2)


def spread(features: Tensor, ratios: Sequence[float]) -> Tensor:
    """Upsample the middle part of features [B,h,w,D], `ratios` of its height and width, to all of [B,h,w,D].

    Bilinear, with the neighbours beyond that part where there are some.
    """
    for axis, ratio in zip((1, 2), ratios):
        n = features.shape[axis]
        place = ((torch.arange(n, device=features.device) + 0.5 - n / 2) * ratio + n / 2 - 0.5).clamp(0, n - 1)
        low = place.long()
        high, share = (low + 1).clamp(max=n - 1), (place - low).view([-1, 1, 1] if axis == 1 else [-1, 1])
        features = torch.lerp(features.index_select(axis, low), features.index_select(axis, high), share)
    return features


def _at_scale(pixels: np.ndarray, scale: str, short_side: int, resample: Resample) -> Scaled:
    if scale == "fit":
        small = resize_short_side(pixels, short_side, resample)
        return Scaled(small, small.shape[:2], resample)
    return Scaled.by(pixels, 1.0 if scale == "native" else float(scale), resample)
