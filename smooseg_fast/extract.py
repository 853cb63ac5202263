"""A dataset through a frozen backbone into a feature store, decoding images in threads while the backbone runs.

Several processes make one store together, the same to the byte as one makes alone. Where a shard starts depends on every image before it,
on its shape and on whether it can be read, so shards cannot be shared out ahead. Decoding and batches are: each process decodes a part
of the images and hands the squares to all, so that all form the same batches; each takes one batch of every round through the backbone;
the first process collects the features of a shard and writes it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import store
from .cachefolder import CacheFolder, StoreFolder, readable
from .datasets import Dataset
from .errors import UserError
from .files import sweep
from .images import Crops, ImageError, Resample, cut_squares, require_patch
from .processes import ALONE, Processes
from .progress import Bar
from .signals import with_kept
from .store import Contents, DamagedShard, FeatureStore, Shard, read_shard, shard_path, write_shard
from .turns import Checking, Turn

if TYPE_CHECKING:
    from .backbones.base import Backbone


SWEEP_S = 3600.0  # a half written shard of this age is nobody's, also where there are no locks


def open_or_extract(
    dataset: Dataset,
    backbone: Backbone,
    *,
    size: int,
    crops: Crops = "center",
    resample: Resample = "nearest",
    cache: Path | str | None = None,
    batch_size: int = 16,
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

    Stopped by a signal (raised as Interrupted, which tells what is kept) or otherwise, the shards written so far are whole, and the
    next call goes on behind them; damaged shards are named and made again (`turns.Checking`). Images that cannot be used are named on
    stderr and skipped. Memory: a few times a shard, whatever the images. Of several `processes`, which see one file system, all call it
    and get the same store. Another run that makes the same features at this moment is waited for, and its shards taken.

    Before a shard is written, other stores are removed, the longest unused first and none in use, to keep the cache below `limit` bytes.

    Raises UserError for wrong settings (naming `argument` where it is the size), when no image can be used, when the cache cannot be
    written, and when the backbone gives nan, infinity or another shape than it promised.
    """
    job = _Job(dataset, backbone, size, crops, resample, batch_size, mirror, argument, processes)
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
                    _say(f"damaged: {path}: {damage}; it is made again")
                if fresh is None:
                    checking.end()
                    if processes.first:
                        _prepare(job, home, folder, alone=turn.lock.real)
                    fresh = _extract(job, position, progress)
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
    if fresh is None and features.skipped:
        name, reason = features.skipped[0]
        _say(f"skipped before: {len(features.skipped)} of {len(dataset)} images, first {name}: {reason}; delete {folder.path} to try again")
    return features


def _prepare(job: _Job, home: CacheFolder, folder: StoreFolder, *, alone: bool) -> None:
    """The folder, before the first shard of this run is written into it. alone: nobody else can write."""
    sweep(folder.path, older=0.0 if alone else SWEEP_S)
    meta = job.describe()
    if not folder.meta:
        alike = [name for name in meta if name not in ("format", "grid", "channels")]
        for other in home.stores():
            if not other.readable and all(other.meta.get(name) == meta[name] for name in alike):
                _say(
                    f"the features in {other.path} are of another version, and are made anew; "
                    f"to free their {readable(other.nbytes)}: python -m smooseg_fast.cache rm {other.key[:8]}"
                )
    folder.describe(meta)


def _stored(job: _Job, path: Path, position: tuple[int, int]) -> Shard:
    """As another process has it already, or as it was just written."""
    try:
        shard, why = job.stored(path, position), "it is gone"
    except DamagedShard as damage:
        shard, why = None, str(damage)
    if shard is None:
        raise UserError(f"{path}: cannot be read just after it was written: {why}; check the disk or choose another cache folder")
    return shard


def _keep(path: Path, contents: Contents, features: Tensor | None, home: CacheFolder, processes: Processes) -> None:
    if contents.start == (0, 0) and not contents.names:  # not written: next time the files may be readable
        (name, reason), count = contents.skipped[0], len(contents.skipped)
        raise UserError(f"--data: none of the {count} images can be used (first: {name}: {reason}); give images that open")
    if processes.first:
        _make_room(home, StoreFolder(path.parent), 2 * features.numel())
        write_shard(path, contents, features)
    processes.wait()


def _make_room(home: CacheFolder, folder: StoreFolder, nbytes: int) -> None:
    removed, excess = home.make_room(nbytes, folder)
    for name, freed in removed:
        _say(f"removed: features of {name} ({readable(freed)}), the longest unused, to stay below --cache-limit {readable(home.limit)}")
    if excess:
        _say(f"warning: {home.path} is {readable(excess)} above --cache-limit {readable(home.limit)}, and all else in it is in use")


@dataclass(frozen=True)
class _Square:
    name: str
    crop: tuple[int, int]
    pixels: np.ndarray  # uint8 [size,size,3]
    after: tuple[int, int]  # the position in the dataset that follows


@dataclass(frozen=True)
class _Skip:
    name: str
    reason: str
    after: tuple[int, int]


_Decoded = tuple[int, "list[tuple[tuple[int, int], np.ndarray]] | ImageError"]  # an image's number and its squares with their places


@dataclass(frozen=True)
class _Job:
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

    def __post_init__(self) -> None:
        patch = self.backbone.patch
        if self.size < patch or self.size % patch:
            below, above = self.size // patch * patch, (self.size // patch + 1) * patch
            advice = f"{below} or {above}" if below > 0 else str(patch)
            raise UserError(f"{self.argument} {self.size}: not a multiple of the backbone's patch, {patch} pixels; take {advice}")
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size}: must be 1 or more")
        for argument, value, kinds in (("--crops", self.crops, get_args(Crops)), ("--resample", self.resample, get_args(Resample))):
            if value not in kinds:
                raise UserError(f"{argument} {value}: unknown; take {' or '.join(kinds)}")

    @cached_property
    def grid(self) -> tuple[int, int]:
        side = self.size // self.backbone.patch
        return side, side

    @cached_property
    def rows_per_shard(self) -> int:
        return max(1, store.SHARD_BYTES // (2 * self.grid[0] * self.grid[1] * self.backbone.dim))

    def key(self) -> str:
        """What the features depend on, hashed. The batch size is not in it: it moves only the last bits."""
        parts = [store.FORMAT, self.dataset.fingerprint(), self.backbone.digest, self.size, self.crops, self.resample, self.mirror]
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
        made = dict(format=store.FORMAT, dataset=self.dataset.name, images=len(self.dataset), backbone=self.backbone.name)
        settings = dict(size=self.size, crops=self.crops, resample=self.resample, mirror=self.mirror)
        return {**made, "digest": self.backbone.digest, **settings, "grid": self.grid, "channels": self.backbone.dim}

    def decode(self, index: int) -> list[tuple[tuple[int, int], np.ndarray]] | ImageError:
        """The squares of one image with their places, or why there are none. Runs in a thread."""
        try:
            image = self.dataset.image(index)
            require_patch(image, self.backbone.patch, self.dataset.names[index])
        except ImageError as error:
            return error
        return cut_squares(image, self.size, self.crops, self.resample)

    def share(self, squares: list[_Square]) -> list[Tensor]:
        """The features of this process's batch of a round, a batch for each process; none in a short round that ends before its turn."""
        own = squares[self.processes.rank * self.batch_size :][: self.batch_size]
        return [self.features(own)] if own else []

    def features(self, batch: list[_Square]) -> Tensor:
        """[B,P,D] on the CPU, in the backbone's own type."""
        images = torch.from_numpy(np.stack([square.pixels for square in batch])).permute(0, 3, 1, 2).contiguous()
        features, grid = self.backbone(images.flip(3) if self.mirror else images)
        promised = (len(batch), self.grid[0] * self.grid[1], self.backbone.dim)
        if tuple(features.shape) != promised or tuple(grid) != self.grid:
            raise UserError(
                f"backbone {self.backbone.name}: gave {tuple(features.shape)} on grid {tuple(grid)} for squares of {self.size} pixels, not "
                f"{promised} on {self.grid} as its patch of {self.backbone.patch} pixels says; correct its patch or take another size"
            )
        finite = features.isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite):
            name = batch[finite.index(False)].name
            raise UserError(f"backbone {self.backbone.name}: gave nan or infinity for {name}; try another device or take the image out")
        if self.mirror:
            features = features.unflatten(1, grid).flip(2).flatten(1, 2)
        return features.cpu()


def _extract(job: _Job, start: tuple[int, int], progress: bool) -> Iterator[tuple[Contents, Tensor | None]]:
    """Shard after shard, from the position `start` to the end of the dataset; the features for the first process alone."""
    bar = Bar(total=len(job.dataset), initial=start[0], desc="extract", unit="image", disable=not progress)
    with bar, closing(_squares(job, start)) as squares:
        while start[0] < len(job.dataset):
            made = _next_shard(job, squares, start, bar)
            start = made[0].end
            yield made
            del made  # else these features would stay in memory while the next are made


def _next_shard(job: _Job, squares: Iterator[_Square | _Skip], start: tuple[int, int], bar: Bar) -> tuple[Contents, Tensor | None]:
    """Batches end with their shard, so that one made after an interruption sees the same batches and is the same to the byte."""
    end, names, crops, skipped, waiting, parts = start, [], [], [], [], []
    for item in squares:
        end = item.after
        if isinstance(item, _Skip):
            skipped.append((item.name, item.reason))
            continue
        names.append(item.name)
        crops.append(item.crop)
        waiting.append(item)
        full = len(names) == job.rows_per_shard
        if full or len(waiting) == job.processes.size * job.batch_size:
            parts += job.share(waiting)
            waiting.clear()
            bar.update(end[0] - bar.n)
        if full:
            break
    parts += job.share(waiting)
    bar.update(end[0] - bar.n)
    contents = Contents(start, end, job.grid, tuple(names), tuple(crops), tuple(skipped))
    rounds = itertools.zip_longest(*job.processes.to_first(parts))
    if not job.processes.first:
        return contents, None
    parts = [part for batches in rounds for part in batches if part is not None]
    h, w = job.grid
    return contents, torch.cat(parts) if parts else torch.empty(0, h * w, job.backbone.dim)


def _squares(job: _Job, start: tuple[int, int]) -> Iterator[_Square | _Skip]:
    """Every square from the position `start` on, in order; images that cannot be used are said and come as a _Skip."""
    first, done = start
    for index, squares in _decoded(job, first):
        name, after = job.dataset.names[index], (index + 1, 0)
        if isinstance(squares, ImageError):
            _say(f"skipped: {squares}")
            yield _Skip(name, squares.reason, after)
            continue
        for number in range(done if index == first else 0, len(squares)):
            crop, pixels = squares[number]
            yield _Square(name, crop, pixels, (index, number + 1) if number + 1 < len(squares) else after)


def _decoded(job: _Job, first: int) -> Iterator[_Decoded]:
    """Images from number `first` on, in order; of several processes each decodes as many as a batch of them, in turns."""
    each, processes, images = job.batch_size, job.processes, range(first, len(job.dataset))
    if processes.size == 1:
        yield from _decoded_ahead(job, images)
        return
    turns = range(0, len(images), each * processes.size)
    mine = itertools.chain.from_iterable(images[turn + processes.rank * each :][:each] for turn in turns)
    with closing(_decoded_ahead(job, mine)) as own:
        for _ in turns:
            for part in processes.all(list(itertools.islice(own, each))):
                yield from part


def _decoded_ahead(job: _Job, images: Iterable[int]) -> Iterator[_Decoded]:
    """In order, decoded ahead of the reader by about a batch."""
    threads = min(8, os.cpu_count() or 1)
    ahead: deque[tuple[int, Future]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for index in images:
                ahead.append((index, pool.submit(job.decode, index)))
                if len(ahead) == threads + job.batch_size:
                    number, future = ahead.popleft()
                    yield number, future.result()
            for number, future in ahead:
                yield number, future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # a reader that stops early must not wait for images nobody wants


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above the bar, not through it
