"""Counts operations that PyTorch dispatches and bytes of their tensors: no clock, and no memory on device "meta"."""

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
    largest_bytes: int = 0  # the largest new tensor
    peak_bytes: int = 0  # all new tensors that live at one time


class Counter(TorchDispatchMode):
    """Counts everything within it, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self._sizes = Counts(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        self.counts.operations += 1
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in old and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, storage._cdata)
                self.counts.largest_bytes = max(self.counts.largest_bytes, storage.nbytes())
                self.counts.peak_bytes = max(self.counts.peak_bytes, sum(self._sizes.values()))
        return out


def count(run: Callable[[], object]) -> Counts:
    with Counter() as counter:
        run()
    return counter.counts
