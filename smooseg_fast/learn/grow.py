"""The start of a run with a tree: fine groups of the features, their tree, the number of groups, and a head to train.

The fine groups are the prototypes of an untrained head, which k-means of the features gives. They stay what they are,
so that any number of groups can be looked up in their tree later. Training starts from one prototype for each group.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import smooseg_kernels as sk
from smooseg_kernels.rows import unit_rows

from ..features.sample import batches, evenly_spaced
from ..features.store import FeatureStore
from ..segment.checkpoint import Fine, head_of
from ..segment.model import Head, project
from ..segment.numbers import PARTS, REFERENCE, Number, choose_number, splits
from ..segment.tree import Moments, Tree

SHARE, TEMPER = 0.25, 0.1  # of the image means that leave the rows, and of the linkage: see segment/tree
SQUARES = 1024  # of the store, at most, whose patches are counted


class Grown(NamedTuple):
    """Fine groups and their tree, the sum of the features of each, [K0,D], and the reasons for a number of groups."""

    fine: Fine
    sums: Tensor
    number: Number

    def head(self, groups: int) -> Head:
        """The fine head with a prototype for each of so many groups: the code of its mean feature."""
        labels = torch.from_numpy(self.fine.tree.cut(groups)).to(self.sums.device)
        means = F.one_hot(labels).mT.to(self.sums) @ self.sums  # up to their lengths
        rows = unit_rows(project(self.fine.head, means[None].to(self.fine.head.teacher))[0])
        return head_of(self.fine.head.state_dict() | {"student": rows, "teacher": rows}).to(rows.device)

    def why(self, asked: int | None) -> str:
        """The reasons for the number of groups, in words."""
        if asked is not None:
            return "as asked"
        sure = f"; {100 * self.number.sure:.0f} % of halves of the images agree" if self.number.agreement else ""
        others = " or ".join(map(str, self.number.others))
        return f"chosen without labels{sure}" + (f"; next best {others}" if others else "")

    def reasons(self, groups: int, asked: int | None) -> dict[str, Any]:
        """For the report: how many groups there are, of how many, and why."""
        number = self.number._asdict() if asked is None else None
        return {
            "groups": groups,
            "fine": len(self.fine.tree),
            "most": self.fine.most,
            "why": self.why(asked),
            "number": number,
        }


def grow(head: Head, store: FeatureStore) -> Grown:
    """The tree of a head's prototypes by its labels; a prototype that labels nothing leaves."""
    parts = moments_of_parts(head, store)
    moments = functools.reduce(operator.add, parts)
    kept = np.flatnonzero(moments.shares)
    if len(kept) < len(moments.shares):
        rows = torch.from_numpy(kept).to(head.teacher.device)
        state = head.state_dict()
        head = head_of(state | {name: state[name][rows] for name in ("student", "teacher")}).to(head.teacher.device)
        parts = [part.of(kept) for part in parts]
        moments = moments.of(kept)
    fine = Fine(head, tree_of(moments))
    return Grown(fine, moments.sums.to(head.teacher.device), choose(parts, moments, fine.tree))


@torch.no_grad()
def moments_of_parts(head: Head, store: FeatureStore) -> list[Moments]:
    """The moments of a head's labels over PARTS parts of the images; squares of an image are in one part."""
    parts = [Moments(len(head.teacher), store.D) for _ in range(PARTS)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(store.names))}
    images = [numbers[store.names[row]] % PARTS for row in evenly_spaced(len(store), SQUARES).tolist()]
    first = 0
    for features, valid in batches(store, head.teacher.device, SQUARES):
        unit, labels = unit_rows(features.float()), sk.assign(project(head, features), head.teacher)
        of_batch = torch.tensor(images[first : first + len(features)], device=unit.device)
        first += len(features)
        for part in of_batch.unique().tolist():
            of_part = of_batch == part
            parts[part].add(unit[of_part], labels[of_part], None if valid is None else valid[of_part])
    return parts


def tree_of(moments: Moments) -> Tree:
    return Tree.grow(moments.centred(SHARE), moments.shares, TEMPER)


def choose(parts: Sequence[Moments], moments: Moments, tree: Tree) -> Number:
    """The number of groups, chosen without labels."""

    def cuts(tree: Tree) -> list[np.ndarray]:
        return [tree.cut(groups) for groups in range(1, min(REFERENCE, len(tree.splits()) + 1) + 1)]

    halves = []
    for first in splits(PARTS):
        one, other = (
            functools.reduce(operator.add, (part for part, here in zip(parts, first) if here == side))
            for side in (True, False)
        )
        if one.images and other.images:
            halves.append((cuts(tree_of(one)), cuts(tree_of(other))))
    return choose_number(cuts(tree), moments.pairs("all", 0.0).closeness, moments.shares, halves)
