"""Open the features of a dataset: read the shards that are on disk, make the others with a frozen backbone."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from ..datasets import Dataset
from ..errors import UserError
from ..system.commandline import command_line
from ..system.files import sweep
from ..system.progress import say
from ..system.signals import with_kept
from ..system.sizes import readable
from .batches import Pace
from .cachefolder import CacheFolder
from .job import FeatureOptions, Job
from .produce import produce
from .store import Contents, DamagedShard, FeatureStore, Shard, shard_path, write_shard
from .turns import Checking, Turn

if TYPE_CHECKING:
    from ..backbones.base import Backbone


ABANDONED_S = 3600.0  # age at which a half-written shard is nobody's, where no lock says so


def open_or_extract(dataset: Dataset, backbone: Backbone, options: FeatureOptions) -> FeatureStore:
    """Open the features of every square of every image; `backbone` makes those that are not in the cache yet.

    The features live in a folder of `options.cache` named by a hash of the images, the backbone's digest and the
    options. A batch ends with its shard, so the features have the same bytes however often the work is interrupted.
    Where a batch does not fit into the device's memory, it and all that follow are halved.

    When a signal (raised as Interrupted, which says what is kept) or an error stops it, the shards written so far are
    whole, and the next call resumes behind them. It names damaged shards and recomputes them (`turns.Checking`). Images
    that cannot be used are reported on stderr and skipped. Memory: a few shards, however many images. All of several
    processes call it and get the same store. When another run makes the same features at this moment, its shards are
    taken as they come.

    Before a shard is written, other stores are removed to keep the cache below `options.limit`: the least recently used
    first, none that is in use.

    Raises:
        UserError: for wrong options, when no image can be used, when the cache cannot be written, and when the backbone
            gives NaN, infinity or another shape than it promised.
    """
    with Opening(Job(dataset, backbone, options)) as opening:
        while not opening.complete:
            opening.append(opening.stored() or opening.taken_from_another_run() or opening.computed())
        return opening.store()


class Opening:
    """A feature store on its way: the shards so far, the position behind them, and three ways to the next shard.

    A position is (image number, square number within the image). The exit ends all that is under way; without a
    `store()` it also lets go of the folder.
    """

    def __init__(self, job: Job):
        self.job, self.position = job, (0, 0)
        self._processes = job.options.processes
        self._home = CacheFolder(job.options.cache, job.options.limit)
        self._folder = self._home.store(job.key())
        self._lock = self._folder.use()
        self._checking, self._turn = Checking(job, self._folder), Turn(job, self._folder)
        self._shards: list[Shard] = []
        self._damage = ""  # why the file where the next shard should be cannot be used
        self._producing: Generator[tuple[Contents, list[Tensor]], None, None] | None = None
        self._pace = Pace()
        self._store: FeatureStore | None = None

    def __enter__(self) -> Opening:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
        if self._store is None:
            self._lock.release()
        if isinstance(error, KeyboardInterrupt):
            done = f"features of {self.position[0]} of {self.job.images} images are kept in {self._folder.path}"
            raise with_kept(error, done if self._shards else "no shard of features was finished yet") from None

    @property
    def complete(self) -> bool:
        return self.position[0] >= self.job.images

    def append(self, shard: Shard) -> None:
        self._shards.append(shard)
        self.position = shard.contents.end

    # three ways to the next shard

    def stored(self) -> Shard | None:
        """The next shard, if it is on disk and sound."""
        shard, self._damage = self._checking.look(self._path, self.position)
        if not self._processes.decide(shard is not None):
            return None
        self._end_producing()  # it made a damaged shard again, and the one behind that is sound
        return shard or self._read_back()

    def taken_from_another_run(self) -> Shard | None:
        """The next shard from the run that writes it now; None once it is this run's turn to write."""
        while not self._turn.mine(self.position[0]):
            if shard := self.stored():
                return shard
        return None

    def computed(self) -> Shard:
        """Compute the next shard and write it."""
        if self._processes.first and self._damage:
            say(f"damaged: {self._path}: {self._damage}; it will be recomputed")
        if self._producing is None:
            self._checking.end()
            if self._processes.first:
                self._prepare()
            self._producing = produce(self.job.with_memory_of(self._shards), self.position, self._pace)
        self._write(*next(self._producing))
        return self._read_back()

    def store(self) -> FeatureStore:
        """All shards as one store; says how fast they were made and which images were skipped by an earlier run."""
        self._store = store = FeatureStore(self._shards, self._lock)
        only_read = self._producing is None
        self._end()
        if self.job.options.progress and self._pace.squares:
            say(self._pace.line(self._how()))
        if only_read and store.skipped:
            name, reason = store.skipped[0]
            say(
                f"skipped before: {len(store.skipped)} of {self.job.images} images, first {name}: {reason}; "
                f"delete {self._folder.path} to try again"
            )
        return store

    # parts of these

    @property
    def _path(self) -> Path:
        """The file of the next shard, written or not."""
        return shard_path(self._folder.path, len(self._shards))

    def _how(self) -> str:
        job, n = self.job.with_memory_of(self._shards), self._processes.size
        batch = f"{job.batch_size} squares a batch" + ("" if n == 1 else f" in each of {n} processes")
        return f"{batch}, {job.backbone.name} in {job.backbone.precision} on {job.backbone.device}"

    def _prepare(self) -> None:
        """Ready the folder for the first shard that this run writes."""
        sweep(self._folder.path, older=0.0 if self._turn.alone else ABANDONED_S)
        meta = self.job.describe()
        if not self._folder.meta:
            alike = [name for name in meta if name not in ("format", "fingerprint", "grid", "channels")]
            for other in self._home.stores():
                if not other.readable and all(other.meta.get(name) == meta[name] for name in alike):
                    say(
                        f"{other.path} was written by an older version and will be recomputed; "
                        f"to free its {readable(other.nbytes)}: {command_line('cache', 'rm', other.key[:8])}"
                    )
        self._folder.describe(meta)

    def _write(self, contents: Contents, parts: list[Tensor]) -> None:
        if contents.start == (0, 0) and not contents.names:  # not written: the files may be readable next time
            (name, reason), count = contents.skipped[0], len(contents.skipped)
            raise UserError(
                f"--data: none of the {count} images can be used (first: {name}: {reason}); give images that open"
            )
        if self._processes.first:
            self._make_room(2 * sum(part.numel() for part in parts))
            write_shard(self._path, contents, *parts)
        self._processes.wait()

    def _make_room(self, nbytes: int) -> None:
        removed, excess = self._home.make_room(nbytes, self._folder)
        limit = "" if self._home.limit is None else f"--cache-limit {readable(self._home.limit)}"
        for label, freed in removed:
            say(f"removed: features of {label} ({readable(freed)}), the least recently used, to stay below {limit}")
        if excess:
            say(f"warning: {self._home.path} is {readable(excess)} above {limit}; everything else in it is in use")

    def _read_back(self) -> Shard:
        """The next shard as it was just written, or as another process sees it already."""
        try:
            shard, why = self.job.read(self._path, self.position), "it is gone"
        except DamagedShard as damage:
            shard, why = None, str(damage)
        if shard is None:
            raise UserError(
                f"{self._path}: cannot be read just after it was written: {why}; "
                "check the disk or choose another cache folder"
            )
        return shard

    def _end_producing(self) -> None:
        if self._producing is not None:
            self._producing.close()
            self._producing = None

    def _end(self) -> None:
        self._end_producing()
        self._checking.end()
        self._turn.end()
