"""Training on features that do not fit the cache: through windows, of which one is there at a time.

The images are taken in a random order, another one in every pass, and that order is cut into windows of equal numbers of images. The
features of a window are a store like any other, made by `open_or_extract`. Batches are drawn from it for a fixed number of steps, as many
as its squares make batches, so that a square is seen as often as if all were there; then the window goes and the next is made. Everything
follows from (data_seed, step) and the two numbers of `Windows`, which are saved with the run's state: a run that was stopped goes on with
the same batches, from the shards that it left.

Windows are not made ahead while the head learns: a backbone takes fifty times as long as the head, so it would gain a fiftieth.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..datasets import Dataset
from ..errors import UserError
from ..features.cachefolder import StoreFolder
from ..features.extract import open_or_extract
from ..features.job import FeatureOptions
from ..features.room import Expected, Windows, expected, sampled, windows_of
from ..features.store import FeatureStore
from ..system.processes import ALONE, Processes
from ..system.signals import Interrupted
from ..system.sizes import readable
from .schedule import Schedule

if TYPE_CHECKING:
    from ..backbones.base import Backbone

Say = Callable[[str], None]


class Part:
    """Some images of a dataset, by their numbers there. whole: the fingerprint of all."""

    labelled, class_names, notes = False, None, ()

    def __init__(self, dataset: Dataset, numbers: Sequence[int], name: str, whole: str):
        self.dataset, self.numbers, self.whole = dataset, list(numbers), whole
        self.name, self.held_out = f"{dataset.name}, {name}", dataset.held_out
        self.names = tuple(dataset.names[number] for number in self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def image(self, index: int) -> np.ndarray:
        return self.dataset.image(self.numbers[index])

    def label(self, index: int) -> None:
        return None

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.whole, self.numbers]).encode()).hexdigest()


class Stream(Schedule):
    """A schedule whose rows are those of the window that a step belongs to, and `features`, which gives them.

    Args:
        dataset: of all images.
        fingerprint: its own.
        open: from a part of it to that part's features.
    """

    def __init__(
        self,
        dataset: Dataset,
        fingerprint: str,
        windows: Windows,
        open: Callable[[Dataset], FeatureStore],
        batch_size: int,
        data_seed: int,
        processes: Processes = ALONE,
        say: Say = lambda line: None,
    ):
        super().__init__(batch_size, batch_size, data_seed, processes.size, processes.rank)
        self.dataset, self.fingerprint, self.windows = dataset, fingerprint, windows
        self._open, self.processes, self.say = open, processes, say
        self._number, self._store = -1, None

    def ready(self, step: int) -> bool:
        """Whether the window of this step is there."""
        return self._store is not None and step // self.windows.steps == self._number

    def rows_of(self, step: int) -> Tensor:
        """Of the window, in a random order; where it has less than all its steps need, once more in another."""
        number, place = divmod(step, self.windows.steps)
        if not self.ready(step):
            self._enter(number)
            rows, needed = len(self._store), self.windows.steps * self.batch_size
            rounds = range(-(-needed // rows))
            self._order = torch.cat(
                [torch.randperm(rows, generator=self.generator(3, number, again)) for again in rounds]
            )
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def features(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B,P,D] on the CPU, of the rows that were drawn last."""
        return self._store.rows(rows, dtype)

    def images_of(self, number: int) -> list[int]:
        """The images of a window, numbered on through all passes."""
        turn, place = divmod(number, self.windows.count)
        order = torch.randperm(len(self.dataset), generator=self.generator(4, turn))
        first, last = (len(order) * edge // self.windows.count for edge in (place, place + 1))
        return order[first:last].tolist()

    def close(self, *, remove: bool = False) -> None:
        """Lets go of the window. remove: takes its features away, where no other run uses them."""
        if self._store is None:
            return
        folder = self._store.folder
        self._store.close()
        self._store = None
        if remove:
            self.processes.wait()  # until all have let go
            if self.processes.first and folder is not None:
                StoreFolder(folder).remove()

    def _enter(self, number: int) -> None:
        self.close(remove=True)
        turn, place = divmod(number, self.windows.count)
        name = f"window {place + 1} of {self.windows.count} in pass {turn + 1}"
        part = Part(self.dataset, self.images_of(number), name, self.fingerprint)
        steps = self.windows.steps
        self.say(f"stream     {name}: {len(part)} images, steps {number * steps + 1} to {(number + 1) * steps}")
        try:
            self._store, self._number = self._open(part), number
        except KeyboardInterrupt as stop:
            raise Interrupted(
                getattr(stop, "number", Interrupted().number)
            ) from None  # what the run has kept says more


def open_for_training(
    dataset: Dataset,
    backbone: Backbone,
    options: FeatureOptions,
    *,
    batch_size: int,
    data_seed: int,
    in_use: int,
    resumed: bool,
    windows: Windows | None,
    say: Say,
) -> tuple[FeatureStore, Stream | None]:
    """All features and None; or, where they do not fit the limit, those of a sample of the images, and the stream of all.

    Args:
        options: of the features.
        in_use: bytes of the cache that have to stay beside them.
        resumed, windows: whether a run is gone on with, and the windows that it had; those count, whatever the limit is now.
    """
    limit = options.limit
    found = None if limit is None and windows is None else expected(dataset, backbone, options)
    if not resumed and found is not None:
        windows = windows_of(found, limit, in_use, batch_size)
    if windows is None:
        if found is not None and not found.on_disk and found.nbytes + in_use > limit:
            needed = readable(found.nbytes + in_use)
            raise UserError(
                f"--cache-limit {readable(limit)}: this run began with room for all; give about {needed}, or another --out"
            )
        return open_or_extract(dataset, backbone, options), None
    say("features   " + described(found, windows))
    fingerprint, N = dataset.fingerprint(), len(dataset)
    numbers = [k * N // sampled(N) for k in range(sampled(N))]
    sample = open_or_extract(Part(dataset, numbers, "sample", fingerprint), backbone, options)

    def opened(part: Dataset) -> FeatureStore:
        return open_or_extract(part, backbone, options)

    return sample, Stream(dataset, fingerprint, windows, opened, batch_size, data_seed, options.processes, say)


def described(found: Expected, windows: Windows) -> str:
    each = f"{windows.count} windows of {readable(found.nbytes // windows.count)} and {windows.steps} steps"
    return (
        f"streamed: all would take about {readable(found.nbytes)}; {each} follow one another through the cache; the start and the "
        f"figures without labels are of {sampled(found.images)} images"
    )
