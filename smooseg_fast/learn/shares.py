"""Whole heads shared among processes: which of them each one learns, and how the first gathers them.

Every process takes every step, with the same batches and draws, so its heads learn what they would learn side by side
with all others. A run of one head is the same bit for bit with any number of processes of as many threads each. Several
heads share matrix products, whose last bits depend on how many heads there are: after 200 steps of 3 and 2 heads in
place of 5 (B 16, P 196, D 104, CPU), losses were equal and weights differed by at most 1e-6 of the largest one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..system.processes import Processes

COMMON = ("mean",)  # losses without a head axis


class Shares:
    """The heads of a run in order, in one part for each process; the first parts have one head more if need be."""

    def __init__(self, heads: int, processes: Processes):
        fewest, extra = divmod(heads, processes.size)
        self.lengths = [fewest + (rank < extra) for rank in range(processes.size)]
        first = sum(self.lengths[: processes.rank])
        self.part = slice(first, first + self.lengths[processes.rank])  # of this process
        self.processes = processes

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of all heads' `tensors` [H,...]. Those without a head axis stay."""
        return {name: value[self.part] if has_heads(name, value) else value for name, value in tensors.items()}

    def everywhere(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All heads' tensors, on every process: `of` undone. A process without a head may give none."""
        if self.processes.size == 1:
            return dict(tensors)
        gathered = self.processes.all({name: value.detach().cpu() for name, value in tensors.items()})
        parts = [part for part in gathered if part]
        return {
            name: torch.cat([part[name] for part in parts]) if has_heads(name, value) else value
            for name, value in parts[0].items()
        }


def has_heads(name: str, value: Tensor) -> bool:
    return value.ndim > 0 and name not in COMMON
