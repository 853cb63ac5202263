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
import sys
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .base import Backbone, describe, digest_of, reason

FORMS = "[B,D,h,w], or ([B,P,D], (h, w)) with P = h*w"
PROBE = 224  # pixels: the side that most backbones are made for


class CustomBackbone(Backbone):
    """`module:callable` as a `Backbone`; features keep the callable's dtype, but float64 becomes float32."""

    precision = "its own"

    def __init__(self, spec: str, device: torch.device) -> None:
        target = _resolve(spec)
        sources = _sources(spec, target)
        if inspect.isclass(target):
            try:
                target = target()
            except Exception as error:
                raise UserError(
                    f"--backbone {spec}: making it without arguments failed ({reason(error)}); give it defaults"
                ) from error
            if not callable(target):
                raise UserError(f"--backbone {spec}: its instances cannot be called; define __call__(images)")
        state: dict[str, Tensor] = {}
        if isinstance(target, nn.Module):
            target = target.to(device).eval().requires_grad_(False)
            state = {name: value for name, value in target.state_dict().items() if isinstance(value, Tensor)}
        self.target: Callable[[Tensor], Any] = target
        patch, dim = self._probe(spec, device)
        note = getattr(target, "digest", "")
        if not isinstance(note, str):
            raise UserError(
                f"--backbone {spec}: its attribute `digest` is {describe(note)}; "
                "set it to text that changes with the weights"
            )
        digest = digest_of("custom-1", spec, note, *sources, state)
        super().__init__(name=spec, digest=digest, patch=patch, dim=dim, device=device)

    def extract(self, images: Tensor) -> Tensor:
        features, grid = _read(self.name, self.target(images), images.shape[0])
        expected = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        if grid != expected:
            raise UserError(
                f"--backbone {self.name}: gave a grid of {grid[0]}x{grid[1]} for {images.shape[2]}x{images.shape[3]} "
                f"pixels, not {expected[0]}x{expected[1]} (patch {self.patch}); "
                "set its attribute `patch` to the pixels of a patch's side"
            )
        return features.to(self.device)

    def _probe(self, spec: str, device: torch.device) -> tuple[int, int]:
        """(patch, D) from the attribute `patch`, if it has one, and from one blank image."""
        patch = getattr(self.target, "patch", None)
        if patch is not None and (isinstance(patch, bool) or not isinstance(patch, int) or patch < 1):
            raise UserError(
                f"--backbone {spec}: its attribute `patch` is {describe(patch)}; "
                "set it to the pixels of a patch's side, 1 or more"
            )
        side = PROBE if patch is None else patch * math.ceil(PROBE / patch)
        try:
            with torch.no_grad():
                output = self.target(torch.zeros(1, 3, side, side, device=device))
        except Exception as error:
            raise UserError(
                f"--backbone {spec}: calling it with [1,3,{side},{side}] failed ({reason(error)})"
            ) from error
        features, (h, w) = _read(spec, output, 1)
        if patch is None:
            if h != w or side % h:
                raise UserError(
                    f"--backbone {spec}: gave a grid of {h}x{w} for {side}x{side} pixels, which is no whole patch "
                    "size; set its attribute `patch` to the pixels of a patch's side"
                )
            patch = side // h
        elif (h, w) != (side // patch, side // patch):
            raise UserError(
                f"--backbone {spec}: its attribute `patch` is {patch}, but it gave a grid of {h}x{w} for {side}x{side} "
                "pixels; correct one"
            )
        return patch, features.shape[-1]


def _resolve(spec: str) -> Any:
    """Imports "module:name"; modules in the working folder can be imported, as with `python -m`."""
    module_name, _, name = spec.partition(":")
    if (
        not name.isidentifier()
        or not all(part.isidentifier() for part in module_name.split("."))
        or module_name.endswith(".py")
    ):
        raise UserError(f"--backbone {spec}: must read package.module:callable, without folders and without .py")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()  # else Python misses files written since it last looked
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(
                f"--backbone {spec}: there is no module {error.name}; run from the folder that holds it, "
                "or put that folder on PYTHONPATH"
            ) from error
        raise UserError(f"--backbone {spec}: importing {module_name} failed ({reason(error)})") from error
    except Exception as error:
        raise UserError(f"--backbone {spec}: importing {module_name} failed ({reason(error)})") from error
    if not hasattr(module, name):
        raise UserError(f"--backbone {spec}: {module_name} has no {name}; name something that it defines")
    target = getattr(module, name)
    if not callable(target):
        raise UserError(
            f"--backbone {spec}: is {describe(target)}, which cannot be called; "
            "name a function, a class or a torch.nn.Module"
        )
    return target


def _sources(spec: str, target: Any) -> list[bytes]:
    """The source files of the module in `spec` and of the module that defines the target, which may differ."""
    defined_by = target if inspect.isclass(target) or inspect.isroutine(target) else type(target)
    modules = dict.fromkeys([spec.partition(":")[0], str(getattr(defined_by, "__module__", ""))])
    files = [getattr(sys.modules.get(module), "__file__", None) for module in modules]
    return [Path(file).read_bytes() for file in files if file and Path(file).is_file()]


def _read(spec: str, output: Any, batch: int) -> tuple[Tensor, tuple[int, int]]:
    """Either accepted form -> (features [B,P,D] in at most float32, grid). Raises UserError for any other."""
    features: Any = output
    grid: Sequence[Any] = ()
    if isinstance(output, Tensor) and output.ndim == 4:
        features, grid = output.flatten(2).transpose(1, 2), output.shape[-2:]
    elif isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[1], (tuple, list)):
        features, grid = output
    if not (
        isinstance(features, Tensor)
        and features.ndim == 3
        and features.is_floating_point()
        and len(grid) == 2
        and all(isinstance(side, Integral) and int(side) > 0 for side in grid)
        and features.shape[:2] == (batch, grid[0] * grid[1])
        and features.shape[2] > 0
    ):
        raise UserError(
            f"--backbone {spec}: gave {describe(output)} for B={batch}; it must give {FORMS}, in floating point"
        )
    return (features.float() if features.dtype == torch.float64 else features), (int(grid[0]), int(grid[1]))
