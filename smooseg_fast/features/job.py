"""One extraction: which features are wanted, of which images, by which backbone, and what follows from that."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..config import FIT, Crops, scale_factor
from ..datasets import Dataset
from ..datasets.cutting import Cut, Cutting, tiles_of_an_image, valid_patches
from ..datasets.images import MAX_PIXELS, ImageError, Resample, require_patch
from ..datasets.reading import Picture
from ..errors import UserError
from ..system.processes import ALONE, Processes
from ..system.progress import announced
from . import store
from .batches import Square
from .cachefolder import CacheFolder, StoreFolder

if TYPE_CHECKING:
    from ..backbones.base import Backbone

CPU_BATCH, CARD_BATCH = 16, 64  # squares: a CPU is as fast with 4, a card needs many
CPU_SIDE = 320  # larger squares go in smaller batches: 16 of 560 pixels take EfficientNet 1.3 GB
TILES_BYTES = 128 * 2**20  # of features that the tiles of one image may take, for they are in memory together
SQUARES = {"center": 1, "slide": 4, "five": 5}  # that an image is assumed to have when images are dealt to shards
# do not enter a key: stores from before them are as good
PLAIN = {"scale": [FIT], "margin": 0, "most": None, "exact": False, "shift": [0, 0]}


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Which features of a dataset are wanted, where they are kept and how they are made.

    Args:
        size: side of a square in pixels, a multiple of the backbone's patch.
        crops, resample, scale, margin: how squares are cut out of an image, see `cutting.Cutting`; the margin is a
            multiple of the backbone's patch.
        most: tiles of an image; None takes as many as suit the number of images.
        mirror: take the features of the mirrored squares, with the columns of the grid mirrored back.
        exact: keep features in fp32, in twice the room, as the published protocol computes with them.
        shift: pixels (down, right) by which the squares are moved, see `cutting.Cutting`; `backbones.shifts` has those
            that make up a finer grid.
        argument: the flag that sets `size`, for error messages.
        cache: folder of all feature stores; None is $XDG_CACHE_HOME/smooseg_fast or ~/.cache/smooseg_fast.
        limit: bytes that `cache` may hold; None for no limit.
        batch_size: squares that go through the backbone at once; None takes 16 on a CPU and 64 on a card.
        progress: show bars and the pace on stderr.
        processes: they see one file system and share the work.
    """

    size: int
    crops: Crops = "center"
    resample: Resample = "nearest"
    scale: tuple[str, ...] = (FIT,)
    margin: int = 0
    most: int | None = None
    mirror: bool = False
    exact: bool = False
    shift: tuple[int, int] = (0, 0)
    argument: str = "--size"
    cache: Path | str | None = None
    limit: int | None = None
    batch_size: int | None = None
    progress: bool = True
    processes: Processes = ALONE


class Tiled(NamedTuple):
    """How an image was cut into tiles, or at a scale other than "fit"."""

    taken: int  # squares
    grid: int  # squares that would cover all of the image that shows data
    enlarged: bool  # because its short side was below `size` at that scale


@dataclass(frozen=True)
class Job:
    """An extraction whose size fits the backbone, or UserError. Shard n holds the squares of `images_of(n)`.

    `tiled` collects how images were cut, and `left_out` how many squares of each show no data, in any order.
    """

    dataset: Dataset
    backbone: Backbone
    options: FeatureOptions
    tiled: list[Tiled] = field(default_factory=list, compare=False)
    left_out: list[int] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        patch, size, argument = self.backbone.patch, self.options.size, self.options.argument
        if size < patch or size % patch:
            below, above = size // patch * patch, (size // patch + 1) * patch
            advice = f"{below} or {above}" if below > 0 else str(patch)
            raise UserError(f"{argument} {size}: not a multiple of the backbone's patch, {patch} pixels; take {advice}")
        if margin := self.options.margin % patch:
            below = self.options.margin - margin
            advice = f"{below} or {below + patch}"
            raise UserError(
                f"--margin {self.options.margin}: not a multiple of the backbone's patch, {patch} pixels; take {advice}"
            )

    @property
    def batch_size(self) -> int:
        """Squares that go through the backbone at once; by default the same on every device of a kind."""
        if self.options.batch_size is not None:
            return self.options.batch_size
        if self.backbone.device.type != "cpu":
            return CARD_BATCH
        fewer = int(CPU_BATCH * CPU_SIDE**2 / (len(self.options.scale) * self.cutting.side**2))
        return max(1, min(CPU_BATCH, fewer))

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches of a square."""
        side = self.options.size // self.backbone.patch
        return side, side

    @cached_property
    def cutting(self) -> Cutting:
        options = self.options
        most = options.most
        if most is None and options.crops == "tiles":
            most = min(tiles_of_an_image(len(self.dataset)), max(1, TILES_BYTES // self.square_bytes))
        return Cutting(
            size=options.size,
            crops=options.crops,
            resample=options.resample,
            scale=options.scale,
            margin=options.margin,
            most=most,
            shift=options.shift,
        )

    @property
    def channels(self) -> int:
        """D of a feature row."""
        return self.backbone.dim * len(self.options.scale)

    @property
    def square_bytes(self) -> int:
        """Bytes that the features of one square take on disk."""
        return (4 if self.options.exact else 2) * self.grid[0] * self.grid[1] * self.channels

    @cached_property
    def images_per_shard(self) -> int:
        squares = self.cutting.most or SQUARES[self.options.crops]
        return max(1, store.SHARD_BYTES // (self.square_bytes * squares))

    @property
    def shards(self) -> int:
        """How many shards the store has."""
        return -(-len(self.dataset) // self.images_per_shard)

    def images_of(self, number: int) -> range:
        """Numbers of the images of shard `number`."""
        return range(len(self.dataset))[number * self.images_per_shard :][: self.images_per_shard]

    @cached_property
    def fingerprint(self) -> str:
        with announced(f"files      looking at {len(self.dataset)} images of {self.dataset.name} for changes"):
            return self.dataset.fingerprint()

    def key(self) -> str:
        """Hash of everything that decides the features; precision and batch size decide their last bits."""
        skip = (("dataset", self.dataset.name), ("backbone", self.backbone.name), *PLAIN.items())
        deciding = {name: value for name, value in self.describe().items() if (name, value) not in skip}
        return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:32]

    @cached_property
    def folder(self) -> StoreFolder:
        """Where the features are, or will be."""
        return StoreFolder(CacheFolder(self.options.cache).path / self.key())

    @property
    def on_disk(self) -> bool:
        """Whether all features are on disk, sound or damaged."""
        return self.folder.kept(self.shards) == self.shards

    def describe(self) -> dict:
        """The store's meta.json, for people who find the folder and for `smooseg cache ls`."""
        options, backbone = self.options, self.backbone
        return dict(
            format=store.FORMAT,
            dataset=self.dataset.name,
            images=len(self.dataset),
            shards=self.shards,
            backbone=backbone.name,
            files=self.fingerprint,
            weights=backbone.digest,
            precision=backbone.precision,
            size=options.size,
            crops=options.crops,
            resample=options.resample,
            scale=list(options.scale),
            margin=options.margin,
            most=self.cutting.most,
            mirror=options.mirror,
            exact=options.exact,
            shift=list(options.shift),
            reading=str(self.dataset.reading),
            batch=self.batch_size,
            grid=self.grid,
            channels=self.channels,
        )

    def squares(self, index: int) -> list[Square] | ImageError:
        """The squares of image number `index` that show data, or the reason why there are none. Safe in any thread."""
        name, size = self.dataset.names[index], self.options.size
        try:
            picture = self.dataset.picture(index)
            image = picture.pixels
            require_patch(image, self.backbone.patch, name)
            height, width = image.shape[:2]
            bounded = self.options.crops == "tiles" or self.options.scale != (FIT,)
            # with its short side at `size` pixels, a long strip would be larger than any image may be
            if bounded or height * width * size**2 <= MAX_PIXELS * min(height, width) ** 2:
                with contextlib.suppress(MemoryError):
                    cut = self.cutting.squares(picture)
                    squares = self._with_data(name, cut)
                    if bounded and not isinstance(squares, ImageError):
                        self.tiled.append(self._tiled(len(cut), picture))
                    return squares
        except ImageError as error:
            return error
        reason = f"{width} x {height} pixels, too many for the memory with {size} on the short side"
        return ImageError(name, reason, "cut it into tiles")

    def _with_data(self, name: str, cut: list[Cut]) -> list[Square] | ImageError:
        """The squares of an image in which some patch shows data."""
        squares = []
        for place, pixels, valid in cut:
            patches = None if valid is None or valid.all() else valid_patches(valid, self.backbone.patch).ravel()
            if patches is None or patches.any():
                squares.append(Square(name, place, pixels, patches))
        if not squares:
            return ImageError(
                name, "shows no data: every pixel that would be used is no-data or transparent", "take it out"
            )
        if len(squares) < len(cut):
            self.left_out.append(len(cut) - len(squares))
        return squares

    def _tiled(self, taken: int, picture: Picture) -> Tiled:
        image, valid = picture
        height, width = self.cutting.scaled(image).size
        grid = self.cutting.grid(height, width)
        if valid is not None:
            with_data = self.cutting.grid(height, width, self.cutting.mask(valid))
            self.left_out.append(len(grid) - len(with_data))
            grid = with_data
        factor = scale_factor(self.options.scale[0])
        enlarged = factor is not None and min(height, width) > max(1, round(min(image.shape[:2]) * factor))
        return Tiled(taken, len(grid), enlarged)
