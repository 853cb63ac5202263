"""Check the shards that are on disk, and let one run at a time write the others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..system import progress
from ..system.progress import Bar, say
from .cachefolder import StoreFolder
from .store import DamagedShard, Shard, require_sound

if TYPE_CHECKING:
    from .job import Job

# a store up to this size has every byte checked when it is opened, which takes a fifth of a second
CHECKED_BYTES = 256 * 2**20
WAIT_S = 0.5  # between looks at what another run makes


class Checking:
    """Look for shards that are there already.

    The first process reads every byte of a small store, and of one that is not finished: the machine may have gone down
    during a write, and reading takes a hundredth of the time of making. Of a large finished store it reads the headers
    alone, because the features would take minutes; `smooseg cache verify` reads those.
    """

    def __init__(self, job: Job, folder: StoreFolder):
        self._job = job
        first = job.options.processes.first
        self._thorough = first and (folder.nbytes <= CHECKED_BYTES or folder.images() < job.images)
        self._bar: Bar | None = None
        self._started = time.monotonic()

    def look(self, path: Path, position: tuple[int, int]) -> tuple[Shard | None, str]:
        """-> (the shard, "") or (None, its damage), where a shard that is not there has none."""
        try:
            shard = self._job.read(path, position)
            if shard is not None and self._thorough:
                require_sound(path, shard)
                self._show(shard.contents.end[0])
        except DamagedShard as damage:
            return None, str(damage)
        return shard, ""

    def end(self) -> None:
        """Close the bar, also before another one opens."""
        close(self._bar)
        self._bar = None
        self._started = time.monotonic()

    def _show(self, images_done: int) -> None:
        slow = time.monotonic() - self._started > progress.SILENT_S
        if self._bar is None and slow and self._job.options.progress:
            self._bar = Bar(total=self._job.images, desc="check", unit="image")
        if self._bar is not None:
            self._bar.update(images_done - self._bar.n)


class Turn:
    """Let one run at a time write into a store. Others wait and take its shards as they come.

    Where there are no locks every run writes: shards are written whole and have the same bytes whoever made them, so
    only time is lost.
    """

    def __init__(self, job: Job, folder: StoreFolder):
        self._job, self._folder, self._processes = job, folder, job.options.processes
        self._lock, self._mine = folder.writer(), False
        self._bar: Bar | None = None

    @property
    def alone(self) -> bool:
        """True while a lock keeps all other runs from writing."""
        return self._lock.real

    def mine(self, images_done: int) -> bool:
        """Return whether this run may write, and could at the last call.

        If not, wait a moment; the caller then looks for shards again.
        """
        if self._mine:
            return True
        first = self._processes.first
        self._mine = self._processes.decide(first and self._lock.take())
        if self._mine:
            if first:
                self._lock.sign()
            close(self._bar)
            self._bar = None
            return False
        if self._bar is None:
            where = f"they are taken from {self._folder.path} as they come"
            say(f"waiting: {self._lock.signature()} makes these features; {where}")
            silent = not self._job.options.progress
            self._bar = Bar(total=self._job.images, initial=images_done, desc="wait", unit="image", disable=silent)
        self._bar.update(images_done - self._bar.n)
        if first:
            time.sleep(WAIT_S)
        return False

    def end(self) -> None:
        close(self._bar)
        self._bar = None
        self._lock.release(remove=True)


def close(bar: Bar | None) -> None:
    if bar is not None:
        bar.close()
