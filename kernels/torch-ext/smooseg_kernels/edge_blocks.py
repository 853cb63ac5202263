"""The sums of windows and loops over blocks under the guided filter and joint upsampling: linear maps.

Each is a registered operator, because the number of blocks depends on the sizes, and so is its transpose: the gradient
of either is the other one. The first argument gets gradients, and the others are constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import operator

STRIP_ELEMENTS = 1 << 20  # of upsampled coefficients at a time in the transpose
LINE_ELEMENTS = {"cpu": 1 << 18}  # of coefficients upsampled downwards at a time; elsewhere 1 << 24
BLOCK_ELEMENTS = 1 << 22  # of the weights and values of joint upsampling at a time


# the guided filter


@operator("window_sums")
def box(values: Tensor, radius: int) -> Tensor:
    """Sums over the windows of 2 radius + 1 cells about each: [B,h,w,N], nothing beyond the border.

    By doubling, so that no sum has other terms than its own: without the rounding of differences of running sums, and
    the same wherever the window lies.
    """
    for dim in (1, 2):
        values = window_sums(values, min(radius, values.shape[dim]), dim)
    return values.contiguous()


def window_sums(values: Tensor, radius: int, dim: int) -> Tensor:
    n, length = values.shape[dim], 2 * radius + 1
    pad = [0, 0] * (values.dim() - 1 - dim) + [radius, radius]
    sums, span = F.pad(values, pad), 1  # sums over `span` cells from each on
    total, start = sums.narrow(dim, 0, n), 1  # the length is odd
    while span <= length:
        if span > 1 and length & span:
            total = total + sums.narrow(dim, start, n)
            start += span
        if 2 * span <= length:
            rest = sums.shape[dim] - span
            sums = sums.narrow(dim, 0, rest) + sums.narrow(dim, span, rest)
        span *= 2
    return total


@box.register_fake
def _(values, radius):
    return values.new_empty(values.shape)


class Strip(NamedTuple):
    """Rows of the picture, and the rows of cells that bilinear interpolation reads there."""

    pixels: slice
    cells: slice
    skipped: int  # upsampled rows above the pixels


def strips(height: int, step: int, h: int, row_elements: int) -> Iterator[Strip]:
    rows = max(1, STRIP_ELEMENTS // (step * step * row_elements))
    for top in range(0, h, rows):
        first, last = max(0, top - 1), min(h, top + rows + 1)  # interpolation reaches a cell farther
        start, stop = min(top * step, height), min((top + rows) * step, height)
        yield Strip(slice(start, stop), slice(first, last), (top - first) * step)


@operator("guided_lines")
def lines_at(lines: Tensor, guide: Tensor, step: int, h: int, w: int) -> Tensor:
    """Upsamples lines [B,h,w,(C+1)*K] by `step`, and evaluates them at the colours [B,H,W,C] -> [B,H,W,K].

    The centres of cells cut the picture into segments of `step` pixels. Between two cells, already upsampled downwards,
    the pixels of a segment are a matrix product: [step,2*(C+1)], shares times colours and 1, by [2*(C+1),K]. Products
    go straight into the result, whose rows are therefore whole segments in memory.
    """
    (B, H, W, C), N = guide.shape, lines.shape[3]
    values, K = empty_values(lines, guide, step, w), N // (C + 1)
    if step == 1:
        part = lines[:, :H, :W].unflatten(-1, (C + 1, K))
        for c in range(C):
            torch.addcmul(values if c else part[..., C, :], part[..., c, :], guide[..., c, None], out=values)
        return values
    first = left_out(step)
    shares = guide.new_tensor([(i - first + 0.5 * (step + 1)) / step for i in range(step)])  # of the second cell
    low, high = (torch.arange(-1, n + 1, device=lines.device).clamp_(0, n - 1) for n in (h, w))
    padded = lines.index_select(1, low).index_select(2, high)
    n = min(h + 1, max(1, LINE_ELEMENTS.get(lines.device.type, 1 << 24) // (step * (w + 2) * N)))
    down = lines.new_empty(n, step, w + 2, N)  # one for all strips: fresh memory costs more than the sums
    planes = guide.permute(0, 3, 1, 2).contiguous()
    factors = SegmentFactors(planes, shares, first, n * step, w + 2)
    segments = values.as_strided((B, H * (w + 2), step, K), (H * (w + 2) * step * K, step * K, K, 1), 0)
    for b in range(B):
        for top in range(0, h + 1, n):
            count = min(n, h + 1 - top)
            skipped, start = max(0, first - top * step), max(0, top * step - first)
            rows = min(count * step - skipped, H - start)
            if rows <= 0:
                continue
            above, below = padded[b, top : top + count, None], padded[b, top + 1 : top + count + 1, None]
            torch.lerp(above, below, shares[:, None, None], out=down[:count])
            number = rows * (w + 2) - 1  # the last of a line reaches into the next one, and lies outside of the picture
            cells = down.as_strided((number, 2 * (C + 1), K), (N, K, 1), skipped * (w + 2) * N)
            part = segments[b, start * (w + 2) :][:number]
            torch.bmm(factors(planes[b, :, start : start + rows])[:-1], cells, out=part)
    return values


def left_out(step: int) -> int:
    """Pixels of the first segment of a line that lie outside of the picture."""
    return step - step // 2 if step > 1 else 0


def empty_values(lines: Tensor, guide: Tensor, step: int, w: int) -> Tensor:
    """Memory for the result [B,H,W,K] of `lines_at`; with subsampling, a part of lines of w + 2 segments."""
    (B, H, W, C), first = guide.shape, left_out(step)
    width = (w + 2) * step if step > 1 else W
    return lines.new_empty(B, H, width, lines.shape[3] // (C + 1))[:, :, first : first + W]


class SegmentFactors:
    """Takes colours [C,rows,W] to the factors of their segments [rows*segments,step,2*(C+1)], in one memory.

    A factor is a plane of pixels there, so that products of colours and shares are products of planes.
    """

    def __init__(self, guide: Tensor, shares: Tensor, first: int, rows: int, segments: int):
        W, self.step, C = guide.shape[3], len(shares), guide.shape[1]
        right = shares.repeat(segments)[first : first + W]
        self.shares = torch.stack((1 - right, right))[:, None, None]  # [2,1,1,W]
        self.planes = guide.new_zeros(2, C + 1, rows, segments * self.step)
        self.inside = self.planes[..., first : first + W]
        self.inside[:, C:] = self.shares

    def __call__(self, guide: Tensor) -> Tensor:
        C, rows = guide.shape[:2]
        torch.mul(guide, self.shares, out=self.inside[:, :C, :rows])
        size = self.planes.stride(1)
        shape = (rows * self.planes.shape[3] // self.step, self.step, 2 * (C + 1))
        return self.planes.as_strided(shape, (self.step, 1, size))


@operator("guided_lines_transposed")
def lines_transposed(values: Tensor, guide: Tensor, step: int, h: int, w: int) -> Tensor:
    """The transpose of `lines_at`: [B,H,W,K] -> [B,h,w,(C+1)*K]."""
    (B, H, W, C), K = guide.shape, values.shape[3]
    lines = values.new_zeros(B, h, w, (C + 1) * K)
    for strip in strips(H, step, h, w * (C + 1) * K):
        part, colours = values[:, strip.pixels, :, None], guide[:, strip.pixels, :, :, None]
        fine = torch.cat([part * colours, part], -2).flatten(-2)  # [B,rows,W,(C+1)*K]
        covered = lines[:, strip.cells]
        size = (covered.shape[1] * step, w * step)
        below = size[0] - strip.skipped - fine.shape[1]
        fine = F.pad(fine, (0, 0, 0, size[1] - W, strip.skipped, below))
        if step > 1:
            shape = (B, (C + 1) * K, covered.shape[1], w)
            fine = torch.ops.aten.upsample_bilinear2d_backward(fine.permute(0, 3, 1, 2), size, shape, False)
            fine = fine.permute(0, 2, 3, 1)
        covered += fine
    return lines


@lines_at.register_fake
def _(lines, guide, step, h, w):
    return empty_values(lines, guide, step, w)


@lines_transposed.register_fake
def _(values, guide, step, h, w):
    return values.new_empty(guide.shape[0], h, w, (guide.shape[3] + 1) * values.shape[3])


# joint upsampling


class Cells:
    """Which pixels of a line lie in which patches, from their `centres` [N] in patches, in ascending order.

    Patches `first` to `last` - 1 have some. index: int64 [last-first,most], the pixels of each, padded with the last
    one; within: where they lie about the centre of their patch, of the same shape.
    """

    def __init__(self, centres: Tensor, patches: int):
        place = centres.long().clamp(max=patches - 1)
        self.first, self.last = int(place[0]), int(place[-1]) + 1
        numbers = torch.arange(self.first, self.last + 1, device=place.device)
        self._starts = torch.searchsorted(place, numbers)
        self._counts = self._starts.diff()
        self.most = int(self._counts.max())
        steps = torch.arange(self.most, device=place.device)
        self.index = torch.minimum(self._starts[:-1, None] + steps, self._starts[1:, None] - 1).clamp(min=0)
        self.within = centres[self.index] - (numbers[:-1, None] + 0.5).to(centres)

    def kept(self, first: int, count: int) -> Tensor:
        """Which of the padded pixels of `count` patches from `first` on are pixels: int64 [pixels]."""
        counts = self._counts[first - self.first : first - self.first + count]
        steps = torch.arange(self.most, device=counts.device)
        return (steps < counts[:, None]).flatten().nonzero()[:, 0]


class Block(NamedTuple):
    """The patches `top` to `top` + n - 1 of the grid's rows, of all columns that have pixels."""

    top: int
    share: Tensor  # [B,n,columns,pixels,taps], what a pixel takes of each patch of its window
    rows: Cells
    columns: Cells

    def around(self, padded: Tensor, window: int) -> Tensor:
        """Takes patches [B,h,w,N] padded by half a window to the windows about each, [B,n,columns,taps,N]."""
        return windows(padded, self.top, self.share.shape[1], window, self.columns)

    def kept(self) -> tuple[Tensor, Tensor]:
        columns = self.columns
        return self.rows.kept(self.top, self.share.shape[1]), columns.kept(columns.first, columns.last - columns.first)


def windows(padded: Tensor, top: int, n: int, window: int, columns: Cells) -> Tensor:
    about = padded[:, top : top + n + window - 1].unfold(1, window, 1).unfold(2, window, 1)
    return about[:, :, columns.first : columns.last].permute(0, 1, 2, 4, 5, 3).flatten(3, 4)


def blocks(
    guide: Tensor,
    colours: Tensor,
    centres: tuple[Tensor, Tensor],
    weight: Tensor | None,
    sigmas: tuple[Tensor, Tensor],
    window: int,
    K: int,
) -> Iterator[Block]:
    """Computes the shares of the patches in every pixel, of `BLOCK_ELEMENTS` at a time.

    Pixels of one patch share their window, so they are one matrix product.
    """
    (B, h, w, C), reach = colours.shape, window // 2
    rows, columns = (Cells(line, patches) for line, patches in zip(centres, (h, w)))
    taps, pixels = window * window, rows.most * columns.most
    log_weight = colours.new_zeros(B, h, w) if weight is None else weight.log()
    patches = F.pad(torch.cat([colours, log_weight[..., None]], -1), (0, 0, reach, reach, reach, reach))
    inside = F.pad(colours.new_zeros(1, h, w, 1), (0, 0, *(reach,) * 4), value=float("-inf"))
    steps = torch.arange(window, device=colours.device) - reach
    offset = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).view(taps, 2).to(colours) / sigmas[0]
    block = max(1, BLOCK_ELEMENTS // (B * w * (pixels * (K + taps + C) + taps * (K + C))))
    for top in range(rows.first, rows.last, block):
        n = min(block, rows.last - top)
        lines = rows.index[top - rows.first : top - rows.first + n].flatten()
        around = windows(patches, top, n, window, columns)  # [B,n,w,taps,C+1]
        legal = windows(inside, top, n, window, columns)[..., 0]
        own = around[..., taps // 2, None, :C]
        centre = ((around[..., :C] - own) / sigmas[1], offset.expand(*around.shape[:4], 2))
        keys = torch.cat(centre, -1)  # [B,n,w,taps,C+2]
        colour = guide[:, lines][:, :, columns.index.flatten()].unflatten(1, (n, rows.most))
        colour = colour.unflatten(3, (-1, columns.most)).transpose(2, 3).flatten(3, 4)  # [B,n,w,pixels,C]
        y = rows.within[top - rows.first : top - rows.first + n, None, :, None]
        x = columns.within[None, :, None, :]
        places = torch.stack(torch.broadcast_tensors(y, x), -1).flatten(2, 3) / sigmas[0]  # [n,w,pixels,2]
        queries = torch.cat([(colour - own) / sigmas[1], places.expand(B, *places.shape)], -1)
        # -d^2 / 2 but for what all patches of a pixel have in common
        bias = around[..., C] + legal - (keys * keys).sum(-1) / 2
        yield Block(top, (queries @ keys.mT + bias[..., None, :]).softmax(-1), rows, columns)


@operator("joint_upsample")
def joint(
    scores: Tensor,
    guide: Tensor,
    colours: Tensor,
    rows: Tensor,
    columns: Tensor,
    weight: Tensor | None,
    sigma_position: Tensor,
    sigma_colour: Tensor,
    window: int,
) -> Tensor:
    """Takes scores [B,h,w,K] to [B,H,W,K]; the rest is as in `edges.joint`, and sigmas are fp64 [] on the CPU."""
    padded, fine = F.pad(scores, (0, 0, *(window // 2,) * 4)), []
    sigmas = (sigma_position, sigma_colour)
    for block in blocks(
        guide, colours, centres=(rows, columns), weight=weight, sigmas=sigmas, window=window, K=scores.shape[3]
    ):
        values = block.share @ block.around(padded, window)  # [B,n,w,pixels,K]
        values = values.unflatten(3, (block.rows.most, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        kept_rows, kept_columns = block.kept()
        fine.append(values[:, kept_rows][:, :, kept_columns])
    return torch.cat(fine, 1)


@operator("joint_upsample_transposed")
def joint_transposed(
    fine: Tensor,
    guide: Tensor,
    colours: Tensor,
    rows: Tensor,
    columns: Tensor,
    weight: Tensor | None,
    sigma_position: Tensor,
    sigma_colour: Tensor,
    window: int,
) -> Tensor:
    """The transpose of `joint`: [B,H,W,K] -> [B,h,w,K]."""
    (B, h, w, _), K, reach = colours.shape, fine.shape[3], window // 2
    padded, start = fine.new_zeros(B, h + 2 * reach, w + 2 * reach, K), 0
    for block in blocks(
        guide,
        colours,
        centres=(rows, columns),
        weight=weight,
        sigmas=(sigma_position, sigma_colour),
        window=window,
        K=K,
    ):
        n, across = block.share.shape[1:3]
        kept_rows, kept_columns = block.kept()
        values = fine.new_zeros(B, n * block.rows.most, across * block.columns.most, K)
        values[:, kept_rows[:, None], kept_columns] = fine[:, start : start + len(kept_rows)]
        start += len(kept_rows)
        values = values.unflatten(2, (across, -1)).unflatten(1, (n, -1)).transpose(2, 3).flatten(3, 4)
        toward = block.share.mT @ values  # [B,n,w,taps,K]
        first, last = block.columns.first, block.columns.last
        for tap in range(window * window):
            i, j = divmod(tap, window)
            padded[:, block.top + i : block.top + i + n, first + j : last + j] += toward[..., tap, :]
    return padded[:, reach : reach + h, reach : reach + w].contiguous()


@joint.register_fake
def _(scores, guide, *rest):
    return scores.new_empty(*guide.shape[:3], scores.shape[3])


@joint_transposed.register_fake
def _(fine, guide, colours, *rest):
    return fine.new_empty(*colours.shape[:3], fine.shape[3])


def register_gradient(op, transposed) -> None:
    """Gives an operator that is linear in its first argument, and constant in the others, its gradient."""

    def setup_context(ctx, inputs, output):
        ctx.constants = [x for x in inputs[1:] if not isinstance(x, Tensor)]
        ctx.is_tensor = [isinstance(x, Tensor) for x in inputs[1:]]
        ctx.save_for_backward(*(x for x in inputs[1:] if isinstance(x, Tensor)))

    def backward(ctx, upstream):
        tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
        rest = [next(tensors) if is_tensor else next(constants) for is_tensor in ctx.is_tensor]
        return transposed(upstream, *rest), *[None] * len(rest)

    op.register_autograd(backward, setup_context=setup_context)


for forward, transposed in ((lines_at, lines_transposed), (joint, joint_transposed)):
    register_gradient(forward, transposed)
    register_gradient(transposed, forward)
register_gradient(box, box)
