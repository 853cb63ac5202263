"""Training on features that do not fit the cache: they pass through it in windows, one at a time.

Every pass takes the images in another random order, cut into windows of equal numbers of images. The features of a
window are a store like any other, made by `open_or_extract`. A window serves a fixed number of steps, as many as its
squares make batches, so that a square is seen as often as if all features were there; then the window is removed and
the next one is made. Everything follows from (data_seed, step) and the two numbers of `Windows`, which are saved with
the run's state: a stopped run resumes with the same batches, from the shards it left.

The next window is not made while the head learns: a backbone takes fifty times as long as the head, so it would save a
fiftieth.
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
    """Some images of a dataset, by their numbers in it. fingerprint: the whole dataset's."""

    labelled, class_names, notes = False, None, ()

    def __init__(self, dataset: Dataset, numbers: Sequence[int], name: str, fingerprint: str):
        self.dataset, self.numbers, self._fingerprint_of_all = dataset, list(numbers), fingerprint
        self.name, self.held_out = f"{dataset.name}, {name}", dataset.held_out
        self.names = tuple(dataset.names[number] for number in self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def image(self, index: int) -> np.ndarray:
        return self.dataset.image(self.numbers[index])

    def label(self, index: int) -> None:
        return None

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self._fingerprint_of_all, self.numbers]).encode()).hexdigest()


class Stream(Schedule):
    """A schedule whose rows lie in the window that a step belongs to; `features` reads them.

    Args:
        dataset: all images.
        fingerprint: the dataset's own.
        open: makes the features of a part of it.
        processes: all of them enter and leave every window together.
    """

    def __init__(
        self,
        dataset: Dataset,
        fingerprint: str,
        windows: Windows,
        *,
        open: Callable[[Dataset], FeatureStore],
        batch_size: int,
        data_seed: int,
        processes: Processes = ALONE,
        say: Say = lambda line: None,
    ):
        super().__init__(batch_size, batch_size, data_seed)
        self.dataset, self.fingerprint, self.windows = dataset, fingerprint, windows
        self._open, self.processes, self.say = open, processes, say
        self._number = -1
        self._store: FeatureStore | None = None
        self._order = torch.empty(0, dtype=torch.int64)

    @property
    def store(self) -> FeatureStore:
        """The features of the open window. RuntimeError where none is open."""
        if self._store is None:
            raise RuntimeError("no window is open; rows_of opens that of a step")
        return self._store

    def ready(self, step: int) -> bool:
        """Return whether the window of this step is open."""
        return self._store is not None and step // self.windows.steps == self._number

    def rows_of(self, step: int) -> Tensor:
        """int64 [B] squares of the window in random order; one too small for its steps is used again in another."""
        number, place = divmod(step, self.windows.steps)
        if not self.ready(step):
            self._enter(number)
            rows, needed = len(self.store), self.windows.steps * self.batch_size
            rounds = range(-(-needed // rows))
            self._order = torch.cat(
                [torch.randperm(rows, generator=self.generator(3, number, again)) for again in rounds]
            )
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def features(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B,P,D] on the CPU, of rows of the open window."""
        return self.store.rows(rows, dtype)

    def images_of(self, number: int) -> list[int]:
        """The images of window `number`, counted through all passes."""
        turn, place = divmod(number, self.windows.count)
        order = torch.randperm(len(self.dataset), generator=self.generator(4, turn))
        first, last = (len(order) * edge // self.windows.count for edge in (place, place + 1))
        return order[first:last].tolist()

    def close(self, *, remove: bool = False) -> None:
        """Closes the window. remove: its features too, unless another run uses them."""
        if self._store is None:
            return
        folder = self._store.folder
        self._store.close()
        self._store = None
        if remove:
            self.processes.wait()  # until all have closed it
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
            # without the words of the features: the run knows better what is kept
            raise Interrupted(getattr(stop, "number", Interrupted().number)) from None


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
    """All features and None; or, where they exceed the limit, those of a sample of images and the stream of all.

    Args:
        options: settings of the features.
        in_use: bytes of the cache that have to stay.
        resumed, windows: whether the run resumes, and the windows that it had. They count, whatever the limit is now.
    """
    limit = options.limit
    if limit is None and windows is None:
        return open_or_extract(dataset, backbone, options), None
    forecast = expected(dataset, backbone, options)
    if limit is not None and not resumed:
        windows = windows_of(forecast, limit, in_use, batch_size)
    if windows is None:
        if limit is not None and not forecast.on_disk and forecast.nbytes + in_use > limit:
            needed = readable(forecast.nbytes + in_use)
            raise UserError(
                f"--cache-limit {readable(limit)}: this run began with room for all; "
                f"give about {needed}, or another --out"
            )
        return open_or_extract(dataset, backbone, options), None
    say("features   " + described(forecast, windows))
    fingerprint, N = dataset.fingerprint(), len(dataset)
    numbers = [k * N // sampled(N) for k in range(sampled(N))]
    sample = open_or_extract(Part(dataset, numbers, "sample", fingerprint), backbone, options)

    def open_window(part: Dataset) -> FeatureStore:
        return open_or_extract(part, backbone, options)

    stream = Stream(
        dataset,
        fingerprint,
        windows,
        open=open_window,
        batch_size=batch_size,
        data_seed=data_seed,
        processes=options.processes,
        say=say,
    )
    return sample, stream


def described(forecast: Expected, windows: Windows) -> str:
    parts = f"{windows.count} windows of {readable(forecast.nbytes // windows.count)} and {windows.steps} steps"
    return (
        f"streamed: all would take about {readable(forecast.nbytes)}; {parts} follow one another through the cache; "
        f"the start and figures without labels use {sampled(forecast.images)} images"
    )
