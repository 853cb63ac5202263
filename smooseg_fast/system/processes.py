"""The processes that torchrun starts for one run: their ranks, their exchanges, their end.

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

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them
PATIENCE_S = 2.0  # for the first process to say why the run ends


class Processes:
    """A process and its place among those of its run.

    All processes call an exchange at the same point and wait there for each other. If one is gone, the others end with
    a UserError.

    Args:
        rank: number of this process, 0 to size - 1. Process 0 alone writes files and prints.
        local_rank: number among the processes of the same machine, and so of its card.
        store: the key-value store that torchrun keeps for its processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: dist.Store | None = None):
        self.rank, self.size, self.local_rank, self._store = rank, size, local_rank, store
        self.ending = False  # the reason to end is known, so SIGTERM adds nothing

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """`name` for one process; for several cpu, or a card each. UserError for a device that cannot serve them."""
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

    def sum(self, counts: Tensor) -> Tensor:
        """The sum over processes of integer `counts`, which is exact."""
        if self.size == 1:
            return counts
        total = counts.clone()
        with self._exchange():
            dist.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        """The largest `number` of any process. It travels between hosts, whatever device computes."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        with self._exchange():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def wait(self) -> None:
        """Waits until every process is here."""
        self.largest(0)

    def as_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites `tensors` with the first process's values."""
        if self.size > 1:
            with self._exchange():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def decide(self, answer: bool) -> bool:
        """The first process's answer."""
        value = torch.tensor(answer)
        self.as_first([value])
        return bool(value)

    def all(self, value: Any) -> list[Any]:
        """The `value` of every process, in order of rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self._exchange():
            dist.all_gather_object(values, value)
        return values

    def to_first(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The contiguous CPU `tensors` of every process, in order of rank, for the first; the others get []."""
        if self.size == 1:
            return [list(tensors)]
        kinds = self.all([(tensor.shape, tensor.dtype) for tensor in tensors])
        with self._exchange():  # in bytes, because pickling would take four times as long
            if not self.first:
                for tensor in tensors:
                    dist.send(tensor.flatten().view(torch.uint8), 0)
                return []
            gathered = [list(tensors)]
            for source in range(1, self.size):
                gathered.append([torch.empty(shape, dtype=dtype) for shape, dtype in kinds[source]])
                for tensor in gathered[-1]:
                    dist.recv(tensor.flatten().view(torch.uint8), source)
            return gathered

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.ending = True
            detail = (str(error).splitlines() or [type(error).__name__])[0].rpartition("] ")[2].partition(". ")[0]
            raise UserError(
                f"another process of this run ended, or cannot be reached from process {self.rank} of {self.size} "
                f"({detail}); what was saved is kept, and the same command resumes from it"
            ) from error

    # the end

    def last_word(self, patience: float = 0) -> bool:
        """True for the first process to ask, which says why the run ends. Others get `patience` seconds to ask."""
        if self._store is None:
            return True
        self.ending = True
        if patience:
            self.leave()  # a process that waits for this one in an exchange could not speak
        try:
            limit = time.monotonic() + patience
            while time.monotonic() < limit and not self._store.check(["last word"]):
                time.sleep(0.02)
            return self._store.add("last word", 1) == 1
        except RuntimeError:  # the store is gone, and so is whoever kept it
            return True

    def leave(self) -> None:
        """Leaves the group; no exchange may follow."""
        self.ending = True
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def first_heard(self) -> Iterator[None]:
        """Discards what other processes than the first print to stdout and stderr."""
        with contextlib.ExitStack() as stack:
            if not self.first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield


ALONE = Processes()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """This process among those that torchrun started; ALONE without torchrun.

    Tensors on the CPU travel by gloo and those on a card by NCCL. SIGTERM, which torchrun sends to all when one ends,
    raises Interrupted.
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
