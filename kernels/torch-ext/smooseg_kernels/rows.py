"""Row norms, by one rule for all: fp32 at least, and a row shorter than 1e-10 has cosine 0 and gradient 0."""

from __future__ import annotations

import torch
from torch import Tensor

SHORTEST = 1e-10


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns fp64 if any input has it, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def invert_norms(norms: Tensor) -> Tensor:
    """Returns 1 / norms, and 0 with gradient 0 where a norm is below 1e-10."""
    short = norms < SHORTEST
    return torch.where(short, 0.0, 1.0 / torch.where(short, 1.0, norms))


def inverse_norms(rows: Tensor) -> Tensor:
    """Takes rows [..., N] to [..., 1]."""
    return invert_norms(torch.linalg.vector_norm(rows, dim=-1, keepdim=True))


def unit_rows(rows: Tensor) -> Tensor:
    """Scales rows [..., N] to length 1, or 0."""
    return rows * inverse_norms(rows)
