"""Images in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .reading import PLAIN, Picture


class ArrayDataset:
    """Images in memory, each uint8 [H,W,3], without labels. UserError naming the first that is something else."""

    name, labelled, held_out, class_names, notes, reading = "arrays", False, False, None, (), PLAIN

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        if not len(images):
            raise UserError("images: empty; give at least one uint8 [H,W,3] array")
        for place, image in enumerate(images):
            if not isinstance(image, np.ndarray):
                raise UserError(f"images[{place}]: must be a uint8 [H,W,3] array, got {type(image).__name__}")
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                actual = f"{image.dtype} {list(image.shape)}"
                raise UserError(f"images[{place}]: must be a uint8 [H,W,3] array, got {actual}")
        self.images = tuple(images)
        self.names = tuple(f"image {place}" for place in range(len(images)))

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int) -> Picture:
        return Picture(self.images[index])

    def image(self, index: int) -> np.ndarray:
        return self.images[index]

    def label(self, index: int) -> None:
        return None

    def fingerprint(self) -> str:
        """Hash the shapes and pixels."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
        return digest.hexdigest()
