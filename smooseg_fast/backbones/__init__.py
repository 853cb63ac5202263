"""Frozen backbones by name: built in, a transformers ViT from the hub or a folder, or anyone's own callable."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..errors import UserError
from .base import Backbone, reason

__all__ = ["Backbone", "load_backbone"]

ACCEPTED = (
    '"filterbank", a hub name such as facebook/dino-vits8, a local transformers folder (config.json and model.safetensors), '
    "or module:callable"
)


def load_backbone(spec: str, device: str | torch.device = "cpu") -> Backbone:
    """The backbone that `spec` names, on `device`.

    "filterbank" is built in; an existing folder holds a transformers ViT; "module:callable" is imported (see `custom`); "owner/name" is a
    transformers ViT on the hub, taken from the local cache where it is there whole. UserError in one line for anything that cannot be had.
    """
    device = usable_device(device)
    path = Path(spec).expanduser()
    if spec == "filterbank":
        from .filterbank import Filterbank

        return Filterbank(device)
    if spec and path.is_dir():
        return _load_vit(spec, path, device)
    if path.is_file():
        raise UserError(
            f"--backbone {spec}: is a file; original .pth weights are not read: convert them to a transformers folder "
            "(config.json and model.safetensors) and give the folder"
        )
    if ":" in spec:
        from .custom import CustomBackbone

        return CustomBackbone(spec, device)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", spec):
        return _load_vit(spec, None, device)
    missing = "there is no such folder" if "/" in spec else "unknown"
    raise UserError(f"--backbone {spec}: {missing}; give {ACCEPTED}")


def usable_device(device: str | torch.device) -> torch.device:
    """`device` as torch names it; UserError when there is no such device here."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: "Torch not compiled with CUDA enabled"
        raise UserError(f"--device {device}: cannot be used here ({reason(error)}); --device cpu always can") from error
    return device


def _load_vit(spec: str, folder: Path | None, device: torch.device) -> Backbone:
    try:
        from . import vit  # imports transformers, which is optional and slow
    except ImportError as error:
        raise UserError(
            f'--backbone {spec}: needs transformers ({reason(error)}); run: pip install "smooseg_fast[transformers]"'
        ) from error
    return vit.VitBackbone(spec, vit.fetch(spec) if folder is None else folder, device)
