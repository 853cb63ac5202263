"""The dtype that a network computes in: named by the user, or the fastest on the device."""

from __future__ import annotations

from typing import get_args

import torch

from ..config import BackbonePrecision
from ..errors import UserError


def compute_dtype(precision: str, device: torch.device, *, convolutions: bool = False) -> torch.dtype:
    """The dtype that `precision` names; UserError for an unknown one.

    "auto" is bfloat16 on a GPU with native support, else float16; on a CPU it is bfloat16 with bfloat16 matrix units
    (Intel AMX), where it takes a third of the time, else float32. For `convolutions` a CPU's bfloat16 products without
    matrix units (AVX-512) are enough: EfficientNet-lite0 takes 0.4 of the time, and k-means on its features scores the
    same (street scenes 34.0 ± 0.4 % mIoU, in float32 33.5 ± 0.3; aerial 30.4 and 29.8 ± 0.9).
    """
    choices = get_args(BackbonePrecision)
    if precision not in choices:
        raise UserError(f"--backbone-precision {precision}: unknown; choose one of {', '.join(choices)}")
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cpu":
        return torch.bfloat16 if has_matrix_units() or (convolutions and has_dot_products()) else torch.float32
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16
    return torch.float16


def has_matrix_units() -> bool:
    """True if this CPU multiplies bfloat16 matrices in hardware and PyTorch makes use of it."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def has_dot_products() -> bool:
    """True if this CPU multiplies pairs of bfloat16 numbers in hardware."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
