"""Losses of the family other than energies of closeness, as stateless modules for NCHW tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import checks
from .crf import crf_energy
from .crf.mean_field import settings
from .rows import accumulation_dtype


class CRFLoss(nn.Module):
    """Computes the pairwise energy of a fully connected CRF on random pixels of images, for NCHW tensors.

    energy = -mean over (image, i, j) of (k_ij - shift) p_i . p_j, as in `smooseg_kernels.crf_energy` and in STEGO
    (Hamilton et al., ICLR 2022, arXiv 2203.08414). Positions are rows and columns of pixels.

    Args:
        gaussian: (sigma in pixels, weight) of the kernel of distance alone; sigma above 0, weight 0 or more.
        bilateral: (sigma in pixels, sigma in the units of the images, weight) of the kernel of distance and colour.
        shift: a finite number; pairs whose kernel is below it are pushed apart.
        samples: how many pixels to draw, the same of every image, all different; None takes all pixels.
        impl: "auto", "triton", "torch" or "dense".

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
    """

    def __init__(
        self,
        gaussian: tuple[float, float],
        bilateral: tuple[float, float, float],
        *,
        shift: float = 0.0,
        samples: int | None = 1000,
        impl: str = "auto",
    ):
        super().__init__()
        settings("gaussian", gaussian, ("sigma", "weight"))
        settings("bilateral", bilateral, ("sigma", "sigma of colour", "weight"))
        self.gaussian, self.bilateral = gaussian, bilateral
        self.shift, self.impl = checks.number("shift", shift), impl
        self.samples = None if samples is None else checks.count("samples", samples)
        if samples == 0:
            raise ValueError("samples must be 1 or more, or None for all pixels, got 0")

    def extra_repr(self) -> str:
        names = ("gaussian", "bilateral", "shift", "samples", "impl")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, images: Tensor, probs: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Computes the energy of one batch, [].

        Args:
            images: [B,C,h,w], C at most 6, in the units of the bilateral kernel. A constant.
            probs: [B,K,h,w] label distributions, or rows of any length. Get gradients.
            pixels: int64 [n] pixel numbers, row * w + column, in place of a random draw.
        """
        checks.float_tensor("images", images, ("B", "C", "h", "w"), constant=True)
        B, _, h, w = images.shape
        checks.float_tensor("probs", probs, (B, "K", h, w), images)
        if pixels is None:
            pixels = torch.randperm(h * w, device=images.device)[: self.samples]
        else:
            pixels = checked_pixels(pixels, h * w, images)
        places = torch.stack((pixels // w, pixels % w), 1).to(accumulation_dtype(images))
        colors, p = (planes.flatten(2)[:, :, pixels].mT for planes in (images, probs))
        return crf_energy(
            places.expand(B, -1, -1), colors, p,
            gaussian=self.gaussian, bilateral=self.bilateral, shift=self.shift, impl=self.impl,
        )  # fmt: skip


def checked_pixels(pixels: Tensor, count: int, images: Tensor) -> Tensor:
    """Checks pixel numbers. Those that may not be read are clamped."""
    if not isinstance(pixels, Tensor) or pixels.dtype != torch.int64 or pixels.dim() != 1 or not len(pixels):
        got = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(f"pixels must be an int64 tensor [n] of pixel numbers, got {got}")
    if pixels.device != images.device:
        raise ValueError(f"pixels is on {pixels.device}, but the images are on {images.device}: move it there")
    if not checks.is_inspectable(pixels):
        return pixels.clamp(0, count - 1)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high >= count:
        raise ValueError(f"pixels must hold pixel numbers 0 to {count - 1}, got {low} to {high}")
    return pixels
