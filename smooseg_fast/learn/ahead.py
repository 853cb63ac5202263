"""Inputs of a captured step, put on the device beside the steps before it. Imports torch and smooseg_kernels alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import Draws, Marks, Schedule, Settings

STEPS_AHEAD = 64  # that are drawn at once
NUMBERS_AHEAD = 1 << 22  # random numbers that are drawn at once, so that large batches do not take much memory


class DrawsAhead:
    """Draws of S steps at a time on the device, and a counter there that points at the next step's.

    The next S are made on a stream of their own while the steps of these run, so a replay waits for neither the host
    nor a copy.

    Args:
        draw: (first step, S) -> draws with [S,...] on the device.
        first: the step that comes first.
    """

    def __init__(self, draw: Callable[[int, int], Draws], steps: int, first: int, device: torch.device):
        self._draw, self.steps = draw, steps
        self._stream = torch.cuda.Stream(device)
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._pointed_at: int | None = None  # the step that the counter points at
        self._first = first - first % steps
        draws = draw(self._first, steps)
        self._like = draws.map(lambda value: torch.empty_like(value[0], device="meta"))
        self._block = packed(draws)  # of the steps from _first; a graph reads it where it lies
        self._next = self._draw_ahead(self._first + steps)

    def seek(self, step: int) -> None:
        """Makes `take` give the draws of a step."""
        first = step - step % self.steps
        if first != self._first:
            if first != self._next[0]:
                self._next = self._draw_ahead(first)
            torch.cuda.current_stream().wait_stream(self._stream)
            self._block.copy_(self._next[1])
            self._first, self._next = first, self._draw_ahead(first + self.steps)
        if step != self._pointed_at:
            self._counter.fill_(step - first)
        self._pointed_at = step

    def take(self) -> Draws:
        """The draws that the counter points at, which it then leaves. A graph can capture it."""
        row = self._block.index_select(0, self._counter)[0]
        self._counter += row[:1]
        return unpacked(row, self._like)

    def taken(self, step: int | None) -> None:
        """Tells that the counter moved on from `step`; None: that it may point anywhere."""
        self._pointed_at = None if step is None or (step + 1) % self.steps == 0 else step + 1

    def _draw_ahead(self, first: int) -> tuple[int, Tensor]:
        # after the copies of the draws before, whose memory these may get
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            return first, packed(self._draw(first, self.steps))


def packed(draws: Draws) -> Tensor:
    """Draws of S steps as one tensor int64 [S,N], so that a step's are one read.

    A row starts with the way to the next one, or from the last to the first: a graph that is replayed alone stays
    inside.
    """
    S = len(draws.partner)
    columns = [draws.partner.new_ones(S, 1)]
    columns[0][-1] = 1 - S
    for value in draws.tensors():
        numbers = value.reshape(S, -1).view(torch.uint8)
        columns.append(F.pad(numbers, (0, -numbers.shape[1] % 8)).view(torch.int64))
    return torch.cat(columns, 1)


def unpacked(row: Tensor, like: Draws) -> Draws:
    """The draws of one step from its row of `packed`, with the shapes and types of `like`."""
    place = 1

    def part(value: Tensor) -> Tensor:
        nonlocal place
        words = row[place : place + -(-value.nbytes // 8)]
        place += len(words)
        return words.view(value.dtype)[: value.numel()].view(value.shape)

    return like.map(part)


class BatchesAhead:
    """Batches [B,...] that are read on the host, in one tensor [2B,...] on the device: even steps, then odd ones.

    A batch is copied on a stream of its own, from pinned memory, while the step before it runs.

    Args:
        read: int64 [B] row numbers -> [B,...] on the CPU.
        step, rows: the step that comes first, and its rows.
    """

    def __init__(self, read: Callable[[Tensor], Tensor], step: int, rows: Tensor, device: torch.device):
        batch = read(rows)
        self._read, self._stream = read, torch.cuda.Stream(device)
        self._copied, self._used = ([torch.cuda.Event(), torch.cuda.Event()] for _ in "12")
        self._host = [torch.empty_like(batch).pin_memory() for _ in "12"]
        self.values = batch.new_empty(2 * len(batch), *batch.shape[1:], device=device)
        self._halves = self.values.split(len(batch))
        self._stream.wait_stream(torch.cuda.current_stream())  # its memory may have been another tensor's
        self._steps: list[int | None] = [None, None]  # whose batches the halves hold
        self._send(step, batch)

    def put(self, step: int, rows: Tensor) -> None:
        """Reads the batch of a step and starts its copy, unless it was put before."""
        if self._steps[step % 2] != step:
            self._send(step, self._read(rows))

    def seek(self, step: int) -> None:
        """Makes the device wait for the batch of a step."""
        torch.cuda.current_stream().wait_event(self._copied[step % 2])

    def taken(self, step: int) -> None:
        """Tells that all work on the batch of a step was queued."""
        self._used[step % 2].record()

    def _send(self, step: int, batch: Tensor) -> None:
        half = step % 2
        self._copied[half].synchronize()  # the host's memory holds an earlier batch until its copy is over
        self._host[half].copy_(batch)
        self._stream.wait_event(self._used[half])
        with torch.cuda.stream(self._stream):
            self._halves[half].copy_(self._host[half], non_blocking=True)
            self._copied[half].record()
        self._steps[half] = step


class Inputs:
    """Gives a captured step its inputs: features on the device, and draws whose rows are those features'.

    Args:
        features: [N,P,D] on the device, or a function that reads rows on the host.
        valid: as for `loop.Loop`; where it is a function, the answer for the first step decides `masked`.
        sizes: (P, D).
        step: the step that comes first.
    """

    def __init__(
        self,
        features: Tensor | Callable[[Tensor], Tensor],
        sizes: tuple[int, int],
        schedule: Schedule,
        settings: Settings,
        *,
        valid: Marks,
        step: int,
        device: torch.device,
    ):
        self._sizes, self._schedule, self._settings, self._device = sizes, schedule, settings, device
        self._batches: list[BatchesAhead] = []
        marks = valid if isinstance(valid, Tensor) else None
        if not isinstance(features, Tensor):
            rows = schedule.rows_of(step)
            self._batches.append(BatchesAhead(features, step, rows, device))
            features = self._batches[0].values
            if callable(valid) and valid(rows) is not None:
                read = cast(Callable[[Tensor], Tensor], valid)  # for as long as these inputs serve
                self._batches.append(BatchesAhead(read, step, rows, device))
                marks = self._batches[1].values
        self.features, self.valid, self.masked = features, marks, marks is not None
        numbers = schedule.batch_size * (sizes[0] + 3 * sizes[1])
        self.draws = DrawsAhead(self._draw, min(STEPS_AHEAD, max(1, NUMBERS_AHEAD // numbers)), step, device)
        self.seek(step)

    def seek(self, step: int) -> None:
        """Makes the draws and the batch those of a step."""
        for batches in self._batches:
            batches.put(step, self._schedule.rows_of(step))
            batches.seek(step)
        self.draws.seek(step)

    def taken(self, step: int) -> None:
        """Tells that a step was queued, and reads the next batch on the host while the device works."""
        self.draws.taken(step)
        for batches in self._batches:
            batches.taken(step)
            if self._schedule.ready(step + 1):
                batches.put(step + 1, self._schedule.rows_of(step + 1))

    def _draw(self, first: int, steps: int) -> Draws:
        schedule, numbers = self._schedule, range(first, first + steps)
        if not self._batches:
            rows = torch.stack([schedule.rows_of(number) for number in numbers])
        else:
            rows = torch.stack(
                [torch.arange(schedule.batch_size) + number % 2 * schedule.batch_size for number in numbers]
            )
        choices = schedule.choices(first, steps, *self._sizes, self._settings, self._device)
        return Draws(rows.pin_memory().to(self._device, non_blocking=True), *choices)
