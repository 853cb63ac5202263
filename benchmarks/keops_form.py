"""A rival: the dense formula in KeOps, which never writes a P x P matrix and still computes every pair. Optional, needs pykeops."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from smooseg_kernels import dense
from smooseg_kernels.rows import unit_rows


def is_installed() -> bool:
    return importlib.util.find_spec("pykeops") is not None


def total(
    features: Tensor, codes: Tensor, student: Tensor, teacher: Tensor, partners: list, thresholds: Tensor
) -> Tensor:
    """The objective without a head axis, fp32 or fp64."""
    probs = dense.probabilities(codes[None], teacher[None], 0.1)[0]
    f, c, here = unit_rows(features), unit_rows(probs), torch.arange(len(features), device=features.device)
    energies = (
        pair_set(f, c, here if isinstance(entry, str) else entry, threshold)
        for entry, threshold in zip(partners, thresholds)
    )
    return sum(energies) + dense.data_term(codes[None], student[None], teacher[None], None)[0]


def pair_set(f: Tensor, c: Tensor, j: Tensor, threshold: Tensor) -> Tensor:
    """The mean of (W_ij - b) (1 - c_i . c_j), from unit rows f [B,P,D], c [B,P,K] and partners j [B]."""
    from pykeops.torch import LazyTensor

    B, P, _ = f.shape
    closeness = (LazyTensor(f[:, :, None]) * LazyTensor(f[j][:, None])).sum(-1)
    with torch.no_grad():  # the features are constants
        rows = closeness.sum(2) / P  # [B,P,1]
        bias = rows.mean() - rows - threshold
    distance = 1 - (LazyTensor(c[:, :, None]) * LazyTensor(c[j][:, None])).sum(-1)
    return ((closeness + LazyTensor(bias[:, :, None])) * distance).sum(2).sum() / (B * P * P)
