"""Make shards of features: decode images in threads and send their squares through the backbone in batches.

Several processes make one store together, byte for byte the one that a single process makes. Where a shard starts
depends on the shapes of all images before it and on whether they can be read, so whole shards cannot be shared out
ahead. Decoding and batches can: each process decodes a part of the images and gives the squares to all, so that all
form the same batches; each sends one batch of every round through the backbone; the first process collects the features
of a shard and writes it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..datasets.images import ImageError
from ..system.ahead import ahead
from ..system.host import keep_freed_memory
from ..system.progress import Bar, say
from .batches import Batches, Flight, Pace, TooLarge
from .store import Contents

if TYPE_CHECKING:
    from .job import Job, Square

MAX_THREADS = 16  # that decode images


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


_Decoded = tuple[int, "list[Square] | ImageError"]  # an image's number and its squares


def produce(job: Job, start: tuple[int, int], pace: Pace) -> Generator[tuple[Contents, list[Tensor]], None, None]:
    """Make shard after shard, from the position `start` to the end of the dataset, and count them in `pace`.

    Yields what each shard holds and the parts [n,P,D] of its features, one behind the other; only the first process
    gets the parts.
    """
    keep_freed_memory()
    bar = Bar(total=job.images, initial=start[0], desc="extract", unit="image", disable=not job.options.progress)
    batches = Batches(job.backbone, job.grid, job.options.mirror, pace)
    reported: set[str] = set()  # images reported as skipped; a shard that starts again does not report them again
    squares = _squares(job, start, reported)
    began = time.perf_counter()
    try:
        with bar:
            while start[0] < job.images:
                try:
                    shard = _next_shard(job, batches, squares, start, bar)
                except TooLarge:
                    shard = None
                if shard is None:
                    # start the whole shard again, so that one made after an interruption has the same batches
                    squares.close()
                    job = job.halved()
                    squares = _squares(job, start, reported)
                    say(
                        f"batch      {job.batch_size} squares: more do not fit into the memory of {job.backbone.device}"
                    )
                    continue
                pace.squares += len(shard[0].names)
                pace.images += shard[0].end[0] - start[0]
                start = shard[0].end
                yield shard
                del shard  # frees its features while the next are made
    finally:
        squares.close()
        pace.seconds += time.perf_counter() - began


def _next_shard(
    job: Job, batches: Batches, squares: Iterator[_Square | _Skip], start: tuple[int, int], bar: Bar
) -> tuple[Contents, list[Tensor]]:
    """Make one shard.

    Its last batch ends with it, so one made after an interruption has the same batches and the same bytes.
    """
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
        if full or len(waiting) == job.options.processes.size * job.batch_size:
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

    def __init__(self, job: Job, batches: Batches):
        self.job, self.batches = job, batches
        self._started: deque[Flight] = deque()
        self._landed: list[Tensor] = []

    def take(self, squares: list[_Square]) -> None:
        """Start this process's batch of a round. A short last round may end before its turn."""
        size, processes = self.job.batch_size, self.job.options.processes
        batch, fits = squares[processes.rank * size :][:size], True
        try:
            if batch:
                pixels, names = [square.pixels for square in batch], [square.name for square in batch]
                self._started.append(self.batches.start(pixels, names))
        except TooLarge:
            fits = False
        if processes.largest(int(not fits)):
            raise TooLarge
        while len(self._started) > 1:  # one stays in flight while the next is put together
            self._landed.append(self.batches.land(self._started.popleft()))

    def features(self) -> list[Tensor]:
        """Collect the parts [n,P,D] of the shard in the order of the squares; only the first process gets any."""
        self._landed += [self.batches.land(flight) for flight in self._started]
        processes = self.job.options.processes
        rounds = itertools.zip_longest(*processes.to_first(self._landed))
        if not processes.first:
            return []
        parts = [part for batches in rounds for part in batches if part is not None]
        h, w = self.job.grid
        return parts or [torch.empty(0, h * w, self.job.backbone.dim)]


def _squares(job: Job, start: tuple[int, int], reported: set[str]) -> Generator[_Square | _Skip, None, None]:
    """Give every square from the position `start` on, in order; a _Skip stands for an image that cannot be used."""
    first, done = start
    for index, squares in _decoded(job, first):
        name, after = job.name(index), (index + 1, 0)
        if isinstance(squares, ImageError):
            if name not in reported:
                reported.add(name)
                say(f"skipped: {squares}")
            yield _Skip(name, squares.reason, after)
            continue
        for number in range(done if index == first else 0, len(squares)):
            crop, pixels = squares[number]
            yield _Square(name, crop, pixels, (index, number + 1) if number + 1 < len(squares) else after)


def _decoded(job: Job, first: int) -> Iterator[_Decoded]:
    """Give the images from number `first` on, in order.

    Several processes take turns at decoding, a batch of images each.
    """
    count, processes, images = job.batch_size, job.options.processes, range(first, job.images)
    if processes.size == 1:
        yield from _decoded_ahead(job, images)
        return
    turns = range(0, len(images), count * processes.size)
    share = itertools.chain.from_iterable(images[turn + processes.rank * count :][:count] for turn in turns)
    with closing(_decoded_ahead(job, share)) as decoded:
        for _ in turns:
            for part in processes.all(list(itertools.islice(decoded, count))):
                yield from part


def _decoded_ahead(job: Job, images: Iterable[int]) -> Generator[_Decoded, None, None]:
    """Give `images` in order, decoded about a batch ahead of the reader."""
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    return ahead(lambda index: (index, job.squares(index)), images, threads=threads, waiting=threads + job.batch_size)
