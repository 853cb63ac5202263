"""Training steps on cached features, one by one or from a CUDA graph. Imports torch and smooseg_kernels alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import smooseg_kernels as sk

from ..segment.model import Heads
from .ahead import Inputs
from .schedule import Draws, Marks, Schedule, Settings
from .step import make_optimizer, train_step

# numbers in a step's features, for each head, below which threads on a CPU wait for each other longer than they help
LEAST_SHARED_NUMBERS = 1 << 19
WARM_UP_STEPS = 3  # before a capture; their changes are put back


class Captured(NamedTuple):
    """One recorded step; a replay overwrites the losses."""

    graph: torch.cuda.CUDAGraph
    losses: sk.SmooSegLoss
    inputs: Inputs


class Loop:
    """H heads, their optimiser and the features they learn from.

    Args:
        heads: on the device that computes.
        features: [N,P,D] on that device, or a function from int64 [B] row numbers to [B,P,D] on the CPU. 16-bit
            features make the projection's products bf16, except fp16 on a CPU; others have the heads' own dtype.
        valid: which patches show data, bool [N,P] where the features are a tensor, or a function to [B,P] where they
            are one. None, or a function that gives None, where all do; it gives None for all rows of a window or none.
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
        valid: Marks = None,
        capture: bool | None = None,
    ):
        self.marks = valid
        self.heads, self.features, self.sizes, self.schedule, self.settings = heads, features, sizes, schedule, settings
        self.device = heads.student.device
        self.thresholds = thresholds.to(self.device)
        self.capture = self.device.type == "cuda" if capture is None else capture
        self.optimizer = make_optimizer(heads, lr, lr_prototypes)
        if self.capture:  # a replay reads the rates where they lie, so that a change of them takes effect
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], device=self.device)
        self.not_captured: str | None = None  # why steps run one by one though a capture was asked for
        self._captured: Captured | None = None
        patches = min(settings.patches or sizes[0], sizes[0])
        numbers = len(heads) * schedule.batch_size * patches * sizes[1]
        # by the sizes alone, not by the load: the number of threads changes the last bits of a result
        self._one_thread = self.device.type == "cpu" and numbers < LEAST_SHARED_NUMBERS

    def step(self, number: int) -> sk.SmooSegLoss:
        """Runs step `number`, from 0. Nothing waits for a GPU.

        Returns:
            The losses as device tensors, which the next step may overwrite.

        Raises:
            torch.OutOfMemoryError: the device's memory cannot hold a step.
        """
        if self._captured is not None and self._captured.inputs.masked != self._masked(number):
            self._captured = None  # another window of a stream
        if self.capture and self._captured is None:
            self._captured = self._capture(number)
        if self._captured is None:
            with one_thread() if self._one_thread else nullcontext():
                return self._one(number)
        graph, losses, inputs = self._captured
        inputs.seek(number)
        graph.replay()
        inputs.taken(number)
        return losses

    def _one(self, number: int) -> sk.SmooSegLoss:
        """A step that is not captured."""
        draws = self.schedule.draws(number, *self.sizes, self.settings, self.device)
        if isinstance(self.features, Tensor):
            return self._learn(self.features, self.marks if isinstance(self.marks, Tensor) else None, draws)
        rows = self.schedule.rows_of(number)
        valid = self.marks(rows) if callable(self.marks) else None
        valid = None if valid is None else valid.to(self.device)
        return self._learn(self.features(rows).to(self.device), valid, replace(draws, rows=None))

    def _learn(self, features: Tensor, valid: Tensor | None, draws: Draws) -> sk.SmooSegLoss:
        return train_step(self.heads, self.optimizer, features, draws, self.thresholds, self.settings, valid=valid)

    def _masked(self, number: int) -> bool:
        """Whether the rows that a step takes come with marks of the patches that show data."""
        if self.marks is None or isinstance(self.marks, Tensor):
            return self.marks is not None
        return self.marks(self.schedule.rows_of(number)) is not None

    # capture

    def _capture(self, number: int) -> Captured | None:
        """Captures a step, or tells in `not_captured` why it cannot be. Errors of the step itself are raised."""
        inputs = Inputs(
            self.features,
            self.sizes,
            self.schedule,
            self.settings,
            valid=self.marks,
            step=number,
            device=self.device,
        )

        def work() -> sk.SmooSegLoss:
            return self._learn(inputs.features, inputs.valid, inputs.draws.take())

        self._warm_up(number, inputs, work)
        graph, cause = torch.cuda.CUDAGraph(), None
        try:
            with torch.cuda.graph(graph):
                try:
                    losses = work()
                except Exception as error:
                    cause = error  # the end of the capture fails too, and would hide it
                    raise
        except Exception as error:
            cause = cause or error
            if not is_of_capture(cause):
                raise cause from None
            self.capture, self.not_captured = False, str(cause).splitlines()[0]
            self.optimizer.zero_grad(set_to_none=True)  # gradients belong to the graph's own memory
            return None
        return Captured(graph, losses, inputs)

    def _warm_up(self, number: int, inputs: Inputs, work: Callable[[], sk.SmooSegLoss]) -> None:
        """Takes steps that compile kernels and make Adam's state. They change nothing that outlives them."""
        stream = torch.cuda.Stream()
        with self.undone():
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP_STEPS):
                        work()
                        inputs.draws.taken(None)
                        inputs.draws.seek(number)
            finally:
                torch.cuda.current_stream().wait_stream(stream)

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Makes PyTorch work on one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_of_capture(error: Exception) -> bool:
    """Whether `error` says that something cannot be captured, and not that memory, a kernel or the device failed."""
    first_line = str(error).partition("\n")[0].lower()
    return isinstance(error, RuntimeError) and "captur" in first_line and "out of memory" not in first_line
