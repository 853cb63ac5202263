"""A dataset through a frozen backbone into a feature store: what is there already is taken, the rest made (`produce`) and kept."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from torch import Tensor

from .. import reading
from ..datasets import Dataset
from ..errors import UserError
from ..files import sweep
from ..images import MAX_PIXELS, Crops, ImageError, Resample, cut_squares, require_patch
from ..processes import ALONE, Processes
from ..signals import with_kept
from . import store
from .batches import default_batch
from .cachefolder import CacheFolder, StoreFolder, readable
from .produce import produce, say
from .store import Contents, DamagedShard, FeatureStore, Shard, read_shard, shard_path, write_shard
from .tally import Tally
from .turns import Checking, Turn

if TYPE_CHECKING:
    from ..backbones.base import Backbone


SWEEP_S = 3600.0  # a half written shard of this age is nobody's, also where there are no locks


def open_or_extract(
    dataset: Dataset,
    backbone: Backbone,
    *,
    size: int,
    crops: Crops = "center",
    resample: Resample = "nearest",
    cache: Path | str | None = None,
    batch_size: int | None = None,
    mirror: bool = False,
    progress: bool = True,
    argument: str = "--size",
    processes: Processes = ALONE,
    limit: int | None = None,
) -> FeatureStore:
    """The features of every square of every image: taken from `cache` as far as they are there, else made by `backbone` and kept.

    Squares have `size` pixels (a multiple of backbone.patch), cut as `images.cut_squares` does; `mirror` gives the features of the
    mirrored squares with the grid's columns mirrored back, in the same order. They live in a folder of `cache` (by default
    $XDG_CACHE_HOME/smooseg_fast or ~/.cache/smooseg_fast) named by a hash of the images, the backbone's digest and the settings.
    A batch is `batch_size` squares (16 on a CPU, else 64) and ends with its shard, so that the features are the same to the byte however
    often the work is interrupted. Where a batch does not fit into the device's memory, it and all that follow it are halved.

    Stopped by a signal (raised as Interrupted, which tells what is kept) or otherwise, the shards written so far are whole, and the
    next call goes on behind them; damaged shards are named and made again (`turns.Checking`). Images that cannot be used are named on
    stderr and skipped. Memory: a few times a shard, whatever the images. Of several `processes`, which see one file system, all call it
    and get the same store. Another run that makes the same features at this moment is waited for, and its shards taken.

    Before a shard is written, other stores are removed, the longest unused first and none in use, to keep the cache below `limit` bytes.

    Raises UserError for wrong settings (naming `argument` where it is the size), when no image can be used, when the cache cannot be
    written, and when the backbone gives nan, infinity or another shape than it promised.
    """
    job = job_of(dataset, backbone, size, crops, resample, batch_size, mirror, argument, processes)
    home = CacheFolder(cache, limit)
    folder = home.store(job.key())
    used, opened = folder.use(), (len(dataset), processes, progress)
    checking, turn = Checking(job.stored, folder, *opened), Turn(folder, *opened)
    shards, position, fresh, features = [], (0, 0), None, None
    try:
        while position[0] < len(dataset):
            path = shard_path(folder.path, len(shards))
            shard, damage = checking.look(path, position)
            if processes.decide(shard is not None):
                if fresh is not None:  # a damaged shard was made again, and the one behind it is sound
                    fresh.close()
                    fresh = None
            elif not turn.mine(position[0]):
                continue
            else:
                if processes.first and damage:
                    say(f"damaged: {path}: {damage}; it is made again")
                if fresh is None:
                    checking.end()
                    if processes.first:
                        _prepare(job, home, folder, alone=turn.lock.real)
                    fresh = produce(job.behind(shards), position, progress)
                _keep(path, *next(fresh), home, processes)
                shard = None
            shard = shard or _stored(job, path, position)
            shards.append(shard)
            position = shard.contents.end
        features = FeatureStore(shards, used)
    except KeyboardInterrupt as stop:
        done = f"features of {position[0]} of {len(dataset)} images are kept in {folder.path}"
        raise with_kept(stop, done if shards else "no shard of features was finished yet") from None
    finally:
        if fresh is not None:
            fresh.close()
        checking.end()
        turn.end()
        if features is None:
            used.release()
    if progress and job.tally.squares:
        for line in job.tally.lines(job.behind(shards).how()):
            say(line)
    if fresh is None and features.skipped:
        name, reason = features.skipped[0]
        say(
            f"skipped before: {len(features.skipped)} of {len(dataset)} images, first {name}: {reason}; delete {folder.path} to try again"
        )
    return features


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


def _prepare(job: Job, home: CacheFolder, folder: StoreFolder, *, alone: bool) -> None:
    """The folder, before the first shard of this run is written into it. alone: nobody else can write."""
    sweep(folder.path, older=0.0 if alone else SWEEP_S)
    meta = job.describe()
    if not folder.meta:
        alike = [name for name in meta if name not in ("format", "fingerprint", "grid", "channels")]
        for other in home.stores():
            if not other.readable and all(other.meta.get(name) == meta[name] for name in alike):
                say(
                    f"the features in {other.path} are of another version, and are made anew; "
                    f"to free their {readable(other.nbytes)}: python -m smooseg_fast.cache rm {other.key[:8]}"
                )
    folder.describe(meta)


def _stored(job: Job, path: Path, position: tuple[int, int]) -> Shard:
    """As another process has it already, or as it was just written."""
    try:
        shard, why = job.stored(path, position), "it is gone"
    except DamagedShard as damage:
        shard, why = None, str(damage)
    if shard is None:
        raise UserError(
            f"{path}: cannot be read just after it was written: {why}; check the disk or choose another cache folder"
        )
    return shard


def _keep(path: Path, contents: Contents, parts: list[Tensor], home: CacheFolder, processes: Processes) -> None:
    if contents.start == (0, 0) and not contents.names:  # not written: next time the files may be readable
        (name, reason), count = contents.skipped[0], len(contents.skipped)
        raise UserError(
            f"--data: none of the {count} images can be used (first: {name}: {reason}); give images that open"
        )
    if processes.first:
        _make_room(home, StoreFolder(path.parent), 2 * sum(part.numel() for part in parts))
        write_shard(path, contents, *parts)
    processes.wait()


def _make_room(home: CacheFolder, folder: StoreFolder, nbytes: int) -> None:
    removed, excess = home.make_room(nbytes, folder)
    for name, freed in removed:
        say(
            f"removed: features of {name} ({readable(freed)}), the longest unused, to stay below --cache-limit {readable(home.limit)}"
        )
    if excess:
        say(
            f"warning: {home.path} is {readable(excess)} above --cache-limit {readable(home.limit)}, and all else in it is in use"
        )


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
