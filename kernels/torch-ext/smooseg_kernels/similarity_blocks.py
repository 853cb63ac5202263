"""The similarity statistics in plain traceable PyTorch (`impl="torch"`): means from moments, the rest from one block of cosines at a time.

Arguments come canonical from `similarity`, as `dense` takes them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .rows import accumulation_dtype, unit_rows

# a block of cosines and what is made of it stay in a CPU's cache; square enough that the matrix product is not bound by memory
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 1024
# on other devices a block is a launch
LARGE_ROWS, LARGE_COLUMNS = 4096, 4096
NOTHING = torch.iinfo(torch.int64).min  # the key of no neighbour


def similarity_statistics(features, partners, patch_weight, mean, center, bins, limits, neighbours):
    """-> mean [T], row_mean [T,B,P], histogram int64 [T,bins], neighbour_values and neighbour_indices [T,B,P,k]."""
    f = unit_rows(features.to(accumulation_dtype(features)))
    u, present = mean_rows(f, patch_weight)
    found = []
    for t, entry in enumerate(partners):
        measured, toward = entry_means(u, present, entry)
        m = measured if mean is None else mean[t]
        row_mean = (f @ toward[:, :, None])[..., 0]
        found.append(
            (m, row_mean, *counts_and_neighbours(f, u, patch_weight, entry, m, center, bins, limits, neighbours))
        )
    return tuple(torch.stack(parts) for parts in zip(*found))


def mean_rows(f: Tensor, patch_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unit rows [B,P,D] -> their weighted mean u [B,D], and 1 where an image has any weight, else 0 [B]."""
    if patch_weight is None:
        return f.mean(1), torch.ones_like(f[:, 0, 0])
    total = patch_weight.sum(1, keepdim=True)
    weight = torch.where(total > 0, patch_weight / torch.where(total > 0, total, 1.0), 0.0)
    return (weight[:, None] @ f)[:, 0], (total[:, 0] > 0).to(f.dtype)


def entry_means(u: Tensor, present: Tensor, entry: str | Tensor) -> tuple[Tensor, Tensor]:
    """M [] of a pair set, and [B,D] what each image's rows are multiplied by to give their means: its partner's u, or the mean of all."""
    if isinstance(entry, Tensor):
        toward, pairs = u[entry], (present * present[entry]).sum()
    elif entry == "self":
        toward, pairs = u, present.sum()
    else:
        others = present.sum() - present
        toward, pairs = (u.sum(0) - u) / others.clamp(min=1.0)[:, None], (present * others).sum()
        return (u * (u.sum(0) - u)).sum() / pairs.clamp(min=1.0), toward
    return (u * toward).sum() / pairs.clamp(min=1.0), toward


def counts_and_neighbours(f, u, patch_weight, entry, m, center, bins, limits, k):
    """-> histogram [bins], neighbour values and indices [B,P,k]."""
    B, P, _ = f.shape
    device = f.device
    counts = torch.zeros(bins, dtype=torch.int64, device=device)
    lists = []
    # where W itself is not asked for, blocks come as places on the histogram's axis, which spares passes over them
    scale, low = (1.0, 0.0) if k else (bins / (limits[1] - limits[0]), limits[0])
    for n in range(B if bins or k else 0):
        best = [Best(stop - start, k, f) for start, stop in spans(P, rows_of(device))] if k else []
        rows = f[n] * scale if scale != 1.0 else f[n]
        for j in partners_of(entry, n, B, device):
            other = f.index_select(0, j)[0]  # no copy to the host to find out which
            there = None if patch_weight is None else patch_weight.index_select(0, j)[0] > 0
            shift = (m - f[n] @ u.index_select(0, j)[0] if center else torch.zeros_like(f[n, :, 0])) - low
            shift = shift[:, None] * scale
            for part, (top, bottom) in enumerate(spans(P, rows_of(device))):
                for left, right in spans(P, columns_of(device)):
                    w = torch.addmm(shift[top:bottom], rows[top:bottom], other[left:right].mT)
                    seen = None if there is None else there[left:right]
                    if k:
                        columns = torch.arange(left, right, device=device) + j * P
                        itself = columns == torch.arange(top, bottom, device=device)[:, None] + n * P
                        best[part].add(w.masked_fill(itself if seen is None else itself | ~seen, -torch.inf), columns)
                    if bins:
                        valid = None if seen is None else (patch_weight[n, top:bottom, None] > 0) & seen
                        counts += counted((w - limits[0]).mul_(bins / (limits[1] - limits[0])) if k else w, valid, bins)
        if k:
            lists.append([torch.cat(parts) for parts in zip(*(each.read() for each in best))])
    if k:
        return counts, *(torch.stack(parts) for parts in zip(*lists))
    return counts, f.new_empty(B, P, 0), torch.empty(B, P, 0, dtype=torch.int64, device=device)


def partners_of(entry: str | Tensor, n: int, B: int, device: torch.device) -> Iterator[Tensor]:
    """The partners of image n as tensors [1], in ascending order."""
    if isinstance(entry, Tensor):
        yield entry[n : n + 1]
        return
    for j in [n] if entry == "self" else [j for j in range(B) if j != n]:
        yield torch.full((1,), j, dtype=torch.int64, device=device)


def rows_of(device: torch.device) -> int:
    return BLOCK_ROWS if device.type == "cpu" else LARGE_ROWS


def columns_of(device: torch.device) -> int:
    return BLOCK_COLUMNS if device.type == "cpu" else LARGE_COLUMNS


def spans(size: int, largest: int) -> list[tuple[int, int]]:
    """0 .. size in parts of about one length, none above `largest`."""
    parts = -(-size // largest)
    return [(size * part // parts, size * (part + 1) // parts) for part in range(parts)]


def counted(places: Tensor, valid: Tensor | None, bins: int) -> Tensor:
    """int64 [bins] of places on the axis of bins, which are overwritten; only of `valid` ones."""
    bin_ = places.clamp_(0, bins - 1).to(torch.int32)  # cut off is rounded down: nothing is below 0
    if bin_.device.type == "cpu" and not torch.compiler.is_compiling() and type(bin_) is Tensor:
        return torch.bincount(
            bin_.flatten() if valid is None else bin_[valid], minlength=bins
        )  # eight times as fast as adding ones
    ones = torch.ones_like(bin_, dtype=torch.int64) if valid is None else valid.long()
    return torch.zeros(bins, dtype=torch.int64, device=bin_.device).scatter_add_(
        0, bin_.long().flatten(), ones.flatten()
    )


class Best:
    """The k largest values of each row over blocks that come in ascending order of their columns; ties to the lowest."""

    def __init__(self, rows: int, k: int, like: Tensor):
        self.k, self.packed = k, like.dtype == torch.float32
        self.keys = torch.full((rows, k), NOTHING, dtype=torch.int64, device=like.device)
        self.values = like.new_full((rows, k), -torch.inf)
        self.indices = torch.full((rows, k), -1, dtype=torch.int64, device=like.device)

    def add(self, w: Tensor, columns: Tensor) -> None:
        """w [rows,n], -inf for what is no candidate; columns int64 [n]."""
        if self.packed:
            keys = torch.where(w > -torch.inf, sortable(w) << 32 | (0xFFFFFFFF - columns), NOTHING)
            self.keys = torch.cat((self.keys, keys), 1).topk(self.k, sorted=True).values
        else:  # a value and its column do not fit 64 bits
            values, order = torch.cat((self.values, w), 1).sort(dim=1, descending=True, stable=True)
            indices = torch.cat((self.indices, torch.where(w > -torch.inf, columns, -1)), 1)
            self.values, self.indices = values[:, : self.k], indices.gather(1, order[:, : self.k])

    def read(self) -> tuple[Tensor, Tensor]:
        """(values, indices) [rows,k]."""
        if not self.packed:
            return self.values, self.indices
        none = self.keys == NOTHING
        values = unsortable(self.keys >> 32)
        return values.masked_fill(none, -torch.inf), (0xFFFFFFFF - (self.keys & 0xFFFFFFFF)).masked_fill(none, -1)


def sortable(values: Tensor) -> Tensor:
    """fp32 -> int64 within 32 bits, in the same order."""
    bits = values.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def unsortable(bits: Tensor) -> Tensor:
    bits = bits.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
