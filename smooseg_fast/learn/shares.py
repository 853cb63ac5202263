"""Whole heads shared among processes: which of them each one learns, and how the first gathers them.

Every process takes every step, with the same batches and draws, so its heads learn what they would learn side by side
with all others. A run of one head is the same bit for bit with any number of processes. Several heads share matrix
products, whose last bits depend on how many heads there are: after 200 steps of 3 and 2 heads in place of 5 (B 16, P
196, D 104, CPU), losses were equal and weights differed by at most 1e-6 of the largest one. A product for each head
alone would make a step of 5 heads 8 % slower.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..segment.model import Heads
from ..system.processes import Processes


class Shares:
    """The heads of a run in order, in one part for each process; the first parts have one head more if need be."""

    def __init__(self, heads: int, processes: Processes):
        heads_each, extra = divmod(heads, processes.size)
        first = processes.rank * heads_each + min(processes.rank, extra)
        self.part = slice(first, first + heads_each + (processes.rank < extra))
        self.heads, self.processes = heads, processes

    def line(self) -> str | None:
        """Say what the processes do; None for one process."""
        size, heads = self.processes.size, self.heads
        if size == 1:
            return None
        if size > heads:
            helpers = size - heads
            learnt = "the one head is" if heads == 1 else f"the {heads} heads are"
            others = "the other helps" if helpers == 1 else f"the other {helpers} help"
            return f"{size}: {learnt} learnt by {heads} of them; {others} with features and evaluation only"
        most = -(-heads // size)
        number = f"{most}" if heads % size == 0 else f"{most - 1} or {most}"
        return f"{size}: each learns {number} of the {heads} heads; they share features and evaluation"

    def of(self, tensors: Mapping[str, Tensor], common: Collection[str] = ()) -> dict[str, Tensor]:
        """This process's rows of all heads' `tensors` [H,...]. Scalars and `common` ones have no rows and stay."""
        return {
            name: value if name in common or not value.ndim else value[self.part] for name, value in tensors.items()
        }

    def to_first(self, tensors: Mapping[str, Tensor], common: Collection[str] = ()) -> dict[str, Tensor]:
        """All heads' tensors for the first process, and nothing for the others: `of` undone."""
        if self.processes.size == 1:
            return dict(tensors)
        gathered = self.processes.to_first([value.detach().cpu().contiguous() for value in tensors.values()])
        columns = zip(*[part for part in gathered if part])
        return {
            name: column[0] if name in common or not column[0].ndim else torch.cat(column)
            for name, column in zip(tensors, columns)
        }

    def everywhere(self, heads: Heads | None, device: torch.device) -> Heads:
        """All heads of the run, on every process. heads: those that this one learns, None for no head."""
        if heads is not None and self.processes.size == 1:
            return heads
        state = {} if heads is None else {name: value.cpu() for name, value in heads.state_dict().items()}
        parts = [part for part in self.processes.all(state) if part]
        return Heads.from_state({name: torch.cat([part[name] for part in parts]) for name in parts[0]}).to(device)
