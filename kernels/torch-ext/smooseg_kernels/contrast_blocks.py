"""Contrastive losses block by block (`impl="torch"`): O(N M (D + Z)) time, memory of the inputs' size and one block.

The log-sum-exp stands between the similarities of a row, so every pair must be computed, but none must be kept. A block
has whole rows. The gradient of the mean loss is a number times what the same blocks give: they are computed once, for
the loss and both gradients. Gradients to the rows' own values recompute the blocks.

The blocks are one registered operator, because their number depends on the sizes: it compiles and exports for any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .derivatives import refuse_second
from .operators import operator
from .problem import ContrastProblem
from .products import products
from .rows import unit_rows

# pairs in one block: three matrices of this many numbers live at a time, on a CPU in its cache
CPU_PAIRS, GPU_PAIRS = 1 << 18, 1 << 24
FAR = -1e30  # a logit whose exponential is 0, and that 0 times is 0


class Relation(NamedTuple):
    """Which pairs are positives and which are candidates: by labels, or by the cosines of features."""

    labels_i: Tensor | None  # integers [B,N]
    labels_j: Tensor | None  # integers [B,M]
    features_i: Tensor | None  # [B,N,D] unit rows
    features_j: Tensor | None  # [B,M,D] unit rows
    threshold: Tensor | None  # [B,N]
    threshold_j: Tensor | None  # [B,M]
    negative_threshold: Tensor | None  # [B,N]
    exclude_self: bool
    inside: bool


class Part(NamedTuple):
    """A block: some rows of some images."""

    images: slice
    rows: slice


class Block(NamedTuple):
    """Matrices of one block, [images,rows,M]. Numbers stand for booleans, which a CPU reads many times slower."""

    s: Tensor  # the logits, FAR where a pair is no candidate
    related: Tensor  # 1 for a positive, else 0; then what the row's `positive` gives to each logit
    share: Tensor  # the softmax over the candidates


class Rows(NamedTuple):
    """Sums of rows, [B,N] or those of one block."""

    log_sum: Tensor
    positive: Tensor
    count: Tensor  # type: ignore[assignment]  # int64; hides tuple.count


def contrastive(problem: ContrastProblem) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Returns the mean loss [] where it is asked for, log_sum [B,N], positive [B,N], count int64 [B,N]."""
    dtype = problem.temperature.dtype
    c_i = unit_rows(problem.codes_i.to(dtype))
    c_j = c_i if problem.codes_j is problem.codes_i else unit_rows(problem.codes_j.to(dtype))
    f_i = None if problem.features_i is None else unit_rows(problem.features_i.to(dtype))
    same = problem.features_j is problem.features_i
    f_j = f_i if same or problem.features_j is None else unit_rows(problem.features_j.to(dtype))
    relation = Relation(
        labels_i=problem.labels_i,
        labels_j=problem.labels_j,
        features_i=f_i,
        features_j=f_j,
        threshold=problem.threshold,
        threshold_j=problem.threshold_j,
        negative_threshold=problem.negative_threshold,
        exclude_self=problem.exclude_self,
        inside=problem.inside,
    )
    wanted = [problem.mean and torch.is_grad_enabled() and rows.requires_grad for rows in (c_i, c_j)]
    loss, log_sum, positive, count, *_ = contrast_blocks(c_i, c_j, problem.temperature, *relation, *wanted)
    return loss if problem.mean else None, log_sum, positive, count


@operator("contrast_blocks")
def contrast_blocks(
    c_i: Tensor,
    c_j: Tensor,
    temperature: Tensor,
    labels_i: Tensor | None,
    labels_j: Tensor | None,
    f_i: Tensor | None,
    f_j: Tensor | None,
    threshold: Tensor | None,
    threshold_j: Tensor | None,
    negative_threshold: Tensor | None,
    exclude_self: bool,
    inside: bool,
    i_gradient: bool,
    j_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Takes unit rows c_i [B,N,Z] and c_j [B,M,Z] to the mean loss [], the Rows [B,N], and the mean loss's gradients.

    Gradients are empty where not asked for.
    """
    relation = Relation(
        labels_i=labels_i,
        labels_j=labels_j,
        features_i=f_i,
        features_j=f_j,
        threshold=threshold,
        threshold_j=threshold_j,
        negative_threshold=negative_threshold,
        exclude_self=exclude_self,
        inside=inside,
    )
    d_i, d_j = empty_gradients(c_i, c_j, i_gradient, j_gradient)

    def of_mean(part: Part, rows: Rows) -> tuple[Tensor, Tensor]:
        has_positive = (rows.count > 0).to(c_i.dtype)
        return has_positive, -has_positive

    rows = sweep(
        c_i,
        c_j,
        temperature=temperature,
        relation=relation,
        upstream=of_mean,
        d_i=d_i if i_gradient else None,
        d_j=d_j if j_gradient else None,
    )
    has_positive = rows.count > 0
    queries = has_positive.sum().clamp(min=1)
    loss = torch.where(has_positive, rows.log_sum - rows.positive, 0.0).sum() / queries
    return loss, *rows, d_i.div_(queries), d_j.div_(queries)


@operator("contrast_blocks_backward")
def contrast_blocks_backward(
    d_log_sum: Tensor,
    d_positive: Tensor,
    c_i: Tensor,
    c_j: Tensor,
    temperature: Tensor,
    labels_i: Tensor | None,
    labels_j: Tensor | None,
    f_i: Tensor | None,
    f_j: Tensor | None,
    threshold: Tensor | None,
    threshold_j: Tensor | None,
    negative_threshold: Tensor | None,
    exclude_self: bool,
    inside: bool,
    i_gradient: bool,
    j_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of both sides' unit rows for gradients [B,N] to the Rows; empty where not asked for."""
    relation = Relation(
        labels_i=labels_i,
        labels_j=labels_j,
        features_i=f_i,
        features_j=f_j,
        threshold=threshold,
        threshold_j=threshold_j,
        negative_threshold=negative_threshold,
        exclude_self=exclude_self,
        inside=inside,
    )
    d_i, d_j = empty_gradients(c_i, c_j, i_gradient, j_gradient)

    def arrived(part: Part, rows: Rows) -> tuple[Tensor, Tensor]:
        return d_log_sum[part], d_positive[part]

    sweep(
        c_i,
        c_j,
        temperature=temperature,
        relation=relation,
        upstream=arrived,
        d_i=d_i if i_gradient else None,
        d_j=d_j if j_gradient else None,
    )
    return d_i, d_j


def sweep(
    c_i: Tensor,
    c_j: Tensor,
    temperature: Tensor,
    relation: Relation,
    upstream: Callable[[Part, Rows], tuple[Tensor, Tensor]],
    d_i: Tensor | None,
    d_j: Tensor | None,
) -> Rows:
    """Returns the sums of all rows, and fills the gradients for `upstream` to a block's log_sum and positive."""
    (B, N, _), M = c_i.shape, c_j.shape[1]
    rows = Rows(c_i.new_empty(B, N), c_i.new_empty(B, N), c_i.new_empty(B, N, dtype=torch.int64))
    scaled = c_i / temperature
    block_pairs = CPU_PAIRS if c_i.device.type == "cpu" else GPU_PAIRS
    images, height = min(B, max(1, block_pairs // (N * M))), min(N, max(1, block_pairs // M))
    # one set of blocks serves all: allocating and freeing each time would leave holes in the heap
    space = [c_i.new_empty(images * height * M) for _ in range(3)]
    if d_j is not None:
        d_j.zero_()
    for first in range(0, B, images):
        group = slice(first, min(first + images, B))
        for start in range(0, N, height):
            part = Part(group, slice(start, min(start + height, N)))
            shape = (group.stop - first, part.rows.stop - start, M)
            block = Block(*(matrix[: shape[0] * shape[1] * M].view(shape) for matrix in space))
            products(scaled[part], c_j[group], out=block.s)
            sums, has_candidate = add_up(block, relation, part)
            for all_rows, values in zip(rows, sums):
                all_rows[part] = values
            if d_i is None and d_j is None:
                continue
            d_log_sum, d_positive = upstream(part, sums)
            d_positive = torch.where(sums.count > 0, d_positive, 0.0)
            if not relation.inside:
                d_positive = d_positive / sums.count.clamp(min=1)
            d_s = block.share.mul_(torch.where(has_candidate, d_log_sum, 0.0)[..., None])
            d_s.addcmul_(block.related, d_positive[..., None])
            if d_i is not None:
                d_i[part] = products(d_s, c_j[group].mT)
            if d_j is not None:
                d_j[group] += products(scaled[part].mT, d_s.mT).mT
    if d_i is not None:
        d_i.div_(temperature)
    return rows


def add_up(block: Block, relation: Relation, part: Part) -> tuple[Rows, Tensor]:
    """Takes the logits in block.s to the rows' sums, and tells which rows have candidates; fills the other matrices."""
    s, related, share = block
    exclude = mark_positives(block, relation, part)
    if relation.exclude_self:
        related.diagonal(part.rows.start, 1, 2).zero_()
    count = related.sum(2)
    if relation.inside:
        # FAR added to all but the positives; to these exactly 0
        torch.mul(related, -FAR, out=share).add_(FAR).add_(s)
        positive, _ = log_sum_exp(share, out=related)
        positive = positive - count.clamp(min=1).log()
    else:
        positive = torch.mul(s, related, out=share).sum(2) / count.clamp(min=1)
    exclude(s)
    if relation.exclude_self:
        s.diagonal(part.rows.start, 1, 2).fill_(FAR)
    log_sum, has_candidate = log_sum_exp(s, out=share)
    return Rows(log_sum, torch.where(count > 0, positive, 0.0), count.long()), has_candidate


def log_sum_exp(s: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-sum-exp of rows, 0 for one that is FAR throughout, and which are not; fills the softmax."""
    torch.softmax(s, 2, out=out)  # one pass where exponentials of a difference take several
    largest = s.amax(2)
    some = ~(largest <= FAR / 2)  # true for NaN
    return torch.where(some, largest - out.amax(2).log(), 0.0), some


def mark_positives(block: Block, relation: Relation, part: Part) -> Callable[[Tensor], object]:
    """Fills block.related, and returns a function that puts FAR where a pair is no candidate."""
    related, spare = block.related, block.share
    if relation.labels_i is not None and relation.labels_j is not None:
        i, j = relation.labels_i[part].long()[..., None], relation.labels_j[part.images].long()[:, None, :]
        torch.eq(i.masked_fill(i < 0, -1), j.masked_fill(j < 0, -2), out=related)
        far = related.new_zeros(j.shape).masked_fill_(j < 0, FAR)
        return lambda s: s.add_(far)
    assert relation.features_i is not None
    assert relation.features_j is not None
    assert relation.threshold is not None
    cosines = products(relation.features_i[part], relation.features_j[part.images], out=related)
    threshold = relation.threshold[part][..., None]
    if relation.threshold_j is not None:
        threshold = torch.minimum(threshold, relation.threshold_j[part.images][:, None, :])
    if relation.negative_threshold is None:
        cosines.gt_(threshold)
        return lambda s: s
    # between the thresholds a pair is neither: 1 for it, in a matrix of its own
    neutral = torch.ge(cosines, relation.negative_threshold[part][..., None], out=torch.empty_like(spare))
    cosines.gt_(threshold)
    neutral.sub_(related).clamp_(min=0.0)
    return lambda s: s.add_(neutral, alpha=FAR)


def empty_gradients(c_i: Tensor, c_j: Tensor, i_gradient: bool, j_gradient: bool) -> tuple[Tensor, Tensor]:
    d_i = torch.empty_like(c_i) if i_gradient else c_i.new_empty(0)
    return d_i, torch.empty_like(c_j) if j_gradient else c_j.new_empty(0)


@contrast_blocks.register_fake
def _(
    c_i, c_j, temperature, labels_i, labels_j, f_i, f_j, threshold, threshold_j, negative_threshold, exclude_self,
    inside, i_gradient, j_gradient,
):  # fmt: skip
    rows = c_i.new_empty(c_i.shape[:2])
    count = torch.empty_like(rows, dtype=torch.int64)
    return c_i.new_empty(()), rows, torch.empty_like(rows), count, *empty_gradients(c_i, c_j, i_gradient, j_gradient)


@contrast_blocks_backward.register_fake
def _(d_log_sum, d_positive, c_i, c_j, *rest):
    return empty_gradients(c_i, c_j, *rest[-2:])


def setup_context(ctx, inputs, output):
    *tensors, ctx.exclude_self, ctx.inside, i_gradient, j_gradient = inputs
    ctx.kept = (i_gradient, j_gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.mark_non_differentiable(output[3])


def backward(ctx, d_loss, d_log_sum, d_positive, *_):
    refuse_second("contrastive_loss", "torch")
    *tensors, count, kept_i, kept_j = ctx.saved_tensors
    asked = ctx.needs_input_grad[:2]
    gradients = [
        d_loss * kept if d_loss is not None and wanted else None for kept, wanted in zip((kept_i, kept_j), asked)
    ]
    if d_loss is not None and any(wanted and not kept for wanted, kept in zip(asked, ctx.kept)):
        # a program that was exported from inputs without gradients kept none: the mean is that of the rows
        gradients, has_positive = [None, None], count > 0
        share = torch.where(has_positive, d_loss / has_positive.sum().clamp(min=1), 0.0)
        d_log_sum = share if d_log_sum is None else d_log_sum + share
        d_positive = -share if d_positive is None else d_positive - share
    if d_log_sum is not None or d_positive is not None:
        d_log_sum = torch.zeros_like(d_positive) if d_log_sum is None else d_log_sum
        d_positive = torch.zeros_like(d_log_sum) if d_positive is None else d_positive
        of_rows = contrast_blocks_backward(d_log_sum, d_positive, *tensors, ctx.exclude_self, ctx.inside, *asked)
        gradients = [
            None if not wanted else toward if kept is None else kept + toward
            for kept, toward, wanted in zip(gradients, of_rows, asked)
        ]
    return (*gradients, *[None] * 12)


contrast_blocks.register_autograd(backward, setup_context=setup_context)
