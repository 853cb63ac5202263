"""The steps of training on cached features, one after another or replayed from a CUDA graph. Imports torch and smooseg_kernels alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import smooseg_kernels as sk

from ..segment.model import Heads
from ..system.processes import ALONE, Processes
from .schedule import Draws, Schedule, Settings
from .step import make_optimizer, train_step

WARM_UP = 3  # steps before a capture; what they change is put back


class Loop:
    """H heads, their optimiser and the features they learn from.

    Args:
        heads: on the device that computes.
        features: [N,P,D] on that device, or a function from int64 [B] row numbers to [B,P,D] on the CPU. 16-bit features make the
            projection's products bf16, but for fp16 on a CPU; others have the heads' own type.
        sizes: (P, D).
        thresholds: [H,T].
        lr, lr_prototypes: Adam's learning rates of projection and student.
        capture: replay whole steps from a CUDA graph; by default wherever one process has the heads on a GPU.
        processes: that share every batch; `schedule` draws the part of this one.
    """

    def __init__(
        self,
        heads: Heads,
        features: Tensor | Callable[[Tensor], Tensor],
        sizes: tuple[int, int],
        schedule: Schedule,
        thresholds: Tensor,
        settings: Settings,
        lr: float,
        lr_prototypes: float,
        capture: bool | None = None,
        processes: Processes = ALONE,
    ):
        self.heads, self.features, self.sizes, self.schedule, self.settings = heads, features, sizes, schedule, settings
        self.device, self.processes = heads.student.device, processes
        self.thresholds = thresholds.to(self.device)
        self.capture = self.device.type == "cuda" and processes.size == 1 if capture is None else capture
        self.optimizer = make_optimizer(heads, lr, lr_prototypes)
        self.not_captured: str | None = None  # why steps run one by one though a capture was asked for
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[
            Tensor
        ] = []  # what a replay reads: the draws, and the batch where the features are not on the device
        self._losses: sk.SmooSegLoss | None = None
        self._ahead: tuple[int, Draws] | None = None

    def step(self, number: int) -> sk.SmooSegLoss:
        """Step `number`, from 0; -> its losses as device tensors, which the next step may overwrite. Nothing waits for a GPU."""
        draws = self._draws(number)
        if not self.capture:
            return self._work(draws, self._batch(draws))
        inputs = self._flat(draws)
        if self._graph is None:
            try:
                self._record(draws, inputs)
            except RuntimeError as error:
                self._graph, self.capture, self.not_captured = None, False, str(error).splitlines()[0]
                return self.step(number)
        for held, fresh in zip(self._inputs, inputs):
            held.copy_(fresh, non_blocking=True)
        self._graph.replay()
        if self.schedule.ready(number + 1):
            self._ahead = number + 1, self._draw(number + 1)  # on the host, while the device works
        return self._losses

    def _draws(self, number: int) -> Draws:
        return self._ahead[1] if self._ahead is not None and self._ahead[0] == number else self._draw(number)

    def _draw(self, number: int) -> Draws:
        return self.schedule.draws(
            number, *self.sizes, self.settings, torch.device("cpu") if self.capture else self.device
        )

    def _batch(self, draws: Draws) -> Tensor:
        if isinstance(self.features, Tensor):
            batch = self.features.index_select(0, draws.rows.to(self.device))  # indexing is slower by a third
            wide = self.device.type == "cpu" and batch.dtype != torch.bfloat16
            return batch.to(self.heads.student.dtype) if wide else batch
        return self.features(draws.rows).to(self.device)

    def _work(self, draws: Draws, features: Tensor) -> sk.SmooSegLoss:
        return train_step(self.heads, self.optimizer, features, draws, self.thresholds, self.settings, self.processes)

    # capture

    def _flat(self, draws: Draws) -> list[Tensor]:
        """What changes from step to step, on the host; a batch that is not resident is pinned, so that its copy overlaps."""
        batch = [] if isinstance(self.features, Tensor) else [self.features(draws.rows).pin_memory()]
        return [x for x in (draws.rows, draws.partner, draws.masks, draws.patches, *batch) if x is not None]

    def _record(self, draws: Draws, inputs: list[Tensor]) -> None:
        """One step into a graph. The steps that warm up change heads and optimiser, which are put back in place."""
        self._inputs = [x.to(self.device) for x in inputs]
        held = iter(self._inputs)
        rows, partner = next(held), next(held)
        masks = None if draws.masks is None else next(held)
        patches = None if draws.patches is None else next(held)
        batch = None if isinstance(self.features, Tensor) else next(held)
        fixed = Draws(rows, partner, masks, patches)

        def work() -> sk.SmooSegLoss:
            return self._work(fixed, self._batch(fixed) if batch is None else batch)

        before = _copies(self.heads.state_dict()), _copies(self.optimizer.state)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    work()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            _put_back(self.heads.state_dict(), before[0])
            _put_back(self.optimizer.state, before[1])
            self.optimizer.zero_grad(set_to_none=True)  # gradients belong to the graph's own memory
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._losses = work()


def _copies(state: Any) -> Any:
    """The tensors of a nested state, copied."""
    if isinstance(state, Tensor):
        return state.clone()
    return {key: _copies(value) for key, value in state.items()}


def _put_back(state: Any, before: Any) -> None:
    """In place; what was not there before starts from 0, as Adam's moments and step counts do."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            value.copy_(before[key]) if key in before else value.zero_()
        else:
            _put_back(value, before.get(key, {}))
