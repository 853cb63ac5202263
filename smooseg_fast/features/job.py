"""One extraction: which features are wanted, of which images, by which backbone, and what follows from that."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from ..datasets import Dataset
from ..datasets.images import MAX_PIXELS, Crops, ImageError, Resample, cut_squares, require_patch
from ..errors import UserError
from ..system.processes import ALONE, Processes
from ..system.progress import announced
from . import store
from .batches import default_batch
from .store import DamagedShard, Shard, read_shard

if TYPE_CHECKING:
    from ..backbones.base import Backbone

Square = tuple[tuple[int, int], np.ndarray]  # (top, left) at the squares' scale, and uint8 [size,size,3]


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Which features of a dataset are wanted, where they are kept and how they are made.

    Args:
        size: side of a square in pixels, a multiple of the backbone's patch.
        crops, resample: how `images.cut_squares` cuts squares out of an image.
        mirror: take the features of the mirrored squares, with the columns of the grid mirrored back.
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
    mirror: bool = False
    argument: str = "--size"
    cache: Path | str | None = None
    limit: int | None = None
    batch_size: int | None = None
    progress: bool = True
    processes: Processes = ALONE


@dataclass(frozen=True)
class Job:
    """An extraction with its options checked. UserError names the wrong one."""

    dataset: Dataset
    backbone: Backbone
    options: FeatureOptions

    def __post_init__(self) -> None:
        patch, size, argument = self.backbone.patch, self.options.size, self.options.argument
        if size < patch or size % patch:
            below, above = size // patch * patch, (size // patch + 1) * patch
            advice = f"{below} or {above}" if below > 0 else str(patch)
            raise UserError(f"{argument} {size}: not a multiple of the backbone's patch, {patch} pixels; take {advice}")
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size}: must be 1 or more")
        for flag, value, choices in (
            ("--crops", self.options.crops, get_args(Crops)),
            ("--resample", self.options.resample, get_args(Resample)),
        ):
            if value not in choices:
                raise UserError(f"{flag} {value}: unknown; take {' or '.join(choices)}")

    # choices that follow from the options

    @property
    def batch_size(self) -> int:
        """Squares that go through the backbone at once."""
        return default_batch(self.backbone.device) if self.options.batch_size is None else self.options.batch_size

    @cached_property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches of a square."""
        side = self.options.size // self.backbone.patch
        return side, side

    @property
    def square_bytes(self) -> int:
        """Bytes that the features of one square take on disk."""
        return 2 * self.grid[0] * self.grid[1] * self.backbone.dim

    @cached_property
    def rows_per_shard(self) -> int:
        return max(1, store.SHARD_BYTES // self.square_bytes)

    @cached_property
    def fingerprint(self) -> str:
        with announced(f"files      looking at {self.images} images of {self.dataset.name} for changes"):
            return self.dataset.fingerprint()

    def key(self) -> str:
        """Hash of everything that decides the features; precision and batch size decide their last bits."""
        options, backbone = self.options, self.backbone
        parts = [store.FORMAT, self.fingerprint, backbone.digest, options.size, options.crops, options.resample]
        parts += [options.mirror, backbone.precision, self.batch_size]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def describe(self) -> dict:
        """The store's meta.json, for people who find the folder and for `smooseg cache ls`."""
        options, backbone = self.options, self.backbone
        return dict(
            format=store.FORMAT,
            dataset=self.dataset.name,
            images=self.images,
            backbone=backbone.name,
            fingerprint=self.fingerprint,
            digest=backbone.digest,
            precision=backbone.precision,
            size=options.size,
            crops=options.crops,
            resample=options.resample,
            mirror=options.mirror,
            batch_size=self.batch_size,
            grid=self.grid,
            channels=backbone.dim,
        )

    def with_memory_of(self, shards: list[Shard]) -> Job:
        """This job with the batch size of the last of `shards`, which is smaller where memory was short before."""
        used = shards[-1].contents.batch if shards else 0
        return self._with_batch(min(self.batch_size, used or self.batch_size))

    def halved(self) -> Job:
        """This job with batches of half the size, after one did not fit.

        UserError when a single square does not fit.
        """
        if self.batch_size == 1:
            raise UserError(
                f"{self.options.argument} {self.options.size}: a single square does not fit into the memory of "
                f"{self.backbone.device}; take a smaller size, or --device cpu"
            )
        return self._with_batch(self.batch_size // 2)

    def _with_batch(self, batch_size: int) -> Job:
        return replace(self, options=replace(self.options, batch_size=batch_size))

    # shards and images

    def read(self, path: Path, position: tuple[int, int]) -> Shard | None:
        """The shard at `path`, None when there is none. DamagedShard unless this job would write it at `position`."""
        shard = read_shard(path)
        expected = position, self.grid, self.backbone.dim
        if shard is not None and (shard.contents.start, shard.contents.grid, shard.features.shape[2]) != expected:
            raise DamagedShard("it belongs elsewhere")
        return shard

    @property
    def images(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self.dataset.names[index]

    def squares(self, index: int) -> list[Square] | ImageError:
        """The squares of image number `index`, or the reason why there are none. Safe in any thread."""
        name, size = self.name(index), self.options.size
        try:
            image = self.dataset.image(index)
            require_patch(image, self.backbone.patch, name)
        except ImageError as error:
            return error
        height, width = image.shape[:2]
        try:
            # with its short side at `size` pixels, a long strip would be larger than any image may be
            if height * width * size**2 <= MAX_PIXELS * min(height, width) ** 2:
                return cut_squares(image, size, self.options.crops, self.options.resample)
        except ImageError as error:
            return error
        except MemoryError:
            pass
        reason = f"{width} x {height} pixels, too many for the memory with {size} on the short side"
        return ImageError(name, reason, "cut it into tiles")
