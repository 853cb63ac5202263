"""Shards of features, one after another: images decoded in threads, their squares in batches through the backbone.

Several processes make one store together, the same to the byte as one makes alone. Where a shard starts depends on every image before it,
on its shape and on whether it can be read, so shards cannot be shared out ahead. Decoding and batches are: each process decodes a part
of the images and hands the squares to all, so that all form the same batches; each takes one batch of every round through the backbone;
the first process collects the features of a shard and writes it.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..datasets.images import ImageError
from ..system.ahead import ahead
from ..system.host import keep_freed_memory
from ..system.progress import Bar
from .batches import Batches, Flight, TooLarge
from .store import Contents

if TYPE_CHECKING:
    from .job import Job

THREADS = 16  # that decode, at most


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


_Decoded = tuple[
    int, "list[tuple[tuple[int, int], np.ndarray]] | ImageError"
]  # an image's number and its squares with their places


def produce(job: Job, start: tuple[int, int], progress: bool) -> Iterator[tuple[Contents, list[Tensor]]]:
    """Shard after shard, from the position `start` to the end of the dataset; the features for the first process alone."""
    keep_freed_memory()
    bar = Bar(total=len(job.dataset), initial=start[0], desc="extract", unit="image", disable=not progress)
    batches = Batches(job.backbone, job.grid, job.mirror, job.tally)
    named: set[str] = set()  # what was said to be skipped, which a shard that is begun anew does not say again
    squares = _squares(job, start, named)
    began = time.perf_counter()
    try:
        with bar:
            while start[0] < len(job.dataset):
                try:
                    made = _next_shard(job, batches, squares, start, bar)
                except TooLarge:
                    made = None
                if (
                    made is None
                ):  # the whole shard anew, so that one that is made after an interruption has the same batches
                    squares.close()
                    job = job.halved()
                    squares = _squares(job, start, named)
                    say(
                        f"batch      {job.batch_size} squares: more do not fit into the memory of {job.backbone.device}"
                    )
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
    job: Job, batches: Batches, squares: Iterator[_Square | _Skip], start: tuple[int, int], bar: Bar
) -> tuple[Contents, list[Tensor]]:
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

    def __init__(self, job: Job, batches: Batches):
        self.job, self.batches = job, batches
        self._started: deque[Flight] = deque()
        self._landed: list[Tensor] = []

    def take(self, squares: list[_Square]) -> None:
        """This process's batch of a round goes on its way; there is none in a short round that ends before its turn."""
        size, processes = self.job.batch_size, self.job.processes
        own, fits = squares[processes.rank * size :][:size], True
        try:
            if own:
                self._started.append(
                    self.batches.start([square.pixels for square in own], [square.name for square in own])
                )
        except TooLarge:
            fits = False
        if processes.largest(int(not fits)):
            raise TooLarge
        while len(self._started) > 1:  # one stays in flight while the next is put together
            self._landed.append(self.batches.land(self._started.popleft()))

    def features(self) -> list[Tensor]:
        """Parts [n,P,D] of the shard in the order of the squares, for the first process; at least one, and none for the others."""
        self._landed += [self.batches.land(flight) for flight in self._started]
        rounds = itertools.zip_longest(*self.job.processes.to_first(self._landed))
        if not self.job.processes.first:
            return []
        parts = [part for batches in rounds for part in batches if part is not None]
        h, w = self.job.grid
        return parts or [torch.empty(0, h * w, self.job.backbone.dim)]


def _squares(job: Job, start: tuple[int, int], named: set[str]) -> Iterator[_Square | _Skip]:
    """Every square from the position `start` on, in order; images that cannot be used come as a _Skip, and are said unless `named`."""
    first, done = start
    for index, squares in _decoded(job, first):
        name, after = job.dataset.names[index], (index + 1, 0)
        if isinstance(squares, ImageError):
            if name not in named:
                named.add(name)
                say(f"skipped: {squares}")
            yield _Skip(name, squares.reason, after)
            continue
        for number in range(done if index == first else 0, len(squares)):
            crop, pixels = squares[number]
            yield _Square(name, crop, pixels, (index, number + 1) if number + 1 < len(squares) else after)


def _decoded(job: Job, first: int) -> Iterator[_Decoded]:
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


def _decoded_ahead(job: Job, images: Iterable[int]) -> Iterator[_Decoded]:
    """In order, decoded ahead of the reader by about a batch."""
    threads = job.tally.threads = min(THREADS, os.cpu_count() or 1)
    return ahead(lambda index: (index, job.decode(index)), images, threads=threads, waiting=threads + job.batch_size)


def say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above the bar, not through it
