"""A trained segmenter: an image of any size in, a label of every pixel out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import smooseg_kernels as sk

from ..backbones import Backbone, build_vit, load_backbone
from ..backbones.base import digest_of
from ..backbones.weights import is_pickle
from ..config import TrainConfig
from ..datasets.images import ImageError, as_rgb, read_image, require_patch
from ..errors import UserError
from .checkpoint import Checkpoint, read_checkpoint
from .model import project
from .published import read_published
from .tiles import code_map


class Segmenter:
    """Frozen backbone, learnt projection and prototypes. Made by `fit`, or by `Segmenter.load` from a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, backbone: Backbone):
        if backbone.dim != checkpoint.head.projection.linear.in_features:
            raise UserError(
                f"--backbone {backbone.name}: gives {backbone.dim} channels, but the checkpoint was trained on "
                f"{checkpoint.head.projection.linear.in_features} of {checkpoint.backbone_name}; give that backbone"
            )
        self.checkpoint, self.backbone = checkpoint, backbone
        self.head = checkpoint.head.to(backbone.device).eval()

    @classmethod
    def load(
        cls, path: str | Path, *, backbone: str | None = None, device: str = "auto", precision: str = "auto"
    ) -> Segmenter:
        """Read a checkpoint, or a published SmooSeg .ckpt; nothing in it is executed. UserError for a damaged or foreign file.

        `backbone` is needed where the checkpoint was trained on a `module:callable`, and may name a local copy of a hub model.
        `precision`: what a ViT backbone computes in, as of `backbones.load_backbone`.
        """
        path, device = Path(path).expanduser(), pick_device(device)
        if is_pickle(path):
            published = read_published(path, f"--checkpoint {path}")
            if backbone is None:
                return cls(published.checkpoint, build_vit(str(path), published.vit, device, precision))
            return cls(published.checkpoint, load_backbone(backbone, device, precision))
        checkpoint = read_checkpoint(path)
        if backbone is None and ":" in checkpoint.backbone_name:
            raise UserError(
                f"--backbone: missing; {path} was trained on {checkpoint.backbone_name}, and a checkpoint never imports code by itself: "
                f"add --backbone {checkpoint.backbone_name}"
            )
        return cls(checkpoint, load_backbone(backbone or _beside(path, checkpoint.backbone_name), device, precision))

    def save(self, path: str | Path) -> Path:
        return self.checkpoint.write(path)

    @property
    def config(self) -> TrainConfig:
        return self.checkpoint.config

    @property
    def groups(self) -> int:
        """K, the number of prototypes: labels are 0 to K - 1."""
        return len(self.head.teacher)

    @property
    def same_backbone(self) -> bool:
        """Whether the backbone is, weight for weight, the one that the checkpoint was trained on."""
        return self.backbone.digest == self.checkpoint.backbone_digest

    @property
    def digest(self) -> str:
        """Hex; another one where anything else was learnt. Of the head and how images are resized, not of the backbone."""
        return digest_of(self.head.state_dict(), self.config.resample)

    @torch.no_grad()
    def predict(
        self, image: np.ndarray | Image.Image | str | Path, *, mirror: bool = True, short_side: int | None = None
    ) -> np.ndarray:
        """int64 [H,W] labels of an image: uint8 [H,W,3] RGB, uint8 [H,W] grey, a Pillow image as it lies, or a path (upright, by EXIF).

        mirror: average the codes with those of the mirrored image, as the paper does (twice the time). short_side: pixels that the
        short side is brought to before features are taken, at least one patch; the evaluation size of training by default. Larger
        sees finer detail and less context. Errors as of `pixels`.
        """
        pixels = self.pixels(image)
        side = self.config.eval_size if short_side is None else short_side
        patch = self.backbone.patch
        if side < patch:
            raise UserError(f"--short-side: must be at least one patch, {patch} pixels, got {side}")
        try:
            found = code_map(pixels, self.codes, patch, short_side=side, resample=self.config.resample, mirror=mirror)
        except MemoryError as error:
            reason = f"does not fit into memory with its short side at {side} pixels"
            raise ImageError(_name(image), reason, "give a smaller --short-side, or cut it into tiles") from error
        H, W = pixels.shape[:2]
        labels = sk.assign(
            found.codes.flatten(0, 1)[None], self.head.teacher, grid=found.codes.shape[:2], size=found.size
        )
        return labels[0, :H, :W].cpu().numpy()

    def pixels(self, image: np.ndarray | Image.Image | str | Path) -> np.ndarray:
        """uint8 [H,W,3] of what `predict` takes.

        ImageError, which is a UserError, for a file that cannot be decoded and for an image smaller than one patch of the backbone;
        UserError for other arrays.
        """
        pixels = rgb_of(image)
        require_patch(pixels, self.backbone.patch, _name(image))
        return pixels

    def codes(self, images: Tensor) -> Tensor:
        """uint8 [B,3,S,T] -> codes [B,h,w,Z]."""
        features, grid = self.backbone(images)
        return project(self.head, features).unflatten(1, grid)

    def describe(self) -> dict[str, Any]:
        """What it is, ready for JSON."""
        return {
            "backbone": self.checkpoint.backbone_name,
            "step": self.checkpoint.step,
            "groups": self.groups,
            **self.checkpoint.report,
        }


def rgb_of(image: np.ndarray | Image.Image | str | Path) -> np.ndarray:
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):  # as an array, one with a palette would be the numbers of its colours
        return as_rgb(image, image.format)
    given, image = image, np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        what = type(given).__name__ if image.dtype == object or not image.ndim else f"{image.dtype} {list(image.shape)}"
        raise UserError(f"image: must be uint8 [H,W,3] RGB or [H,W] grey, a Pillow image, or a path; got {what}")
    return np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image


def _name(image: np.ndarray | Image.Image | str | Path) -> str | Path:
    """What an error calls an image."""
    return image if isinstance(image, (str, Path)) else "image"


def _beside(checkpoint: Path, name: str) -> str:
    """A backbone of a relative path is looked for beside the checkpoint first, so that the two can be moved together."""
    place = checkpoint.parent / name
    if (place / "config.json").is_file() or is_pickle(place):
        return str(place)
    if name.startswith("./") and not Path(name).exists():
        raise UserError(
            f"--backbone: missing; {checkpoint} names {name}, and no such folder is beside it: give that folder, wherever it is now, "
            "or the file that it was made of"
        )
    return name


def pick_device(name: str) -> str:
    """The device that `name` stands for: "auto" is the first CUDA or ROCm GPU, else Apple's, else the CPU."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
