"""Several processes that learn one model together, as torchrun starts them: who they are, what they exchange, how they end.

Imports torch alone. A process by itself is a group of one, for which everything here returns at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from .signals import Interrupted

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
PATIENCE = 2.0  # seconds for the first process to say why the run ends


class Processes:
    """A process and its place among those of its run.

    An exchange is called by all processes at the same point, and they wait there for each other. One that is gone ends the others with a
    UserError.

    Args:
        rank: of this process, 0 to size - 1. The first alone writes files and is heard.
        local_rank: among those of the same machine, which is the number of its card.
        store: what torchrun keeps for its processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: dist.Store | None = None):
        self.rank, self.size, self.local_rank, self._store = rank, size, local_rank, store
        self.ending = False  # whether the reason to end is known, so that SIGTERM adds nothing to it

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """`name` for one process; for several the cpu, or a card for each. UserError for what cannot be shared out."""
        if self.size == 1 or name == "cpu":
            return name
        if name != "cuda":
            raise UserError(
                f"--device {name}: cannot serve {self.size} processes; give cuda, where each has its own card, or cpu"
            )
        cards = torch.cuda.device_count()
        if self.local_rank >= cards:
            raise UserError(
                f"--device cuda: {cards} cards, and each process needs one; start as many, or give --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    # exchanges

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The average over processes of each of `tensors`, which share dtype and device, in one message; equal bit for bit on all."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        with self._exchange():
            dist.all_reduce(flat)
        flat /= self.size
        return [
            part.view(tensor.shape) for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors)
        ]

    def sum(self, counts: Tensor) -> Tensor:
        """Of integers, and so exact."""
        if self.size == 1:
            return counts
        total = counts.clone()
        with self._exchange():
            dist.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        """Goes from host to host, whatever computes."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        with self._exchange():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Until all have come here."""
        self.largest(0)

    def as_first(self, tensors: Sequence[Tensor]) -> None:
        """In place: the first process's values for all."""
        if self.size > 1:
            with self._exchange():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def decide(self, answer: bool) -> bool:
        """The first process's answer, for all."""
        held = torch.tensor(answer)
        self.as_first([held])
        return bool(held)

    def all(self, value: Any) -> list[Any]:
        """The `value` of every process, in their order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self._exchange():
            dist.all_gather_object(values, value)
        return values

    def to_first(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The contiguous CPU `tensors` of every process, in their order, for the first; the others get nothing."""
        if self.size == 1:
            return [list(tensors)]
        kinds = self.all([(tensor.shape, tensor.dtype) for tensor in tensors])
        with self._exchange():  # as bytes: pickled they would take four times as long
            if not self.first:
                for tensor in tensors:
                    dist.send(tensor.flatten().view(torch.uint8), 0)
                return []
            found = [list(tensors)]
            for source in range(1, self.size):
                found.append([torch.empty(shape, dtype=dtype) for shape, dtype in kinds[source]])
                for tensor in found[-1]:
                    dist.recv(tensor.flatten().view(torch.uint8), source)
            return found

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.ending = True
            detail = (str(error).splitlines() or [type(error).__name__])[0].rpartition("] ")[2].partition(". ")[0]
            raise UserError(
                f"another process of this run ended, or cannot be reached from process {self.rank} of {self.size} ({detail}); "
                "what was saved is kept: the same command goes on from it"
            ) from error

    # the end

    def last_word(self, patience: float = 0) -> bool:
        """Whether this process is to say why the run ends: the first that asks. Others get `patience` seconds to ask before it."""
        if self._store is None:
            return True
        self.ending = True
        if patience:
            self.leave()  # one that waits for this process in an exchange could not speak
        try:
            limit = time.monotonic() + patience
            while time.monotonic() < limit and not self._store.check(["last word"]):
                time.sleep(0.02)
            return self._store.add("last word", 1) == 1
        except RuntimeError:  # the store is gone, and so is whoever kept it
            return True

    def leave(self) -> None:
        """No exchange comes after it."""
        self.ending = True
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def first_heard(self) -> Iterator[None]:
        """What any other process prints within, on either stream, goes nowhere."""
        with contextlib.ExitStack() as stack:
            if not self.first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield


ALONE = Processes()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """This process among those that torchrun started, within the context; without torchrun, ALONE.

    Tensors on the CPU go by gloo and those on a card by NCCL. SIGTERM, which torchrun sends to all when one ends, raises Interrupted.
    """
    if any(name not in os.environ for name in LAUNCHER) or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    store, rank, size = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("exchanges", store), rank=rank, world_size=size)
    group = Processes(rank, size, int(os.environ.get("LOCAL_RANK", rank)), store)

    def stop(number: int, _frame: Any) -> None:
        if not group.ending:
            raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield group
    finally:
        group.leave()
        signal.signal(signal.SIGTERM, before)
