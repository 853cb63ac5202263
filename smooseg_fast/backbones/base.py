"""The base of all backbones: a frozen map from uint8 images to one feature row per patch, identified by a digest."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import UserError
from .catalogue import licence_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Backbone(ABC):
    """A frozen feature extractor.

    Attributes:
        name: the user's text.
        digest: hex; changes with the weights and the code, not with the device or the precision.
        patch: pixels per side of a patch; image sides must be multiples of it.
        dim: D, channels of a feature row.
        device: images are moved there, and features come out there.
        precision: the dtype it computes in, by torch's name, or "its own"; affects the last bits of the features.
        licence: of the weights, as `catalogue.licence_of` knows it.
        sizes: short sides in pixels that suit it for training and for evaluation.

    A subclass sets the first five through `__init__` and implements `extract`.
    """

    precision = "float32"
    sizes: tuple[int, int] = (224, 320)

    def __init__(self, *, name: str, digest: str, patch: int, dim: int, device: str | torch.device = "cpu") -> None:
        self.name, self.digest, self.patch, self.dim = name, digest, patch, dim
        self.device, self.licence = torch.device(device), licence_of(name)

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """Float32 RGB images [B,3,H,W] in 0..1 on `device` -> features [B,P,D], P row-major.

        H and W are multiples of `patch`. Called with gradients off. The result may be float32, float16 or bfloat16.
        """

    def __call__(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """uint8 RGB images [B,3,H,W] on any device -> (features [B,P,D] on `device`, grid (h, w)), P = h*w row-major.

        The features carry no gradient but are ordinary tensors, so a loss may use them as constants. Raises ValueError
        unless the images are uint8 [B,3,H,W] with sides that are multiples of `patch`, and UserError if the backbone
        returns a wrong shape or dtype.
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


@contextmanager
def naming(subject: str) -> Iterator[None]:
    """Puts `subject`, an argument and its value or a file, before the UserErrors of the `with` block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error


def require_finite(weights: Mapping[str, object], advice: str) -> None:
    """UserError naming the first of `weights` that holds NaN or infinity."""
    for name, value in weights.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
            continue
        if not value.isfinite().all():
            raise UserError(f"its weights hold NaN or infinity (first in {name}); {advice}")


def describe(value: object) -> str:
    """Describes a value in a few words, for an error line."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return f"a {type(value).__name__} of ({', '.join(describe(item) for item in value)})"
    return repr(value) if isinstance(value, (int, float, str, type(None))) else f"a {type(value).__name__}"


def reason(error: BaseException) -> str:
    """Describes an exception in one short line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def digest_of(*parts: str | bytes | Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of texts, bytes and named tensors (names, dtypes, shapes, values), in order; names are sorted."""
    total = hashlib.sha256()

    def add(data: bytes | memoryview) -> None:
        total.update(len(data).to_bytes(8, "little"))  # so that ("ab", "c") and ("a", "bc") differ
        total.update(data)

    for part in parts:
        if isinstance(part, Mapping):
            for name in sorted(part):
                tensor = part[name].detach().cpu()
                add(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                # view as bytes: numpy has no bfloat16, and a 0-d tensor has no byte view
                add(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            add(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()
