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
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import reading, store
from .batches import Batches, Flight, TooLarge, default_batch
from .datasets import Dataset
from .errors import UserError
from .files import sweep, write_json
from .host import keep_freed_memory
from .images import Crops, ImageError, Resample, cut_squares, require_patch
from .processes import ALONE, Processes
from .progress import Bar
from .signals import with_kept
from .store import Contents, FeatureStore, Shard, read_shard, shard_path, write_shard
from .tally import Tally

if TYPE_CHECKING:
    from .backbones.base import Backbone


THREADS = 16  # that decode, at most
SWEEP_S = 3600.0  # a half written shard of this age is nobody's: several processes may work on one cache


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
) -> FeatureStore:
    """The features of every square of every image: taken from `cache` as far as they are there, else made by `backbone` and kept.

    Squares have `size` pixels (a multiple of backbone.patch), cut as `images.cut_squares` does; `mirror` gives the features of the
    mirrored squares with the grid's columns mirrored back, in the same order. They live in a folder of `cache` (by default
    $XDG_CACHE_HOME/smooseg_fast or ~/.cache/smooseg_fast) named by a hash of the images, the backbone's digest and the settings.
    A batch is `batch_size` squares (16 on a CPU, else 64) and ends with its shard, so that the features are the same to the byte however
    often the work is interrupted. Where a batch does not fit into the device's memory, it and all that follow it are halved.

    Stopped by a signal (raised as Interrupted, which tells what is kept) or otherwise, the shards written so far are whole, and the
    next call goes on behind them; damaged shards are made again. Images that cannot be used are named on stderr and skipped. Memory: a few
    times a shard, whatever the images. Of several `processes`, which see one file system, all call it and get the same store.

    Raises UserError for wrong settings (naming `argument` where it is the size), when no image can be used, when the cache cannot be
    written, and when the backbone gives nan, infinity or another shape than it promised.
    """
    batch_size = default_batch(backbone.device) if batch_size is None else batch_size
    job = _Job(dataset, backbone, size, crops, resample, batch_size, mirror, argument, processes)
    folder = (Path(cache).expanduser() if cache is not None else default_cache()) / job.key()
    shards, position, fresh = [], (0, 0), None
    try:
        while position[0] < len(dataset):
            path = shard_path(folder, len(shards))
            shard = job.stored(path, position)
            if processes.decide(shard is not None):
                if fresh is not None:  # a damaged shard was made again, and the one behind it is sound
                    fresh.close()
                    fresh = None
            else:
                if fresh is None:
                    if processes.first:
                        sweep(folder, older=SWEEP_S)
                        write_json(folder / "meta.json", job.describe())
                    fresh = _extract(job.behind(shards), position, progress)
                _keep(path, *next(fresh), processes)
                shard = None
            shard = shard or job.stored(path, position)
            if shard is None:
                raise UserError(f"{path}: cannot be read just after it was written; check the disk or choose another cache folder")
            shards.append(shard)
            position = shard.contents.end
    except KeyboardInterrupt as stop:
        done = f"features of {position[0]} of {len(dataset)} images are kept in {folder}"
        raise with_kept(stop, done if shards else "no shard of features was finished yet") from None
    finally:
        if fresh is not None:
            fresh.close()
    features = FeatureStore(shards)
    if progress and job.tally.squares:
        for line in job.tally.lines(job.how()):
            _say(line)
    if fresh is None and features.skipped:
        name, reason = features.skipped[0]
        _say(f"skipped before: {len(features.skipped)} of {len(dataset)} images, first {name}: {reason}; delete {folder} to try again")
    return features


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "smooseg_fast"


def _keep(path: Path, contents: Contents, features: Tensor | None, processes: Processes) -> None:
    if contents.start == (0, 0) and not contents.names:  # not written: next time the files may be readable
        (name, reason), count = contents.skipped[0], len(contents.skipped)
        raise UserError(f"--data: none of the {count} images can be used (first: {name}: {reason}); give images that open")
    if processes.first:
        write_shard(path, contents, features)
    processes.wait()


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
    tally: Tally = field(default_factory=Tally)

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
        """What the features depend on, hashed; on precision and batch size they do in their last bits."""
        parts = [store.FORMAT, self.dataset.fingerprint(), self.backbone.digest, self.size, self.crops, self.resample, self.mirror]
        parts += [self.backbone.precision, self.batch_size]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def stored(self, path: Path, position: tuple[int, int]) -> Shard | None:
        """The shard at `path`, where it is whole and the one that this job would make at `position`."""
        shard = read_shard(path)
        wanted = position, self.grid, self.backbone.dim
        owned = shard is not None and (shard.contents.start, shard.contents.grid, shard.features.shape[2]) == wanted
        return shard if owned else None

    def describe(self) -> dict:
        """For people who find the folder; nothing reads it."""
        made = dict(format=store.FORMAT, dataset=self.dataset.name, images=len(self.dataset), backbone=self.backbone.name)
        settings = dict(size=self.size, crops=self.crops, resample=self.resample, mirror=self.mirror, batch_size=self.batch_size)
        numbers = dict(digest=self.backbone.digest, precision=self.backbone.precision)
        return {**made, **numbers, **settings, "grid": self.grid, "channels": self.backbone.dim}

    def how(self) -> str:
        """The batch and what works on it, in words."""
        others = "" if self.processes.size == 1 else f" in each of {self.processes.size} processes"
        batch = f"{self.batch_size} squares a batch"
        return f"{batch}{others}, {self.backbone.name} in {self.backbone.precision} on {self.backbone.device}"

    def behind(self, shards: list[Shard]) -> _Job:
        """This job with the batch size of the last of `shards`: where memory was short before, it still counts as short."""
        used = shards[-1].contents.batch if shards else 0
        return replace(self, batch_size=min(self.batch_size, used or self.batch_size))

    def halved(self) -> _Job:
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
        squares = cut_squares(image, self.size, self.crops, self.resample)
        self.tally.add("resize", time.thread_time() - decoded)
        return squares


def _extract(job: _Job, start: tuple[int, int], progress: bool) -> Iterator[tuple[Contents, Tensor | None]]:
    """Shard after shard, from the position `start` to the end of the dataset; the features for the first process alone."""
    keep_freed_memory()
    bar = Bar(total=len(job.dataset), initial=start[0], desc="extract", unit="image", disable=not progress)
    batches = Batches(job.backbone, job.grid, job.mirror, job.tally)
    squares = _squares(job, start)
    began = time.perf_counter()
    try:
        with bar:
            while start[0] < len(job.dataset):
                try:
                    made = _next_shard(job, batches, squares, start, bar)
                except TooLarge:
                    made = None
                if made is None:  # the whole shard anew, so that one that is made after an interruption has the same batches
                    squares.close()
                    job = job.halved()
                    squares = _squares(job, start)
                    _say(f"batch      {job.batch_size} squares: more do not fit into the memory of {job.backbone.device}")
                    continue
                job.tally.squares += len(made[0].names)
                job.tally.images += made[0].end[0] - start[0]
                start = made[0].end
                with job.tally.timed("write"):  # the reader's: it comes back when the shard is on the disk
                    yield made
                del made  # else these features would stay in memory while the next are made
    finally:
        squares.close()
        job.tally.add("whole", time.perf_counter() - began)


def _next_shard(
    job: _Job, batches: Batches, squares: Iterator[_Square | _Skip], start: tuple[int, int], bar: Bar
) -> tuple[Contents, Tensor | None]:
    """Batches end with their shard, so that one made after an interruption sees the same batches and is the same to the byte."""
    end, names, crops, skipped, waiting = start, [], [], [], []
    rounds = _Rounds(job, batches)
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
            rounds.take(waiting)
            waiting.clear()
            bar.update(end[0] - bar.n)
        if full:
            break
    rounds.take(waiting)
    bar.update(end[0] - bar.n)
    contents = Contents(start, end, job.grid, tuple(names), tuple(crops), tuple(skipped), job.batch_size)
    return contents, rounds.features()


class _Rounds:
    """The batches of one shard, one for each process in a round."""

    def __init__(self, job: _Job, batches: Batches):
        self.job, self.batches = job, batches
        self._started: deque[Flight] = deque()
        self._landed: list[Tensor] = []

    def take(self, squares: list[_Square]) -> None:
        """This process's batch of a round goes on its way; there is none in a short round that ends before its turn."""
        size, processes = self.job.batch_size, self.job.processes
        own, fits = squares[processes.rank * size :][:size], True
        try:
            if own:
                self._started.append(self.batches.start([square.pixels for square in own], [square.name for square in own]))
        except TooLarge:
            fits = False
        if processes.largest(int(not fits)):
            raise TooLarge
        while len(self._started) > 1:  # one stays in flight while the next is put together
            self._landed.append(self.batches.land(self._started.popleft()))

    def features(self) -> Tensor | None:
        """[rows,P,D] of the shard for the first process, in the order of the squares."""
        self._landed += [self.batches.land(flight) for flight in self._started]
        rounds = itertools.zip_longest(*self.job.processes.to_first(self._landed))
        if not self.job.processes.first:
            return None
        parts = [part for batches in rounds for part in batches if part is not None]
        h, w = self.job.grid
        return torch.cat(parts) if parts else torch.empty(0, h * w, self.job.backbone.dim)


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
    threads = job.tally.threads = min(THREADS, os.cpu_count() or 1)
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
