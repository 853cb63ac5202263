"""The settings of one extraction, checked, and what follows from them."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from ..datasets import Dataset, reading
from ..datasets.images import MAX_PIXELS, Crops, ImageError, Resample, cut_squares, require_patch
from ..errors import UserError
from ..system.processes import ALONE, Processes
from . import store
from .batches import default_batch
from .store import DamagedShard, Shard, read_shard
from .tally import Tally

if TYPE_CHECKING:
    from ..backbones.base import Backbone


@dataclass(frozen=True)
class Job:
    """The settings of one extraction, checked, and what follows from them."""

    dataset: Dataset
    backbone: Backbone
    size: int
    crops: Crops
    resample: Resample
    batch_size: int
    mirror: bool
    argument: str
    processes: Processes
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        patch = self.backbone.patch
        if self.size < patch or self.size % patch:
            below, above = self.size // patch * patch, (self.size // patch + 1) * patch
            advice = f"{below} or {above}" if below > 0 else str(patch)
            raise UserError(
                f"{self.argument} {self.size}: not a multiple of the backbone's patch, {patch} pixels; take {advice}"
            )
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size}: must be 1 or more")
        for argument, value, kinds in (
            ("--crops", self.crops, get_args(Crops)),
            ("--resample", self.resample, get_args(Resample)),
        ):
            if value not in kinds:
                raise UserError(f"{argument} {value}: unknown; take {' or '.join(kinds)}")

    @cached_property
    def grid(self) -> tuple[int, int]:
        side = self.size // self.backbone.patch
        return side, side

    @cached_property
    def rows_per_shard(self) -> int:
        return max(1, store.SHARD_BYTES // (2 * self.grid[0] * self.grid[1] * self.backbone.dim))

    @cached_property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def key(self) -> str:
        """What the features depend on, hashed; on precision and batch size they do in their last bits."""
        parts = [
            store.FORMAT,
            self.fingerprint,
            self.backbone.digest,
            self.size,
            self.crops,
            self.resample,
            self.mirror,
        ]
        parts += [self.backbone.precision, self.batch_size]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def stored(self, path: Path, position: tuple[int, int]) -> Shard | None:
        """The shard at `path`, None when there is none; DamagedShard unless it is the one that this job would make at `position`."""
        shard = read_shard(path)
        wanted = position, self.grid, self.backbone.dim
        if shard is not None and (shard.contents.start, shard.contents.grid, shard.features.shape[2]) != wanted:
            raise DamagedShard("it belongs elsewhere")
        return shard

    def describe(self) -> dict:
        """For people who find the folder, and `python -m smooseg_fast.cache ls`."""
        made = dict(
            format=store.FORMAT, dataset=self.dataset.name, images=len(self.dataset), backbone=self.backbone.name
        )
        settings = dict(
            size=self.size, crops=self.crops, resample=self.resample, mirror=self.mirror, batch_size=self.batch_size
        )
        digests = dict(fingerprint=self.fingerprint, digest=self.backbone.digest, precision=self.backbone.precision)
        return {**made, **digests, **settings, "grid": self.grid, "channels": self.backbone.dim}

    def how(self) -> str:
        """The batch and what works on it, in words."""
        others = "" if self.processes.size == 1 else f" in each of {self.processes.size} processes"
        batch = f"{self.batch_size} squares a batch"
        return f"{batch}{others}, {self.backbone.name} in {self.backbone.precision} on {self.backbone.device}"

    def behind(self, shards: list[Shard]) -> Job:
        """This job with the batch size of the last of `shards`: where memory was short before, it still counts as short."""
        used = shards[-1].contents.batch if shards else 0
        return replace(self, batch_size=min(self.batch_size, used or self.batch_size))

    def halved(self) -> Job:
        """With batches of half the size, after one did not fit."""
        if self.batch_size == 1:
            raise UserError(
                f"{self.argument} {self.size}: a single square does not fit into the memory of {self.backbone.device}; "
                "take a smaller size, or --device cpu"
            )
        return replace(self, batch_size=self.batch_size // 2)

    def decode(self, index: int) -> list[tuple[tuple[int, int], np.ndarray]] | ImageError:
        """The squares of one image with their places, or why there are none. Runs in a thread."""
        start, before = time.thread_time(), reading.spent()
        try:
            image = self.dataset.image(index)
            require_patch(image, self.backbone.patch, self.dataset.names[index])
        except ImageError as error:
            return error
        finally:
            decoded, spent = time.thread_time(), reading.spent()
            self.tally.add("read", spent.clock - before.clock)
            self.tally.add("decode", decoded - start - (spent.processor - before.processor))
        try:
            squares = self._cut(image, self.dataset.names[index])
        except ImageError as error:
            return error
        self.tally.add("resize", time.thread_time() - decoded)
        return squares

    def _cut(self, image: np.ndarray, name: str) -> list[tuple[tuple[int, int], np.ndarray]]:
        """ImageError for a strip so long that with its short side at `size` pixels it would be larger than any image may be."""
        height, width = image.shape[:2]
        fits = height * width * self.size**2 <= MAX_PIXELS * min(height, width) ** 2
        try:
            if fits:
                return cut_squares(image, self.size, self.crops, self.resample)
        except MemoryError:
            pass
        raise ImageError(
            name,
            f"{width} x {height} pixels, too many for the memory with {self.size} on the short side",
            "cut it into tiles",
        )


def job_of(
    dataset: Dataset,
    backbone: Backbone,
    size: int,
    crops: Crops = "center",
    resample: Resample = "nearest",
    batch_size: int | None = None,
    mirror: bool = False,
    argument: str = "--size",
    processes: Processes = ALONE,
    **_of_the_cache: object,
) -> Job:
    """What `open_or_extract` would do with these arguments."""
    batch_size = default_batch(backbone.device) if batch_size is None else batch_size
    return Job(dataset, backbone, size, crops, resample, batch_size, mirror, argument, processes)
