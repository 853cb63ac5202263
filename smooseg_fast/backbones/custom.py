"""Your own backbone: `module:callable`.

The callable gets float32 RGB images [B,3,H,W] in 0..1 on the chosen device and returns features as [B,D,h,w], or as
([B,P,D], (h, w)) with P = h*w row-major. A class is instantiated without arguments; a torch.nn.Module is moved to the
device, set to eval and frozen.

An integer attribute `patch` gives the pixels per side of a patch; without it, one 224x224 image is tried. A text
attribute `digest` stands for anything else that the features depend on besides the source file and the state dict, such
as weights read from elsewhere or other modules. Change it when they change, or stored features count as current.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .base import Backbone, describe, digest_of, naming, reason, require_finite

FORMS = "[B,D,h,w], or ([B,P,D], (h, w)) with P = h*w"
PROBE = 224  # pixels: the side that most backbones are made for


class CustomBackbone(Backbone):
    """`module:callable` as a `Backbone`; features keep the callable's dtype, but float64 becomes float32."""

    precision = "its own"

    def __init__(self, spec: str, device: torch.device) -> None:
        self.target = resolve(spec)
        state: dict[str, Tensor] = {}
        if isinstance(self.target, nn.Module):
            self.target.to(device).eval().requires_grad_(False)
            state = {name: value for name, value in self.target.state_dict().items() if isinstance(value, Tensor)}
            require_finite(state, "load weights that are whole")
        patch, note = getattr(self.target, "patch", None), getattr(self.target, "digest", "")
        if patch is not None and (type(patch) is not int or patch < 1):
            raise UserError(f"its `patch` is {describe(patch)}; set it to the pixels of a patch's side, 1 or more")
        if not isinstance(note, str):
            raise UserError(f"its `digest` is {describe(note)}; set it to text that changes with the weights")
        side = PROBE if patch is None else patch * math.ceil(PROBE / patch)
        probe = torch.zeros(1, 3, side, side, device=device)
        try:
            with torch.no_grad():
                output = self.target(probe)
        except Exception as error:
            raise UserError(f"calling it with [1,3,{side},{side}] failed ({reason(error)})") from error
        features, patch = _read(output, probe, patch)
        digest = digest_of("custom-1", spec, note, *sources(spec, self.target), state)
        super().__init__(name=spec, digest=digest, patch=patch, dim=features.shape[-1], device=device)

    def extract(self, images: Tensor) -> Tensor:
        with naming(f"--backbone {self.name}"):
            return _read(self.target(images), images, self.patch)[0].to(self.device)


def resolve(spec: str) -> Any:
    """Imports "module:name"; modules in the working folder can be imported, as with `python -m`."""
    if not re.fullmatch(r"[\w.]+(?<!\.py):\w+", spec):
        raise UserError("must read package.module:callable, without folders and without .py")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()  # else Python misses files written since it last looked
    module, _, name = spec.partition(":")
    try:
        target = getattr(importlib.import_module(module), name)
        target = target() if inspect.isclass(target) else target
    except Exception as error:
        raise UserError(
            f"importing it failed ({reason(error)}); correct it, or run from the folder that holds {module} or with "
            "that folder on PYTHONPATH; a class must need no arguments"
        ) from error
    if not callable(target):
        raise UserError(f"is {describe(target)}, which cannot be called; name a function, a class or a module of torch")
    return target


def sources(spec: str, target: Any) -> list[bytes]:
    """The source files of the module in `spec` and of the module that defines the target, which may differ."""
    defined_by = target if inspect.isroutine(target) else type(target)
    modules = dict.fromkeys([spec.partition(":")[0], str(getattr(defined_by, "__module__", ""))])
    files = [getattr(sys.modules.get(module), "__file__", None) for module in modules]
    return [Path(file).read_bytes() for file in files if file and Path(file).is_file()]


def _read(output: Any, images: Tensor, patch: int | None) -> tuple[Tensor, int]:
    """Either accepted form -> (features [B,P,D] in at most float32, `patch` or that of the output's grid)."""
    B, _, height, width = images.shape
    try:
        features, (h, w) = (output.flatten(2).mT, output.shape[2:]) if isinstance(output, Tensor) else output
        fits = features.shape[:2] == (B, h * w) and features.ndim == 3 and features.is_floating_point()
    except (TypeError, ValueError, AttributeError, LookupError):
        fits = False
    if not fits or 0 in features.shape:
        raise UserError(f"gave {describe(output)} for B={B}; it must give {FORMS}, in floating point")
    patch = patch or max(1, height // h)
    if (h * patch, w * patch) != (height, width):
        raise UserError(
            f"gave a grid of {h}x{w} for {height}x{width} pixels, which are no patches of {patch}x{patch}; "
            "set its attribute `patch` to the pixels of a patch's side"
        )
    return (features.float() if features.dtype == torch.float64 else features), int(patch)
