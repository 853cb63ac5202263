"""Feature stores that several runs open at once, or that one was killed over: what is there and sound, and who makes the rest."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..system.processes import Processes
from ..system.progress import Bar
from .cachefolder import StoreFolder
from .store import DamagedShard, Shard, require_sound

CHECKED_BYTES = (
    256 * 2**20
)  # a store up to this size has every byte looked at when it is opened, which takes a fifth of a second
SILENT_S = 2.0  # that checking may take before it is shown
WAIT_S = 0.5  # between looks at what another run makes

Read = Callable[[Path, "tuple[int, int]"], "Shard | None"]


class Checking:
    """Looks at shards that are there.

    The first process reads every byte of a small store, and of one that is not finished: the machine may have gone down over it, and
    reading takes a hundredth of the time that making takes. Of a large finished store only the headers are read, because its features
    take minutes; `python -m smooseg_fast.cache verify` looks at those.

    Args:
        read: the shard at a path for a position in the dataset of `images`, None when there is none; raises DamagedShard.
    """

    def __init__(self, read: Read, folder: StoreFolder, images: int, processes: Processes, progress: bool):
        self._read = read
        self.thorough = processes.first and (folder.nbytes <= CHECKED_BYTES or folder.images() < images)
        self._images, self._progress, self._started = images, progress and self.thorough, time.monotonic()
        self._bar: Bar | None = None

    def look(self, path: Path, position: tuple[int, int]) -> tuple[Shard | None, str]:
        """(the shard, "") or (None, what is wrong with it, if it is there)."""
        try:
            shard = self._read(path, position)
            if shard is not None and self.thorough:
                require_sound(path, shard)
                self._show(shard.contents.end[0])
        except DamagedShard as damage:
            return None, str(damage)
        return shard, ""

    def end(self) -> None:
        """Also before anything else is shown; a next look begins anew."""
        self._bar = closed(self._bar)
        self._started = time.monotonic()

    def _show(self, done: int) -> None:
        if self._bar is None and self._progress and time.monotonic() - self._started > SILENT_S:
            self._bar = Bar(total=self._images, desc="check", unit="image")
        if self._bar is not None:
            self._bar.update(done - self._bar.n)


class Turn:
    """To write into a store, which one run does at a time; another waits, and takes the shards as they come.

    Where there are no locks every run writes: shards are whole and the same to the byte, whoever made them, and only time is lost.
    """

    def __init__(self, folder: StoreFolder, images: int, processes: Processes, progress: bool):
        self.folder, self.images, self.processes, self.progress = folder, images, processes, progress
        self.lock, self._mine = folder.writer(), False
        self._bar: Bar | None = None

    def mine(self, done: int) -> bool:
        """Whether this run writes now, and has looked at what is there since that is so. If not it has waited a moment, and shown it.

        done: images whose features are there.
        """
        if self._mine:
            return True
        first = self.processes.first
        self._mine = self.processes.decide(first and self.lock.take())
        if self._mine:
            if first:
                self.lock.sign()
            self._bar = closed(self._bar)
            return False
        if self._bar is None:
            where = f"they are taken from {self.folder.path} as they come"
            tqdm.write(f"waiting: {self.lock.signature()} makes these features; {where}", file=sys.stderr)
            self._bar = Bar(total=self.images, initial=done, desc="wait", unit="image", disable=not self.progress)
        self._bar.update(done - self._bar.n)
        if first:
            time.sleep(WAIT_S)
        return False

    def end(self) -> None:
        self._bar = closed(self._bar)
        self.lock.release(remove=True)


def closed(bar: Bar | None) -> None:
    """-> what to keep of it."""
    if bar is not None:
        bar.close()
