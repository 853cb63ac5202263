"""A picture at the scales of a head, and the features of a rectangle of its cells."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..backbones import Backbone
from ..backbones.scales import side_by_side
from ..backbones.shifts import density, offsets
from ..backbones.upsampler import Upsampler
from ..config import FIT
from ..datasets.cutting import Cutting, neutral, valid_patches
from ..datasets.images import ImageError, resize_short_side
from ..datasets.raster import View
from ..datasets.reading import Picture
from ..datasets.scaled import Scaled
from ..errors import UserError
from .tiles import Tile

Place = tuple[int, int]  # rows and columns
MOST = 8  # patches, the largest step between tiles that is taken for the sake of further scales


class Views:
    """A picture of `shape` (H, W) at one or more scales. Its `grid` (h, w) of cells lies on the first, the finest.

    A cell is a patch, or one of the parts [density,density] of a patch that several shifts or an upsampler tell apart.
    The last rows and columns of patches may reach beyond the picture, so that the grid covers the `size` (height,
    width), at least (H, W), in pixels of the picture. `valid` bool [H,W] tells which pixels are measurements, and
    `patches` bool [h,w] which cells then count; both are None where all do.

    Args:
        cutting: scales, resampling and margin; for the scale "fit", `size` is the picture's short side there, for the
            others the least one.
        shifts: how often the picture is seen, each time moved by half a patch; see `backbones.shifts`.
        upsampler: refines the features of a tile; needs `shifts` of 1.
    """

    def __init__(
        self,
        picture: Picture,
        cutting: Cutting,
        backbone: Backbone,
        shifts: int = 1,
        upsampler: Upsampler | None = None,
    ):
        if upsampler is not None and shifts != 1:
            raise UserError(f"--shifts {shifts}: --upsampler gives a finer grid already; give one of the two")
        self.offsets, self.upsampler = offsets(shifts, backbone.patch), upsampler
        self.density = density(shifts) if upsampler is None else upsampler.factor
        pixels, self.valid = neutral(picture), picture.valid
        self.backbone, self.patch = backbone, backbone.patch
        self.border = -(-cutting.margin // self.patch)  # patches; training has whole ones
        if cutting.scale == (FIT,) and (cutting.resample == "nearest" or not isinstance(pixels, View)):
            small = resize_short_side(pixels, cutting.size, cutting.resample)
            first = Scaled(small, small.shape[:2], cutting.resample)
        else:
            first = cutting.scaled(pixels)
        self.ratios = cutting.ratios()
        self.pictures = [first, *(Scaled.of(pixels, first, ratio) for ratio in self.ratios[1:])]
        (H, W), (height, width) = pixels.shape[:2], first.size
        self.shape = H, W
        # tiles that begin at multiples of it have their patches of every scale at the same places
        step = next((n for n in range(1, MOST + 1) if all(_whole(n * ratio) for ratio in self.ratios)), 1)
        h, w = (-(-side // (self.patch * step)) * step for side in (height, width))
        self.step, self.grid = step * self.density, (h * self.density, w * self.density)
        self.size = max(H, round(h * self.patch * H / height)), max(W, round(w * self.patch * W / width))
        self.patches = None if self.valid is None else self._with_data(Scaled(self.valid, first.size, "nearest"))

    def map_of(self, tile: Tile) -> tuple[int, int]:
        """Rows and columns of the features of a tile: of cells with an upsampler, else of patches."""
        n = self.density if self.upsampler is None else 1
        return tile.rows // n, tile.columns // n

    def features(self, tile: Tile, mirror: bool = False) -> Tensor:
        """Compute the features [n,P,D] of a tile from n shifts as those of a square are; with `mirror`, those of its
        mirror image, mirrored back. The patches of a tile, which begins and ends with one, are in row-major order.

        Each further scale sees as many pixels about the same centre. On a CPU shifts take turns, which needs least
        memory and no more time; elsewhere they are one batch.
        """
        n = self.density
        place, grid = (tile.top // n, tile.left // n), (tile.rows // n, tile.columns // n)
        maps = [self._map(picture, ratio, place, grid, mirror) for picture, ratio in zip(self.pictures, self.ratios)]
        features = side_by_side(maps, self.ratios, grid)
        if self.upsampler is None:
            return features
        (height, width), (top, left) = (tuple(self.patch * side for side in sides) for sides in (grid, place))
        return self.upsampler(features.unflatten(1, grid), self.pictures[0].window(top, left, height, width))

    def _map(self, picture: Scaled, ratio: float, place: Place, grid: Place, mirror: bool) -> Tensor:
        """The features [n,h,w,D] of `grid` patches and a border around them, at one scale, from `place` on."""
        height, width = ((side + 2 * self.border) * self.patch for side in grid)
        windows = []
        for offset in self.offsets:
            top, left = (
                round(((start + side / 2) * ratio - side / 2 - self.border) * self.patch + moved * ratio)
                for start, side, moved in zip(place, grid, offset)
            )
            windows.append(torch.from_numpy(np.ascontiguousarray(picture.window(top, left, height, width))))
        pixels = torch.stack(windows).permute(0, 3, 1, 2)
        batch = 1 if self.backbone.device.type == "cpu" else len(pixels)
        parts, sides = zip(*map(self.backbone, (pixels.flip(-1) if mirror else pixels).split(batch)))
        features = torch.cat(parts).unflatten(1, sides[0])
        if not torch.stack([features.amin(), features.amax()]).isfinite().all():  # NaN where any feature is
            advice = "take it out, or give another --backbone-precision or --device"
            raise ImageError("image", f"{self.backbone.name} gave NaN or infinity for it", advice)
        return features.flip(2) if mirror else features

    def _with_data(self, mask: Scaled) -> np.ndarray:
        """Which cells of the grid count, those of patches that do, where `mask` says which pixels are measurements, at
        the first scale."""
        n, patch = self.density, self.patch
        h, w = (side // n for side in self.grid)
        rows = (mask.window(row * patch, 0, patch, w * patch) for row in range(h))
        return np.concatenate([valid_patches(row, patch) for row in rows]).repeat(n, 0).repeat(n, 1)


def _whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-6
