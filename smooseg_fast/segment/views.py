"""A picture at the scales of a head, and the features of a rectangle of its patches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..backbones import Backbone
from ..backbones.scales import side_by_side
from ..config import FIT
from ..datasets.cutting import Cutting, neutral, valid_patches
from ..datasets.images import ImageError, resize_short_side
from ..datasets.reading import Picture
from ..datasets.scaled import Scaled
from .tiles import Tile

MOST = 8  # patches, the largest step between tiles that is taken for the sake of further scales


class Views:
    """A picture of `shape` (H, W) at one or more scales. Its `grid` (h, w) of patches lies on the first, the finest.

    The last rows and columns of patches may reach beyond the picture, so that the grid covers the `size` (height,
    width), at least (H, W), in pixels of the picture. `valid` bool [H,W] tells which pixels are measurements, and
    `patches` bool [h,w] which patches then count; both are None where all do.

    Args:
        cutting: scales, resampling and margin; for the scale "fit", `size` is the picture's short side there, for the
            others the least one.
    """

    def __init__(self, picture: Picture, cutting: Cutting, backbone: Backbone):
        pixels, self.valid = neutral(picture), picture.valid
        self.backbone, self.patch = backbone, backbone.patch
        self.border = -(-cutting.margin // self.patch)  # patches; training has whole ones
        if cutting.scale == (FIT,):
            small = resize_short_side(pixels, cutting.size, cutting.resample)
            first = Scaled(small, small.shape[:2], cutting.resample)
        else:
            first = cutting.scaled(pixels)
        self.ratios = cutting.ratios()
        self.pictures = [first, *(Scaled.of(pixels, first, ratio) for ratio in self.ratios[1:])]
        (H, W), (height, width) = pixels.shape[:2], first.size
        self.shape = H, W
        # tiles that begin at multiples of it have their patches of every scale at the same places
        self.step = next((n for n in range(1, MOST + 1) if all(_whole(n * ratio) for ratio in self.ratios)), 1)
        h, w = (-(-side // (self.patch * self.step)) * self.step for side in (height, width))
        self.grid = h, w
        self.size = max(H, round(h * self.patch * H / height)), max(W, round(w * self.patch * W / width))
        self.patches = None if self.valid is None else self._with_data(Scaled(self.valid, first.size, "nearest"))

    def features(self, tile: Tile, mirror: bool = False) -> Tensor:
        """Compute the features [1,P,D] of a tile as those of a square are; with `mirror`, those of its mirror image,
        mirrored back.

        Each further scale sees as many pixels about the same centre.
        """
        maps = []
        for picture, ratio in zip(self.pictures, self.ratios):
            top, left = (
                round(((start + n / 2) * ratio - n / 2 - self.border) * self.patch)
                for start, n in ((tile.top, tile.rows), (tile.left, tile.columns))
            )
            height, width = ((n + 2 * self.border) * self.patch for n in (tile.rows, tile.columns))
            window = np.ascontiguousarray(picture.window(top, left, height, width))
            pixels = torch.from_numpy(window).permute(2, 0, 1)[None]
            features, grid = self.backbone(pixels.flip(-1) if mirror else pixels)
            if not torch.stack([features.amin(), features.amax()]).isfinite().all():  # NaN where any feature is
                advice = "take it out, or give another --backbone-precision or --device"
                raise ImageError("image", f"{self.backbone.name} gave NaN or infinity for it", advice)
            features = features.unflatten(1, grid)
            maps.append(features.flip(2) if mirror else features)
        return side_by_side(maps, self.ratios, (tile.rows, tile.columns))

    def _with_data(self, mask: Scaled) -> np.ndarray:
        """Which patches of the grid count, where `mask` says which pixels are measurements, at the first scale."""
        (h, w), patch = self.grid, self.patch
        rows = (mask.window(row * patch, 0, patch, w * patch) for row in range(h))
        return np.concatenate([valid_patches(row, patch) for row in rows])


def _whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-6
