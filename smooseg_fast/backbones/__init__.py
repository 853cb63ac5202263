"""Frozen backbones by name: the built-in one, a ViT from the hub, a folder or a weights file, or your own callable."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..errors import UserError
from .base import Backbone, reason
from .original import read_original
from .precision import compute_dtype
from .vitfiles import VitFiles, read_folder

__all__ = ["Backbone", "build_vit", "load_backbone"]

ACCEPTED = (
    '"filterbank", a hub name such as facebook/dino-vits8, a local transformers folder (config.json and '
    "model.safetensors), a DINO or DINOv2 .pth, or module:callable"
)


def load_backbone(spec: str, device: str | torch.device = "cpu", precision: str = "auto") -> Backbone:
    """The backbone that `spec` names, on `device`; a vision transformer computes in `precision` (see `compute_dtype`).

    "filterbank" is built in. An existing folder holds a transformers ViT; an existing file holds the weights of DINO or
    DINOv2 as torch.save wrote them, alone or in a checkpoint. "module:callable" is imported (see `custom`).
    "owner/name" is a transformers ViT on the hub, read from the local cache if that is complete. Raises UserError for a
    backbone that cannot be loaded and for a precision that it does not support.
    """
    device = usable_device(device)
    path = Path(spec).expanduser()
    if spec == "filterbank":
        from .filterbank import Filterbank

        return _only_auto(precision, Filterbank(device))
    if spec and path.is_dir():
        return build_vit(spec, read_folder(spec, path), device, precision)
    if path.is_file():
        return build_vit(spec, read_original(path, f"--backbone {spec}")[1], device, precision)
    if ":" in spec:
        from .custom import CustomBackbone

        return _only_auto(precision, CustomBackbone(spec, device))
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", spec):
        return build_vit(spec, None, device, precision)
    missing = "there is no such folder or file" if "/" in spec else "unknown"
    raise UserError(f"--backbone {spec}: {missing}; give {ACCEPTED}")


def _only_auto(precision: str, backbone: Backbone) -> Backbone:
    if precision in ("auto", backbone.precision):
        return backbone
    compute_dtype(precision, backbone.device)  # raises for an unknown precision
    raise UserError(
        f"--backbone-precision {precision}: {backbone.name} computes in {backbone.precision} alone; leave the flag out"
    )


def usable_device(device: str | torch.device) -> torch.device:
    """Parses `device`. Raises UserError if this machine has no such device."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: "Torch not compiled with CUDA enabled"
        raise UserError(f"--device {device}: cannot be used here ({reason(error)}); --device cpu always can") from error
    return device


def build_vit(
    name: str, files: VitFiles | None, device: str | torch.device = "cpu", precision: str = "auto"
) -> Backbone:
    """The ViT in `files`, else `name` on the hub. UserError without transformers or if the files hold no ViT."""
    try:
        from . import vit  # imports transformers, which is optional and slow
    except ImportError as error:
        raise UserError(
            f'--backbone {name}: needs transformers ({reason(error)}); run: pip install "smooseg_fast[transformers]"'
        ) from error
    device = usable_device(device)
    dtype = compute_dtype(precision, device)
    return vit.VitBackbone(name, read_folder(name, vit.fetch(name)) if files is None else files, device, dtype)
