"""The similarity statistics in traceable PyTorch (`impl="torch"`): means from moments, the rest block by block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .operators import operator
from .problem import ClosenessProblem
from .rows import accumulation_dtype, unit_rows

# a block of cosines and its results stay in a CPU's cache; square enough that memory does not bound the matrix product
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 1024
# on other devices a block is a launch
LARGE_ROWS, LARGE_COLUMNS = 4096, 4096
NO_KEY = torch.iinfo(torch.int64).min  # stands where a patch has no neighbour


def similarity_statistics(problem: ClosenessProblem) -> tuple[Tensor, ...]:
    """Returns mean [T], row_mean [T,B,P], histogram int64 [T,bins], neighbour values and indices [T,B,P,k]."""
    f = unit_rows(problem.features.to(accumulation_dtype(problem.features)))
    u, present = mean_rows(f, problem.patch_weight)
    results = []
    for t, entry in enumerate(problem.partners):
        measured, toward = entry_means(u, present, entry)
        m = measured if problem.mean is None else problem.mean[t]
        row_mean = (f @ toward[:, :, None])[..., 0]
        results.append((m, row_mean, *pairs_of(problem, f, u, entry, m)))
    return tuple(torch.stack(parts) for parts in zip(*results))


def pairs_of(
    problem: ClosenessProblem, f: Tensor, u: Tensor, entry: str | Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `counts_and_neighbours` does. Compilers take its loops as one operator, whatever the sizes."""
    if not torch.compiler.is_compiling() or not (problem.bins or problem.neighbours):
        return counts_and_neighbours(problem, f, u, entry, m)
    partner, kind = (entry, "partner") if isinstance(entry, Tensor) else (None, entry)
    return traced_pairs(
        f,
        u,
        partner,
        kind,
        m,
        problem.patch_weight,
        center=problem.center,
        bins=problem.bins,
        limits=list(problem.limits),
        neighbours=problem.neighbours,
    )


@operator("similarity_pairs")
def traced_pairs(
    f: Tensor,
    u: Tensor,
    partner: Tensor | None,
    kind: str,
    m: Tensor,
    weight: Tensor | None,
    center: bool,
    bins: int,
    limits: list[float],
    neighbours: int,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = ClosenessProblem(
        features=f,
        partners=(),
        patch_weight=weight,
        mean=None,
        center=center,
        bins=bins,
        limits=(limits[0], limits[1]),
        neighbours=neighbours,
    )
    return counts_and_neighbours(problem, f, u, kind if partner is None else partner, m)


@traced_pairs.register_fake
def _(f, u, partner, kind, m, weight, center, bins, limits, neighbours):
    indices = torch.empty((*f.shape[:2], neighbours), dtype=torch.int64, device=f.device)
    counts = torch.empty(bins, dtype=torch.int64, device=f.device)
    return counts, f.new_empty(indices.shape), indices


def mean_rows(f: Tensor, patch_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Takes unit rows [B,P,D] to their weighted mean u [B,D], and to 1 where an image has any weight, else 0 [B]."""
    if patch_weight is None:
        return f.mean(1), torch.ones_like(f[:, 0, 0])
    total = patch_weight.sum(1, keepdim=True)
    weight = torch.where(total > 0, patch_weight / torch.where(total > 0, total, 1.0), 0.0)
    return (weight[:, None] @ f)[:, 0], (total[:, 0] > 0).to(f.dtype)


def entry_means(u: Tensor, present: Tensor, entry: str | Tensor) -> tuple[Tensor, Tensor]:
    """Returns M [] of a pair set, and [B,D] whose products with each image's unit rows are the row means."""
    if isinstance(entry, Tensor):
        toward, pairs = u[entry], (present * present[entry]).sum()
    elif entry == "self":
        toward, pairs = u, present.sum()
    else:
        others = present.sum() - present
        toward, pairs = (u.sum(0) - u) / others.clamp(min=1.0)[:, None], (present * others).sum()
        return (u * (u.sum(0) - u)).sum() / pairs.clamp(min=1.0), toward
    return (u * toward).sum() / pairs.clamp(min=1.0), toward


def counts_and_neighbours(
    problem: ClosenessProblem, f: Tensor, u: Tensor, entry: str | Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns histogram [bins], neighbour values and indices [B,P,k] of one pair set."""
    B, P, _ = f.shape
    device, bins, k, (low, high) = f.device, problem.bins, problem.neighbours, problem.limits
    counts = torch.zeros(bins, dtype=torch.int64, device=device)
    lists = []
    # without neighbours, blocks come as places on the histogram's axis, which spares passes over them
    scale, origin = (1.0, 0.0) if k else (bins / (high - low), low)
    for n in range(B if bins or k else 0):
        best = [Best(stop - start, k, f) for start, stop in spans(P, block_rows(device))] if k else []
        rows = f[n] * scale if scale != 1.0 else f[n]
        weight_i = None if problem.patch_weight is None else problem.patch_weight[n]
        for j in partners_of(entry, n, B, device):
            other = f.index_select(0, j)[0]  # indexing with a number would copy it to the host
            weighted_j = None if problem.patch_weight is None else problem.patch_weight.index_select(0, j)[0] > 0
            shift = (m - f[n] @ u.index_select(0, j)[0] if problem.center else torch.zeros_like(f[n, :, 0])) - origin
            shift = shift[:, None] * scale
            for part, (top, bottom) in enumerate(spans(P, block_rows(device))):
                for left, right in spans(P, block_columns(device)):
                    w = torch.addmm(shift[top:bottom], rows[top:bottom], other[left:right].mT)
                    weighted = None if weighted_j is None else weighted_j[left:right]
                    if k:
                        columns = torch.arange(left, right, device=device) + j * P
                        excluded = columns == torch.arange(top, bottom, device=device)[:, None] + n * P  # itself
                        if weighted is not None:
                            excluded = excluded | ~weighted
                        best[part].add(w.masked_fill(excluded, -torch.inf), columns)
                    if bins:
                        both = (
                            None
                            if weight_i is None or weighted is None
                            else (weight_i[top:bottom, None] > 0) & weighted
                        )
                        counts += counted((w - low).mul_(bins / (high - low)) if k else w, both, bins)
        if k:
            lists.append([torch.cat(parts) for parts in zip(*(block.read() for block in best))])
    if k:
        values, indices = (torch.stack(parts) for parts in zip(*lists))
        return counts, values, indices
    return counts, f.new_empty(B, P, 0), torch.empty(B, P, 0, dtype=torch.int64, device=device)


def partners_of(entry: str | Tensor, n: int, B: int, device: torch.device) -> Iterator[Tensor]:
    """Yields the partners of image n as tensors [1], in ascending order."""
    if isinstance(entry, Tensor):
        yield entry[n : n + 1]
        return
    for j in [n] if entry == "self" else [j for j in range(B) if j != n]:
        yield torch.full((1,), j, dtype=torch.int64, device=device)


def block_rows(device: torch.device) -> int:
    return BLOCK_ROWS if device.type == "cpu" else LARGE_ROWS


def block_columns(device: torch.device) -> int:
    return BLOCK_COLUMNS if device.type == "cpu" else LARGE_COLUMNS


def spans(size: int, largest: int) -> list[tuple[int, int]]:
    """Cuts 0 .. size into parts of about one length, none above `largest`."""
    parts = -(-size // largest)
    return [(size * part // parts, size * (part + 1) // parts) for part in range(parts)]


def counted(places: Tensor, valid: Tensor | None, bins: int) -> Tensor:
    """Counts the `valid` places on the axis of bins in int64 [bins]. Overwrites the places."""
    bin_ = places.clamp_(0, bins - 1).to(torch.int32)  # truncation rounds down, because nothing is below 0
    if bin_.device.type == "cpu" and not torch.compiler.is_compiling() and type(bin_) is Tensor:
        # eight times as fast as adding ones
        return torch.bincount(bin_.flatten() if valid is None else bin_[valid], minlength=bins)
    ones = torch.ones_like(bin_, dtype=torch.int64) if valid is None else valid.long()
    counts = torch.zeros(bins, dtype=torch.int64, device=bin_.device)
    return counts.scatter_add_(0, bin_.long().flatten(), ones.flatten())


class Best:
    """The k largest values of each row, from blocks in ascending order of columns; ties go to the lowest column."""

    def __init__(self, rows: int, k: int, like: Tensor):
        self.k, self.packed = k, like.dtype == torch.float32
        self.keys = torch.full((rows, k), NO_KEY, dtype=torch.int64, device=like.device)
        self.values = like.new_full((rows, k), -torch.inf)
        self.indices = torch.full((rows, k), -1, dtype=torch.int64, device=like.device)

    def add(self, w: Tensor, columns: Tensor) -> None:
        """Takes w [rows,n], -inf where a column is no candidate, and columns int64 [n]."""
        if self.packed:
            keys = torch.where(w > -torch.inf, sortable(w) << 32 | (0xFFFFFFFF - columns), NO_KEY)
            self.keys = torch.cat((self.keys, keys), 1).topk(self.k, sorted=True).values
        else:  # a value and its column do not fit 64 bits
            values, order = torch.cat((self.values, w), 1).sort(dim=1, descending=True, stable=True)
            indices = torch.cat((self.indices, torch.where(w > -torch.inf, columns, -1)), 1)
            self.values, self.indices = values[:, : self.k], indices.gather(1, order[:, : self.k])

    def read(self) -> tuple[Tensor, Tensor]:
        """Returns values and indices [rows,k]."""
        if not self.packed:
            return self.values, self.indices
        empty = self.keys == NO_KEY
        values = unsortable(self.keys >> 32)
        return values.masked_fill(empty, -torch.inf), (0xFFFFFFFF - (self.keys & 0xFFFFFFFF)).masked_fill(empty, -1)


def sortable(values: Tensor) -> Tensor:
    """Takes fp32 to int64 within 32 bits, in the same order."""
    bits = values.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def unsortable(bits: Tensor) -> Tensor:
    """Undoes `sortable`."""
    bits = bits.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
