"""A dataset through a frozen backbone into a feature store: what is there already is taken, the rest made (`produce`) and kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..datasets import Dataset
from ..datasets.images import Crops, Resample
from ..errors import UserError
from ..system.files import sweep
from ..system.processes import ALONE, Processes
from ..system.signals import with_kept
from ..system.sizes import readable
from .cachefolder import CacheFolder, StoreFolder
from .job import Job, job_of
from .produce import produce, say
from .store import Contents, DamagedShard, FeatureStore, Shard, shard_path, write_shard
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
