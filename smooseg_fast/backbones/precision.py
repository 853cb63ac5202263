"""The dtype that a vision transformer computes in: named by the user, or the fastest on the device."""

from __future__ import annotations

from typing import get_args

import torch

from ..config import BackbonePrecision
from ..errors import UserError


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that `precision` names; UserError for an unknown one.

    "auto" is bfloat16 on a GPU with native support, else float16; on a CPU it is bfloat16 with bfloat16 matrix units
    (Intel AMX), where it takes a third of the time, else float32.
    """
    choices = get_args(BackbonePrecision)
    if precision not in choices:
        raise UserError(f"--backbone-precision {precision}: unknown; choose one of {', '.join(choices)}")
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cpu":
        return torch.bfloat16 if has_matrix_units() else torch.float32
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16
    return torch.float16


def has_matrix_units() -> bool:
    """True if this CPU multiplies bfloat16 matrices in hardware and PyTorch makes use of it."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
