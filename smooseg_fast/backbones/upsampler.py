"""A feature upsampler of your own: `module:callable`.

The callable gets the features float32 [1,h,w,D] of a tile of a picture, on the backbone's device, and that tile, uint8
RGB [H,W,3] with H = h * patch and W = w * patch, on the same device. It returns features [1,n*h,n*w,D] in floating
point, with the same whole number n, 1..patch, for every tile; cell (i, j) lies over the pixels from (i * patch / n,
j * patch / n) on. Memory grows with n * n * D. Tiles are at most 640 pixels high and wide.

A class is instantiated without arguments; a torch.nn.Module is moved to the device, set to eval and frozen. The number
n is measured once, with a tile of 4 x 4 patches. A text attribute `digest` stands for anything else that the features
depend on besides the source file and the state dict, as for a backbone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from .base import Backbone, describe, digest_of, naming, reason, require_finite
from .custom import resolve, sources

PROBE = 4  # patches


class Upsampler:
    """A `module:callable` that refines features. `factor` is n, and `digest` changes with its code and its weights.

    Args:
        scales: how many scales stand side by side in the features.

    Raises:
        UserError: when it cannot be imported, fails, or returns anything else than [1,n*h,n*w,D].
    """

    def __init__(self, spec: str, backbone: Backbone, scales: int = 1):
        self.name, self.patch = spec, backbone.patch
        with naming(f"--upsampler {spec}"):
            self.target = resolve(spec)
            state: dict[str, Tensor] = {}
            if isinstance(self.target, nn.Module):
                self.target.to(backbone.device).eval().requires_grad_(False)
                state = {name: value for name, value in self.target.state_dict().items() if isinstance(value, Tensor)}
                require_finite(state, "load weights that are whole")
            note = getattr(self.target, "digest", "")
            if not isinstance(note, str):
                raise UserError(f"its `digest` is {describe(note)}; set it to text that changes with the weights")
            self.digest = digest_of("upsampler-1", spec, note, *sources(spec, self.target), state)
            probe = torch.zeros(1, PROBE, PROBE, backbone.dim * scales, device=backbone.device)
            output = self._called(probe, np.zeros((PROBE * self.patch, PROBE * self.patch, 3), np.uint8))
        self.factor = output.shape[1] // PROBE

    def __call__(self, features: Tensor, picture: np.ndarray) -> Tensor:
        """Features [1,h,w,D] of the picture uint8 [H,W,3] -> float32 [1,P,D], P = n*h * n*w row-major."""
        with naming(f"--upsampler {self.name}"):
            fine = self._called(features, picture)
            if fine.shape[1] != self.factor * features.shape[1]:
                raise UserError(
                    f"gave {describe(fine)} for {describe(features)}, but {self.factor} times the height and width of "
                    f"{PROBE} x {PROBE} patches; give the same multiple for every tile"
                )
            if not torch.stack([fine.amin(), fine.amax()]).isfinite().all():
                raise UserError("gave NaN or infinity; correct it")
        return fine.flatten(1, 2)

    def _called(self, features: Tensor, picture: np.ndarray) -> Tensor:
        """Upsample features [1,h,w,D] -> float32 [1,n*h,n*w,D]. UserError where the callable returns anything else."""
        _, h, w, D = features.shape
        pixels = torch.from_numpy(np.array(picture)).to(features.device)
        try:
            with torch.no_grad():
                output: Any = self.target(features.float(), pixels)
        except Exception as error:
            raise UserError(f"calling it with {describe(features.float())} failed ({reason(error)})") from error
        n = output.shape[1] // h if isinstance(output, Tensor) and output.ndim == 4 else 0
        if not 1 <= n <= self.patch or output.shape != (1, n * h, n * w, D) or not output.is_floating_point():
            raise UserError(
                f"gave {describe(output)} for [1,{h},{w},{D}]; it must give [1,n*{h},n*{w},{D}] in floating point, "
                f"n a whole number of at most {self.patch}, the pixels of a patch"
            )
        return output.to(features.device).float()
