"""Counts instead of clocks: how many operations PyTorch dispatches, and the bytes of the tensors they make.

Tensors without memory (device "meta") count alike, so what an implementation would hold is known where it cannot be run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Counts:
    operations: int = 0
    largest_bytes: int = 0  # of one new tensor
    peak_bytes: int = 0  # of all new tensors that live at one time


class Counter(TorchDispatchMode):
    """Counts what happens within it, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self._alive, self._sizes = Counts(), 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        self.counts.operations += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), old)
        return out

    def _add(self, storage: torch.UntypedStorage, old: set[int]) -> None:
        key = storage._cdata
        if key in old or key in self._sizes:
            return
        size = self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._remove, key)
        self._alive += size
        self.counts.largest_bytes = max(self.counts.largest_bytes, size)
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._alive)

    def _remove(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)


def count(run: Callable[[], object]) -> Counts:
    with Counter() as counter:
        run()
    return counter.counts
