"""What a vision transformer computes in: by name, or what the device is fast in."""

from __future__ import annotations

from typing import get_args

import torch

from ..config import BackbonePrecision
from ..errors import UserError


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that `precision` names. "auto": on a GPU bfloat16 where it is native, else float16; on a CPU with bfloat16 matrix units
    (Intel AMX) bfloat16, which takes a third of the time there; else float32.
    """
    if precision not in get_args(BackbonePrecision):
        raise UserError(
            f"--backbone-precision {precision}: is not known; choose one of {', '.join(get_args(BackbonePrecision))}"
        )
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
    """Whether this CPU multiplies bfloat16 matrices in hardware, and PyTorch knows."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
