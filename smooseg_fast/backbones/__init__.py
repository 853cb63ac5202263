"""Frozen backbones by name: the built-in one, a ViT from the hub, a folder or a weights file, or your own callable."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..errors import UserError
from .base import Backbone, naming, reason
from .catalogue import BUILT_IN, LITE
from .original import read_original
from .precision import compute_dtype
from .vitfiles import VitFiles, read_folder

__all__ = ["Backbone", "build_vit", "load_backbone"]

ACCEPTED = (
    '"filterbank", "efficientnet-lite0", a hub name such as facebook/dino-vits8, a local '
    "transformers folder (config.json and "
    "model.safetensors), a DINO, DINOv2 or DINOv3 .pth, or module:callable"
)


def load_backbone(spec: str, device: str | torch.device = "cpu", precision: str = "auto") -> Backbone:
    """The backbone that `spec` names, on `device`; a network computes in `precision` (see `compute_dtype`).

    "filterbank" is built in; "efficientnet-lite0" comes with the extra `photos`.
    An existing folder holds a transformers ViT; an existing file holds the weights of DINO, DINOv2 or DINOv3 as
    torch.save wrote them, alone or in a checkpoint. "module:callable" is imported (see `custom`).
    "owner/name" is a transformers ViT on the hub, read from the local cache if that is complete. Raises UserError for a
    backbone that cannot be loaded and for a precision that it does not support.
    """
    device, path = usable_device(device), Path(spec).expanduser()
    backbone: Backbone | None = None
    files: VitFiles | None = None
    with naming(f"--backbone {spec}"):
        if spec == BUILT_IN:
            from .filterbank import Filterbank

            backbone = Filterbank(device)
        elif spec == LITE:
            from .efficientnet import EfficientNetLite0

            return EfficientNetLite0(device, compute_dtype(precision, device, convolutions=True))
        elif spec and path.is_dir():
            files = read_folder(path)
        elif path.is_file():
            files = read_original(path)
        elif ":" in spec:
            from .custom import CustomBackbone

            backbone = CustomBackbone(spec, device)
        elif not re.fullmatch(r"\w[\w.-]*/[\w.-]+", spec):
            missing = "there is no such folder or file" if "/" in spec else "unknown"
            raise UserError(f"{missing}; give {ACCEPTED}")
    if backbone is None:
        return build_vit(spec, files, device, precision)
    if precision not in ("auto", backbone.precision):
        alone = f"{spec} computes in {backbone.precision} alone"
        raise UserError(f"--backbone-precision {precision}: {alone}; leave the flag out")
    return backbone


def usable_device(device: str | torch.device) -> torch.device:
    """Parses `device`. Raises UserError if this machine has no such device."""
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).cpu()  # meta has no values
    except (RuntimeError, AssertionError) as error:  # AssertionError: "Torch not compiled with CUDA enabled"
        raise UserError(f"--device {device}: cannot be used here ({reason(error)}); --device cpu always can") from error
    return device


def build_vit(
    name: str, files: VitFiles | None, device: str | torch.device = "cpu", precision: str = "auto"
) -> Backbone:
    """The ViT in `files`, else `name` on the hub. UserError without transformers or if the files hold no ViT."""
    device = usable_device(device)
    dtype = compute_dtype(precision, device)
    with naming(f"--backbone {name}"):
        try:
            from . import vit  # imports transformers, which is optional and slow
        except ImportError as error:
            advice = 'run: pip install "smooseg_fast[transformers]"'
            raise UserError(f"needs transformers ({reason(error)}); {advice}") from error
        return vit.VitBackbone(name, files or read_folder(vit.fetch(name)), device, dtype)
