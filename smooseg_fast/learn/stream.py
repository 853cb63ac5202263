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
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..datasets import Dataset
from ..datasets.reading import Picture
from ..features.cachefolder import StoreFolder
from ..features.extract import open_or_extract
from ..features.job import FeatureOptions, Job
from ..features.room import Windows, expected, require_room, sampled, windows_of
from ..features.store import FeatureStore
from ..system.processes import ALONE, Processes
from ..system.signals import Interrupted
from ..system.sizes import readable
from .schedule import Schedule

if TYPE_CHECKING:
    from ..backbones.base import Backbone

Say = Callable[[str], None]


class Part:
    """Some images of a dataset, by their `numbers` in it. whole: the fingerprint of the dataset."""

    labelled, class_names, notes = False, None, ()

    def __init__(self, dataset: Dataset, numbers: Sequence[int], name: str, fingerprint: str):
        self.dataset, self.numbers, self._fingerprint_of_all = dataset, list(numbers), fingerprint
        self.name, self.held_out = f"{dataset.name}, {name}", dataset.held_out
        self.names = tuple(dataset.names[number] for number in self.numbers)
        self.reading = dataset.reading

    def __len__(self) -> int:
        return len(self.numbers)

    def picture(self, index: int) -> Picture:
        return self.dataset.picture(self.numbers[index])

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
        if not self.ready(step):
            self._enter(step // self.windows.steps)
        place = step % self.windows.steps * self.batch_size
        return self._order[place : place + self.batch_size]

    def features(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B,P,D] on the CPU, of rows of the open window."""
        return self.store.rows(rows, dtype)

    def valid(self, rows: Tensor) -> Tensor | None:
        """Which patches of rows of the open window show data, bool [B,P]; None where all of the window do."""
        return self.store.valid(rows)

    def images_of(self, number: int) -> list[int]:
        """The images of window `number`, counted through all passes."""
        turn, place = divmod(number, self.windows.count)
        order = torch.randperm(len(self.dataset), generator=self.generator(4, turn))
        first, last = (len(order) * edge // self.windows.count for edge in (place, place + 1))
        return order[first:last].tolist()

    def close(self, *, remove: bool = False) -> None:
        """Close the window. remove: its features too, unless another run uses them."""
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
            raise Interrupted(getattr(stop, "number", signal.SIGINT)) from None
        rows = len(self._store)
        generators = [self.generator(3, number, again) for again in range(-(-steps * self.batch_size // rows))]
        self._order = torch.cat([torch.randperm(rows, generator=generator) for generator in generators])


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
    # a part of the images has as many tiles of each as all would have
    options = replace(options, most=Job(dataset, backbone, options).cutting.most)
    if resumed and windows is None:
        require_room(dataset, backbone, options, in_use=in_use)
    forecast = None if resumed else expected(dataset, backbone, options)
    if forecast is not None and options.limit is not None:
        windows = windows_of(forecast, options.limit, in_use, batch_size)
    if windows is None:
        return open_or_extract(dataset, backbone, options), None
    N, count = len(dataset), sampled(len(dataset))
    size = "" if forecast is None else f": all would take about {readable(forecast.nbytes)}"
    say(
        f"features   streamed{size}; {windows.count} windows of {windows.steps} steps follow one another through the "
        f"cache; the start and figures without labels use {count} images"
    )
    fingerprint = dataset.fingerprint()
    sample = Part(dataset, [number * N // count for number in range(count)], "sample", fingerprint)
    stream = Stream(
        dataset,
        fingerprint,
        windows,
        open=lambda part: open_or_extract(part, backbone, options),
        batch_size=batch_size,
        data_seed=data_seed,
        processes=options.processes,
        say=say,
    )
    return open_or_extract(sample, backbone, options), stream
