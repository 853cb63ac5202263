"""Open the features of a dataset: read the shards that are on disk, make the others with a frozen backbone.

The images of a shard are known ahead, so several processes make one store together, byte for byte the one that a single
process makes: each makes whole shards, all write at the same time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..datasets import Dataset
from ..datasets.images import ImageError
from ..errors import UserError
from ..system.ahead import ahead
from ..system.commandline import command_line
from ..system.files import ABANDONED_S, sweep, write_json
from ..system.host import keep_freed_memory
from ..system.locks import Lock
from ..system.progress import SILENT_S, Bar, say
from ..system.signals import with_kept
from ..system.sizes import readable
from .batches import Batches, Square
from .cachefolder import META, WRITING, CacheFolder
from .job import PLAIN, FeatureOptions, Job
from .store import (
    Contents,
    DamagedShard,
    FeatureStore,
    Shard,
    packed,
    read_shard,
    require_sound,
    shard_path,
    write_shard,
)

if TYPE_CHECKING:
    from ..backbones.base import Backbone

# a store up to this size has every byte checked when it is opened, which takes a fifth of a second
CHECKED_BYTES = 256 * 2**20
WAIT_S = 0.5  # between looks at another run that makes the same features
# in a store that replaces another
SAME = ["dataset", "backbone", "precision", "size", "crops", "resample", "scale", "margin", "mirror", "shift"]
SAME += ["exact", "reading"]
MAX_THREADS = 16  # that decode images


def open_or_extract(dataset: Dataset, backbone: Backbone, options: FeatureOptions) -> FeatureStore:
    """Open the features of every square of every image; `backbone` makes those that are not in the cache yet.

    The features live in a folder of `options.cache` named by a hash of the images, the backbone's digest and the
    options. A batch ends with its shard, so the features have the same bytes however often the work is interrupted.
    Where a batch does not fit into the device's memory, it and all that follow are halved.

    When a signal (raised as Interrupted, which says what is kept) or an error stops it, the shards written so far are
    whole, and the next call makes the others. Damaged shards are named and recomputed. Images that cannot be used are
    named on stderr and skipped. Memory: a few shards, however many images. All of several processes call it and get the
    same store. When another run makes the same features at this moment, this one waits for it.

    Before shards are written, other stores are removed to keep the cache below `options.limit`: the least recently used
    first, none that is in use.

    Raises:
        UserError: for a wrong size, when no image can be used, when the cache cannot be written, and when the backbone
            gives NaN, infinity or another shape than it promised.
    """
    job = Job(dataset, backbone, options)
    require_same_images(job)
    extraction = Extraction(job)
    writing, used = Lock(extraction.folder.path / WRITING), extraction.folder.use()
    try:
        extraction.look()
        if extraction.missing():
            extraction.wait_for_turn(writing)
            extraction.look()
            extraction.make(alone=writing.real)
        return extraction.store(used)
    except BaseException as error:
        used.release()
        if isinstance(error, KeyboardInterrupt):
            raise with_kept(error, extraction.kept()) from None
        raise
    finally:
        writing.release(remove=True)


def require_same_images(job: Job) -> None:
    """UserError where the processes would make different features."""
    jobs = job.options.processes.all((job.key(), len(job.dataset)))
    if len(set(jobs)) > 1:
        counts = ", ".join(str(count) for _, count in jobs)
        why = f"the processes see different images or weights in {job.dataset.name} ({counts} images)"
        raise UserError(f"--data: {why}; give all machines the same folder, with the same times of change")


class Extraction:
    """The shards of a store, some of which have to be made."""

    def __init__(self, job: Job):
        self.job, self.folder, self.processes = job, job.folder, job.options.processes
        self.home = CacheFolder(job.options.cache)
        self.shards: dict[int, Shard] = {}  # by number
        self._damage: dict[int, str] = {}  # of the shards that have one
        self._made = self._full = False  # whether it made shards, and whether it said that the cache exceeds its limit

    def missing(self) -> list[int]:
        return [number for number in range(self.job.shards) if number not in self.shards]

    def kept(self) -> str:
        """Tells what is kept after a stop."""
        if not self.shards:
            return "no shard of features was finished yet"
        images = len(self.job.dataset) - self._images(self.missing())
        return f"features of {images} of {len(self.job.dataset)} images are kept in {self.folder.path}"

    def look(self) -> None:
        """Read the missing shards that are on disk.

        The first process reads every byte of a small store, and of one that is not finished: the machine may have gone
        down during a write, and reading takes a hundredth of the time of making. Of a large finished store it reads the
        headers alone, because the features would take minutes; `smooseg cache verify` reads those.
        """
        silent = not self.job.options.progress
        every_byte = self.processes.first and (self.folder.nbytes <= CHECKED_BYTES or not self.job.on_disk)
        for number in Bar(iterable=self.missing(), desc="check", unit="shard", delay=SILENT_S, disable=silent):
            self._load(number, every_byte)
        for number in chain(*self.processes.all(self.missing())):
            self.shards.pop(number, None)

    def wait_for_turn(self, writing: Lock) -> None:
        """Return once no other run makes these features.

        Where there are no locks every run makes them: shards are written whole and have the same bytes whoever made
        them, so only time is lost.
        """
        if not self._take(writing):
            where = f"they are taken from {self.folder.path} once it is done"
            say(f"waiting: {writing.signature()} makes these features; {where}")
            while not self._take(writing):
                time.sleep(WAIT_S)
        writing.sign()

    def make(self, alone: bool) -> None:
        """Make and write the missing shards. alone: a lock keeps all other runs from writing."""
        missing, job, options = self.missing(), self.job, self.job.options
        if not missing:
            return
        keep_freed_memory()
        self._made, started = True, time.perf_counter()
        if self.processes.first:
            self._prepare(alone)
        batches = Batches(job.backbone, job.grid, options.mirror, job.cutting.ratios())
        own_images = chain(*map(job.images_of, missing[self.processes.rank :: self.processes.size]))
        threads = min(MAX_THREADS, os.cpu_count() or 1)
        decoded = ahead(job.squares, own_images, threads=threads, waiting=threads + job.images_per_shard)
        done, silent = len(job.dataset) - self._images(missing), not options.progress
        bar = Bar(total=len(job.dataset), initial=done, desc="extract", unit="image", disable=silent)
        with bar, closing(decoded):
            for place in range(0, len(missing), self.processes.size):
                self._make(missing[place : place + self.processes.size], decoded, batches, bar)
        if options.progress:
            contents = [self.shards[number].contents for number in missing]
            squares, images = sum(len(shard.names) for shard in contents), self._images(missing)
            seconds, n = time.perf_counter() - started, self.processes.size
            say(
                f"extracted  {squares} squares of {images} images in {seconds:.1f} s: {images / seconds:.1f} images/s, "
                f"{100 * batches.seconds / seconds:.0f} % of the time in the backbone; "
                f"{contents[-1].batch} squares a batch{'' if n == 1 else f' in each of {n} processes'}, "
                f"{job.backbone.name} in {job.backbone.precision} on {job.backbone.device}"
            )
        self._tell_tiles()

    def _tell_tiles(self) -> None:
        """Says how many squares of the grids were taken, how many show no data, and how many images were enlarged."""
        job = self.job
        left_out = int(self.processes.sum(torch.tensor(sum(job.left_out))))
        totals = torch.tensor([*map(sum, zip(*job.tiled))] or [0, 0, 0])
        taken, grid, enlarged = self.processes.sum(totals).tolist()
        if not job.options.progress:
            return
        if taken < grid:
            say(f"tiles      {taken} of the {grid} that would cover the images, at most {job.cutting.most} of an image")
        if left_out:
            say(f"no data    {left_out} squares without any data in them are left out")
        if enlarged:
            scale, size = job.options.scale[0], job.options.size
            say(f"enlarged   {enlarged} images to a short side of {size} pixels; they are smaller at --scale {scale}")

    def store(self, used: Lock) -> FeatureStore:
        """All shards as one store; says which images an earlier run skipped."""
        store = FeatureStore([self.shards[number] for number in range(self.job.shards)], used)
        if len(store) == 0:
            self.processes.wait()
            for path in self.folder.shards() if self.processes.first else []:
                path.unlink()  # the images may be readable next time
            (name, reason), count = store.skipped[0], len(store.skipped)
            raise UserError(
                f"--data: none of the {count} images can be used (first: {name}: {reason}); give images that open"
            )
        if store.skipped and not self._made:
            name, reason = store.skipped[0]
            say(
                f"skipped before: {len(store.skipped)} of {len(self.job.dataset)} images, first {name}: {reason}; "
                f"to try again, {command_line('cache', 'rm', self.folder.key[:8], *self._cache())}"
            )
        return store

    def _cache(self) -> list[str]:
        return [] if self.job.options.cache is None else ["--cache", str(self.job.options.cache)]

    def _path(self, number: int) -> Path:
        return shard_path(self.folder.path, number)

    def _load(self, number: int, every_byte: bool = False) -> None:
        """Read a shard if it is on disk and sound."""
        path, images = self._path(number), self.job.images_of(number)
        self._damage.pop(number, None)
        try:
            if shard := read_shard(path):
                if shard.contents.images != (images.start, images.stop):
                    raise DamagedShard("it belongs elsewhere")
                if every_byte:
                    require_sound(path, shard)
                self.shards[number] = shard
        except DamagedShard as damage:
            self._damage[number] = str(damage)

    def _images(self, numbers: Iterable[int]) -> int:
        return sum(len(self.job.images_of(number)) for number in numbers)

    def _take(self, writing: Lock) -> bool:
        return self.processes.decide(self.processes.first and writing.take())

    def _prepare(self, alone: bool) -> None:
        """Ready the folder for the first shard that this run writes."""
        sweep(self.folder.path, older=0.0 if alone else ABANDONED_S)
        for number, damage in self._damage.items():
            say(f"damaged: {self._path(number)}: {damage}; it will be recomputed")
        meta = self.job.describe()
        for other in [] if self.folder.meta else self.home.stores():
            if not other.readable and all(other.meta.get(name, PLAIN.get(name)) == meta[name] for name in SAME):
                say(
                    f"{other.path} was written by an older version and will be recomputed; "
                    f"to free its {readable(other.nbytes)}: {command_line('cache', 'rm', other.key[:8])}"
                )
        write_json(self.folder.path / META, meta)

    def _make(
        self, numbers: list[int], decoded: Iterator[list[Square] | ImageError], batches: Batches, bar: Bar
    ) -> None:
        """Make the shards `numbers`, one in each process; at the end some processes have none."""
        job, processes = self.job, self.processes
        own = numbers[processes.rank : processes.rank + 1]
        images = [(job.dataset.names[index], next(decoded)) for number in own for index in job.images_of(number)]
        skipped = [(name, image) for name, image in images if isinstance(image, ImageError)]
        squares = [square for _, image in images if not isinstance(image, ImageError) for square in image]
        for _, error in chain(*processes.all(skipped)):
            say(f"skipped: {error}")
        done, total = bar.n, self._images(numbers)

        def show(count: int) -> None:
            bar.update(done + total * count // len(squares) - bar.n)

        # memory was short before where the shards in front have smaller batches
        before = [self.shards[number].contents.batch for number in range(numbers[0])]
        batch_size = min([job.batch_size, *before])
        parts = batches.features(squares, batch_size, show)
        while True in (short := processes.all(parts is None)):
            if processes.rank >= short.index(True):  # the later shards too, as where one process makes all
                batch_size = self._halved(batch_size)
                parts = batches.features(squares, batch_size, show)
        self._make_room(parts or [])
        for number in own:
            contents = Contents(
                images=(job.images_of(number).start, job.images_of(number).stop),
                grid=job.grid,
                names=tuple(square.name for square in squares),
                crops=tuple(square.crop for square in squares),
                skipped=tuple((name, error.reason) for name, error in skipped),
                batch=batch_size,
                valid=self._valid(squares),
            )
            empty = torch.empty(0, job.grid[0] * job.grid[1], job.channels)
            write_shard(self._path(number), contents, *parts or [empty], exact=job.options.exact)
        processes.wait()
        for number in numbers:
            self._load(number)
            if number not in self.shards:
                raise UserError(
                    f"{self._path(number)}: cannot be read just after it was written: "
                    f"{self._damage.get(number, 'it is gone')}; check the disk or choose another cache folder"
                )
        bar.update(done + total - bar.n)

    def _valid(self, squares: list[Square]) -> str | None:
        """Which patches of the squares show data, as a shard has it."""
        if all(square.valid is None for square in squares):
            return None
        all_of_them = np.ones(self.job.grid[0] * self.job.grid[1], bool)
        marks = [all_of_them if square.valid is None else square.valid for square in squares]
        return packed(np.stack(marks))

    def _halved(self, batch_size: int) -> int:
        """Half the size of a batch that did not fit. UserError when a single square does not fit."""
        job = self.job
        if batch_size == 1:
            raise UserError(
                f"{job.options.argument} {job.options.size}: a single square does not fit into the memory of "
                f"{job.backbone.device}; take a smaller size, or --device cpu"
            )
        say(f"batch      {batch_size // 2} squares: more do not fit into the memory of {job.backbone.device}")
        return batch_size // 2

    def _make_room(self, parts: list[Tensor]) -> None:
        """Remove other stores so that the shards of all processes fit below the limit."""
        limit = self.job.options.limit
        if limit is None:
            return
        nbytes = int(self.processes.sum(torch.tensor(self.job.square_bytes * sum(map(len, parts)))))
        if self.processes.first:
            excess = self.home.make_room(nbytes, limit, self.folder)
            if excess and not self._full:
                self._full = True
                above = f"{readable(excess)} above --cache-limit {readable(limit)}"
                say(f"warning: {self.home.path} is {above}; everything else in it is in use")
        self.processes.wait()
