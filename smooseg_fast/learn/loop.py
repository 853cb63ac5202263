"""Training steps on cached features, one by one or from a CUDA graph. Imports torch and smooseg_kernels alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

import smooseg_kernels as sk

from ..segment.model import Heads
from .schedule import Draws, Schedule, Settings
from .step import make_optimizer, train_step

WARM_UP_STEPS = 3  # before a capture; their changes are put back


class Captured(NamedTuple):
    """One recorded step; a replay overwrites the losses."""

    graph: torch.cuda.CUDAGraph
    losses: sk.SmooSegLoss


class Loop:
    """H heads, their optimiser and the features they learn from.

    Args:
        heads: on the device that computes.
        features: [N,P,D] on that device, or a function from int64 [B] row numbers to [B,P,D] on the CPU. 16-bit
            features make the projection's products bf16, except fp16 on a CPU; others have the heads' own dtype.
        sizes: (P, D).
        thresholds: [H,2] of every head, within images and across.
        lr, lr_prototypes: Adam's learning rates of projection and student.
        capture: replay whole steps from a CUDA graph; default: on a GPU.
    """

    def __init__(
        self,
        heads: Heads,
        features: Tensor | Callable[[Tensor], Tensor],
        sizes: tuple[int, int],
        schedule: Schedule,
        thresholds: Tensor,
        settings: Settings,
        *,
        lr: float,
        lr_prototypes: float,
        capture: bool | None = None,
    ):
        self.heads, self.features, self.sizes, self.schedule, self.settings = heads, features, sizes, schedule, settings
        self.device = heads.student.device
        self.thresholds = thresholds.to(self.device)
        self.capture = self.device.type == "cuda" if capture is None else capture
        self.optimizer = make_optimizer(heads, lr, lr_prototypes)
        self.not_captured: str | None = None  # why steps run one by one though a capture was asked for
        self._captured: Captured | None = None
        self._inputs: list[Tensor] = []  # read by a replay: the draws, then the batch where features are not resident
        self._ahead: tuple[int, Draws] | None = None

    def step(self, number: int) -> sk.SmooSegLoss:
        """Runs step `number`, from 0. Nothing waits for a GPU.

        Returns:
            The losses as device tensors, which the next step may overwrite.
        """
        draws = self._draws(number)
        if not self.capture:
            return self._work(draws, self._batch(draws))
        if self._captured is None:
            try:
                self._captured = self._record(draws)
            except RuntimeError as error:
                self.capture, self.not_captured = False, str(error).splitlines()[0]
                return self.step(number)
        for held, fresh in zip(self._inputs, self._changing(draws)):
            held.copy_(fresh, non_blocking=True)
        self._captured.graph.replay()
        if self.schedule.ready(number + 1):
            self._ahead = number + 1, self._draw(number + 1)  # on the host, while the device works
        return self._captured.losses

    def _draws(self, number: int) -> Draws:
        return self._ahead[1] if self._ahead is not None and self._ahead[0] == number else self._draw(number)

    def _draw(self, number: int) -> Draws:
        device = torch.device("cpu") if self.capture else self.device
        return self.schedule.draws(number, *self.sizes, self.settings, device)

    def _batch(self, draws: Draws) -> Tensor:
        if isinstance(self.features, Tensor):
            batch = self.features.index_select(0, draws.rows.to(self.device))  # indexing is slower by a third
            wide = self.device.type == "cpu" and batch.dtype != torch.bfloat16
            return batch.to(self.heads.student.dtype) if wide else batch
        return self.features(draws.rows).to(self.device)

    def _work(self, draws: Draws, features: Tensor) -> sk.SmooSegLoss:
        return train_step(self.heads, self.optimizer, features, draws, self.thresholds, self.settings)

    # capture

    def _changing(self, draws: Draws) -> list[Tensor]:
        """The inputs of a replay, on the host. A batch that is not resident is pinned, so that its copy overlaps."""
        batch = [] if isinstance(self.features, Tensor) else [self.features(draws.rows).pin_memory()]
        return draws.tensors() + batch

    def _record(self, draws: Draws) -> Captured:
        """Captures one step. The steps that warm up change heads and optimiser, which are put back in place."""
        fixed = draws.map(lambda value: value.to(self.device, copy=True))
        batch = None if isinstance(self.features, Tensor) else self._batch(draws)
        self._inputs = fixed.tensors() + ([] if batch is None else [batch])

        def work() -> sk.SmooSegLoss:
            return self._work(fixed, self._batch(fixed) if batch is None else batch)

        stream = torch.cuda.Stream()
        with self.undone():
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP_STEPS):
                        work()
            finally:
                torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = work()
        return Captured(graph, losses)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Undoes in place what steps inside change. Adam's moments and counts become 0 where it had none."""

        def state() -> list[Tensor]:
            moments = (value for state in self.optimizer.state.values() for value in state.values())
            return [*self.heads.state_dict().values(), *moments]

        before = [(tensor, tensor.clone()) for tensor in state()]
        try:
            yield
        finally:
            for tensor in state():
                tensor.zero_()
            for tensor, value in before:
                tensor.copy_(value)
            self.optimizer.zero_grad(set_to_none=True)  # gradients belong to the graph's own memory
