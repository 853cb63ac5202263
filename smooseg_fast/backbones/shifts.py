"""A picture seen several times, each time moved by half a patch, and the finer grid that the codes then make up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import SHIFTS
from ..errors import UserError


def offsets(shifts: int, patch: int) -> list[tuple[int, int]]:
    """Return pixels (down, right) by which the windows of each view are moved.

    One view is not moved. Otherwise views lie half a patch apart, about the place of the one: two on the diagonal, or
    four. UserError for a number other than 1, 2 and 4, and for a patch with an odd number of pixels.
    """
    SHIFTS(shifts, "--shifts")
    if shifts == 1:
        return [(0, 0)]
    if patch % 2:
        raise UserError(f"--shifts {shifts}: the backbone's patch of {patch} pixels has no half; leave --shifts out")
    low = -(patch // 4)
    high = low + patch // 2
    return [(low, low), (high, high), (low, high), (high, low)][:shifts]


def density(shifts: int) -> int:
    """Return the cells of the grid per patch and axis."""
    return 1 if shifts == 1 else 2


def interleaved(views: Sequence[Tensor] | Tensor, patch: int) -> Tensor:
    """Join codes [...,h,w,Z] at `offsets` -> [...,2h,2w,Z] on a regular grid of half patches; one view stays as it is.

    Two views fill half of the cells; the others are the mean of their neighbours. Where a quarter of a patch is no
    whole number of pixels, all views lie half a pixel off; linear interpolation brings them to the cells' centres.
    """
    if len(views) == 1:
        return views[0]
    *batch, h, w, Z = views[0].shape
    cells, (upper, lower) = views[0].new_empty(*batch, 2 * h, 2 * w, Z), views[:2]
    cells[..., ::2, ::2, :], cells[..., 1::2, 1::2, :] = upper, lower
    if len(views) == 2:
        # each lies between two of one view in its row, and two of the other in its column
        cells[..., ::2, 1::2, :] = _between(upper + _moved(upper, -2, 1), lower + _moved(lower, -3, -1), 0, -1)
        cells[..., 1::2, ::2, :] = _between(lower + _moved(lower, -2, -1), upper + _moved(upper, -3, 1), -1, 0)
    else:
        cells[..., ::2, 1::2, :], cells[..., 1::2, ::2, :] = views[2:]
    if patch % 4:
        for axis in (-3, -2):  # half a pixel is this share of a cell
            cells = torch.lerp(cells, _moved(cells, axis, -1), 1 / patch)
    return cells


def _between(across: Tensor, along: Tensor, row: int, column: int) -> Tensor:
    """A quarter of the sums of two neighbours in a row and of two in a column. In this column of the grid one neighbour
    in the row is missing, and in this row one in the column; the other two then count alone."""
    across[..., column, :], along[..., row, :, :] = along[..., column, :], across[..., row, :, :]
    return (across + along) / 4


def _moved(cells: Tensor, axis: int, by: int) -> Tensor:
    """Return each cell's neighbour `by` places further along `axis`; at the border, the cell itself."""
    last = cells.shape[axis] - 1
    return cells.index_select(axis, torch.arange(by, last + 1 + by, device=cells.device).clamp_(0, last))
