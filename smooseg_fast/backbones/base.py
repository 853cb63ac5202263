"""What every backbone is: a frozen map from uint8 images to one feature row per patch, with a digest that names it exactly."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UserError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Backbone(ABC):
    """A frozen feature extractor.

    Attributes:
        name: as the user gave it.
        digest: hex; changes when the weights or the code change, and does not depend on the device or its precision.
        patch: pixels per side of a patch; image sides must be multiples of it.
        dim: D, channels of a feature row.
        device: where the images are taken to and the features come out.
        precision: what it computes in, as torch names it, or "its own"; moves the last bits of the features.

    A subclass sets the first five through `__init__` and implements `extract`.
    """

    precision = "float32"

    def __init__(self, *, name: str, digest: str, patch: int, dim: int, device: str | torch.device = "cpu") -> None:
        self.name, self.digest, self.patch, self.dim = name, digest, patch, dim
        self.device = torch.device(device)

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """Float32 RGB images [B,3,H,W] in 0..1 on `device`, sides multiples of `patch` -> features [B,P,D], P row-major.

        Called with gradients off. The result may be float32, float16 or bfloat16.
        """

    def __call__(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """uint8 RGB images [B,3,H,W] on any device -> (features [B,P,D] on `device`, grid (h, w)), P = h*w row-major.

        The features carry no gradient but are ordinary tensors, so that a loss may use them as constants. ValueError when the images
        are not uint8 [B,3,H,W] with sides that are multiples of `patch`; UserError when the backbone gives another shape than it must.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[0] < 1:
            raise ValueError(f"images must be uint8 [B,3,H,W] with B >= 1, not {describe(images)}")
        height, width = images.shape[-2:]
        if min(height, width) < self.patch or height % self.patch or width % self.patch:
            raise ValueError(
                f"image sides must be multiples of the {self.patch}-pixel patch of {self.name}, not {height}x{width}"
            )
        grid = (height // self.patch, width // self.patch)
        with torch.no_grad():  # not inference_mode: its tensors may not enter a loss
            features = self.extract(images.to(self.device).to(torch.float32).div_(255))
        expected = (images.shape[0], grid[0] * grid[1], self.dim)
        if tuple(features.shape) != expected or features.dtype not in FLOATS:
            raise UserError(
                f"--backbone {self.name}: a {height}x{width} image must give features {list(expected)} "
                f"(patch {self.patch}), not {describe(features)}; use a backbone that keeps one feature row per patch"
            )
        return features.detach().contiguous(), grid


def describe(value: object) -> str:
    """What a value is, in the few words that an error line has room for."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return f"a {type(value).__name__} of ({', '.join(describe(item) for item in value)})"
    if isinstance(value, (int, float, str, bool, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"


def reason(error: BaseException) -> str:
    """An exception as one short line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def digest_of(*parts: str | bytes | Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of texts, bytes and named tensors (names, dtypes, shapes and values), in the order given; names are sorted."""
    total = hashlib.sha256()

    def add(data: bytes | memoryview) -> None:
        total.update(len(data).to_bytes(8, "little"))  # so that ("ab", "c") and ("a", "bc") differ
        total.update(data)

    for part in parts:
        if isinstance(part, Mapping):
            for name in sorted(part):
                tensor = part[name].detach().cpu()
                add(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                # as bytes: numpy has no bfloat16, and a 0-d tensor has no byte view
                add(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
        else:
            add(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()
