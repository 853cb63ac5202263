"""The processes that torchrun starts for one run: their ranks, their exchanges, their end.

Imports torch alone. A process by itself is a group of one, for which everything here returns at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

LAUNCHER = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun sets
LOOK_S, LAST_S = 0.5, 30.0
PATIENCE_S = 2.0  # for the first process to say why the run ends


class Processes:
    """A process and its place among those of its run.

    All processes call an exchange at the same point and wait there for each other. If one is gone, the others end with
    a UserError. Everything travels between hosts, whatever device computes.

    Args:
        rank: number of this process, 0 to size - 1. Process 0 alone writes files and prints.
        local_rank: number among the processes of the same machine, and so of its card.
        store: the key-value store that torchrun keeps for its processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: dist.Store | None = None):
        self.rank, self.size, self.local_rank, self._store = rank, size, local_rank, store
        self._counters = 0
        self.ending = False  # the reason to end is known, so SIGTERM adds nothing

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """`name` for one process; for several cpu, or a card each. UserError for a device that cannot serve them."""
        if self.size == 1 or name == "cpu":
            return name
        cards = torch.cuda.device_count()
        if name != "cuda" or self.local_rank >= cards:
            raise UserError(
                f"--device {name}: each of {self.size} processes needs a CUDA card of its own, and this machine has "
                f"{cards}; give cuda and start as many processes as it has cards, or give cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    # exchanges

    def all(self, value: Any) -> list[Any]:
        """Return the `value` of every process, in order of rank."""
        values = [value] * self.size
        if self.size > 1:
            with self._exchange():
                dist.all_gather_object(values, value)
        return values

    def sum(self, counts: Tensor) -> Tensor:
        """Return the sum over processes of integer `counts` on the CPU, which is exact."""
        return torch.stack(self.all(counts)).sum(0)

    def largest(self, number: int) -> int:
        return max(self.all(number))

    def decide(self, answer: Any) -> Any:
        """Return the first process's answer."""
        return self.all(answer)[0]

    def counter(self) -> Callable[[int], int]:
        """A counter that all processes share: it takes what to add and returns the sum. All make one at the same point
        of their work; counting waits for nobody."""
        self._counters += 1
        name, alone = f"counter {self._counters}", 0

        def add(more: int) -> int:
            nonlocal alone
            alone += more
            if self._store is not None:
                with contextlib.suppress(RuntimeError):  # the store is gone, and the next exchange will say so
                    return self._store.add(name, more)
            return alone

        return add

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            with self._exchange():
                dist.barrier()  # the last exchange of a run: with `all` in its place, Python's end aborted now and then

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.ending = True
            raise UserError(
                f"another process of this run ended, or cannot be reached from process {self.rank} of {self.size}; "
                "what was saved is kept, and the same command resumes from it"
            ) from error

    # the end

    def last_word(self, patience: float = 0) -> bool:
        """True for the first process to ask, which says why the run ends. Others get `patience` seconds to ask."""
        if self._store is None:
            return True
        self.ending = True
        if patience:
            self.leave()  # a process that waits for this one in an exchange could not speak
            with contextlib.suppress(RuntimeError):  # nobody asked
                self._store.wait(["last word"], timedelta(seconds=patience))
        try:
            return self._store.add("last word", 1) == 1
        except RuntimeError:  # the store is gone, and so is whoever kept it
            return True

    def leave(self) -> None:
        """Leave the group; no exchange may follow."""
        self.ending = True
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def first_heard(self) -> Iterator[None]:
        """Discard what other processes than the first print to stdout and stderr."""
        if self.first:
            yield
            return
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


ALONE = Processes()


def end_with_parent() -> None:
    """Send this process SIGTERM once its parent, torchrun, is gone, and end it LAST_S later if it still lives."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_S)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """This process among those that torchrun started; ALONE without torchrun."""
    if LAUNCHER - os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    end_with_parent()
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group("gloo", store=dist.PrefixStore("exchanges", store), rank=rank, world_size=size)
    group = Processes(rank, size, int(os.environ.get("LOCAL_RANK", rank)), store)
    try:
        yield group
    finally:
        group.leave()
