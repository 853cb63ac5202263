"""Counts operations that PyTorch dispatches and bytes of their tensors: no clock, and no memory on device "meta"."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counter(TorchDispatchMode):
    """Counts everything within it, forward and backward: operations, largest new tensor, peak of all alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.largest_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in old and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, storage._cdata)
                self.largest_bytes = max(self.largest_bytes, storage.nbytes())
                self.peak_bytes = max(self.peak_bytes, sum(self._sizes.values()))
        return out


def count(run: Callable[[], object]) -> Counter:
    with Counter() as counter:
        run()
    return counter
