"""Contrastive losses as written, with [B,N,M] matrices: any dtype, gradients of any order, the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import ContrastProblem
from .rows import unit_rows


def contrastive(problem: ContrastProblem) -> tuple[None, Tensor, Tensor, Tensor]:
    """Returns no loss, log_sum [B,N], positive [B,N], count int64 [B,N]."""
    dtype = problem.temperature.dtype
    s = unit_rows(problem.codes_i.to(dtype)) @ unit_rows(problem.codes_j.to(dtype)).mT / problem.temperature
    related, candidate = pair_masks(problem)
    count = related.sum(2)
    log_sum = masked_logsumexp(s, candidate)
    if problem.inside:
        positive = masked_logsumexp(s, related) - count.clamp(min=1).to(dtype).log()
    else:
        positive = torch.where(related, s, 0.0).sum(2) / count.clamp(min=1)
    return None, log_sum, positive, count


def pair_masks(problem: ContrastProblem) -> tuple[Tensor, Tensor]:
    """Returns the positives and the candidates, bool [B,N,M] each."""
    if problem.labels_i is not None and problem.labels_j is not None:
        i, j = problem.labels_i[:, :, None], problem.labels_j[:, None, :]
        related, candidate = (i == j) & (i >= 0), (j >= 0).expand(-1, i.shape[1], -1)
    else:
        assert problem.features_i is not None
        assert problem.features_j is not None
        assert problem.threshold is not None
        dtype = problem.temperature.dtype
        similarity = unit_rows(problem.features_i.to(dtype)) @ unit_rows(problem.features_j.to(dtype)).mT
        related = similarity > problem.threshold[:, :, None]
        if problem.threshold_j is not None:
            related = related | (similarity > problem.threshold_j[:, None, :])
        candidate = torch.ones_like(related)
        if problem.negative_threshold is not None:
            candidate = related | (similarity < problem.negative_threshold[:, :, None])
    if problem.exclude_self:
        row = torch.arange(related.shape[1], device=related.device)
        other = row[:, None] != row
        related, candidate = related & other, candidate & other
    return related, candidate


def masked_logsumexp(s: Tensor, mask: Tensor) -> Tensor:
    """Takes [B,N,M] to [B,N]: over the pairs in the mask, 0 where there are none."""
    total = torch.where(mask, s, -torch.inf).logsumexp(2)
    return torch.where(mask.any(2), total, 0.0)
