"""Masks as runs of equal pixels, which is what run-length encodings keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from ..datasets import IGNORE


class Runs(NamedTuple):
    """The pixels of one label in a flat image: runs of `lengths` from `starts`, int64 [n], in ascending order. No two
    touch."""

    label: int
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def pixels(self) -> int:
        return int(self.lengths.sum())

    def alternating(self, size: int) -> np.ndarray:
        """Lengths int64 of runs outside the label and of the label by turns, the first outside and perhaps 0, in an
        image of `size` pixels."""
        ends = self.starts + self.lengths
        outside = np.append(self.starts, size) - np.append(0, ends)
        lengths = np.empty(2 * len(ends) + 1, np.int64)
        lengths[::2], lengths[1::2] = outside, self.lengths
        return lengths if lengths[-1] else lengths[:-1]


def runs_of(flat: np.ndarray) -> Iterator[Runs]:
    """The runs of every label of a flat image [N], in ascending order of labels."""
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths, labels = np.diff(np.append(starts, flat.size)), flat[starts]
    order = np.argsort(labels, kind="stable")
    borders = np.flatnonzero(np.diff(labels[order])) + 1
    for part in np.split(order, borders):
        yield Runs(int(labels[part[0]]), starts[part], lengths[part])


def regions(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the connected regions of labels uint8 [H,W] -> (numbers int32 [H,W], 0 where IGNORE; labels of the
    numbers uint8 [1 + regions], the first IGNORE).

    Pixels of a region share sides, not corners alone.
    """
    numbers, owners = np.zeros(labels.shape, np.int32), [np.array([IGNORE], np.uint8)]
    count = 0
    for label, box in enumerate(ndimage.find_objects(labels.astype(np.int32) + 1)):
        if box is None or label == IGNORE:
            continue
        inside = labels[box] == label
        parts, n = ndimage.label(inside)
        np.add(parts, count, out=numbers[box], where=inside)
        owners.append(np.full(n, label, np.uint8))
        count += n
    return numbers, np.concatenate(owners)
