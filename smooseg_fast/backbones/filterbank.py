"""`filterbank`, the built-in backbone: describes 8x8 pixels and their surroundings, with no download and no learning.

A row consists of groups of channels, each with a share of its squared length (`GROUPS`). Colour comes in logarithms, so
that the strength and tint of the light only shift it. Relative colour is normalised by mean and deviation of the
surroundings, so that the light drops out and faint contrasts count. Variation of colour follows, then texture, from the
amplitudes of Gabor pairs on the luminance at 4 scales and 8 orientations: contrast, profile over the scales,
directedness and patchiness, all invariant to rotation. Constants centre everything, so that cosines spread from about
-0.6 for unlike patches to 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Backbone, digest_of

VERSION = 2  # part of the digest: raise it with every change that alters the features
PATCH = 8
SCALES = 4  # octaves; at the coarsest a patch is one sample
ORIENTATIONS = 8
WAVELENGTH, SIGMA, RADIUS = 3.6, 1.5, 3  # Gabor pairs, in pixels of their scale
FLOOR = 0.03  # relative amplitude at which the noise of a sensor hides a texture
DARK = 0.02  # added to colours of 0 to 1 before their logarithm
FAINT = 0.03  # deviation of twice the logarithm of colour that counts as noise: 1.5 % of the brightness
NEAR, WIDE = (1, 2, 1), (1, 4, 6, 4, 1)  # windows over patches: 2 and 3 patches across at half height
SURROUNDINGS = tuple(math.exp(-((k / 8) ** 2) / 2) for k in range(-24, 25))  # 19 patches across


class Group(NamedTuple):
    """Typical mean and standard deviation of the channels, repeated over further ones, and the group's share of a row.

    Means and deviations are rounded from measurements on street photographs and on the mosaic, half and half, without
    labels. The shares were chosen by the scores of k-means on the mosaic and on five sets: streets, aerial pictures,
    two kinds of micrographs, and steel surfaces.
    """

    centre: tuple[float, ...]
    spread: tuple[float, ...]
    share: float


GROUPS = {
    "colour": Group((-1.85, 0.02, 0.13), (1.03, 0.42, 0.60), 5.0),
    "relative": Group((0.0,), (1.0,), 6.0),
    "variation": Group((-2.12, -2.70, -2.65), (0.64, 0.41, 0.41), 2.5),
    "contrast": Group((0.17,), (0.56,), 0.7),
    "profile": Group((-0.08, -0.02, 0.05, 0.05), (0.22, 0.19, 0.16, 0.32), 1.0),
    "directed": Group(
        (0.145, 0.19, 0.20, 0.225, 0.055, 0.065, 0.08, 0.095), (0.11, 0.14, 0.13, 0.12, 0.035, 0.04, 0.05, 0.05), 3.0
    ),
    "patchy": Group((0.30, 0.33, 0.29, 0.23, 0.31, 0.08, 0.115), (0.165, 0.17, 0.14, 0.11, 0.23, 0.09, 0.13), 0.5),
}
CHANNELS = dict(zip(GROUPS, (9, 6, 6, 2, 8, 8, 7)))
DIM = sum(CHANNELS.values())


class Filterbank(Backbone):
    """Float32 features [B,P,46], of mean squared length about 50; the borders of images are mirrored."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        numbers = (VERSION, PATCH, SCALES, ORIENTATIONS, WAVELENGTH, SIGMA, RADIUS, FLOOR, DARK, FAINT, GROUPS)
        recipe = " ".join(("filterbank", *map(str, numbers)))
        super().__init__(name="filterbank", digest=digest_of(recipe), patch=PATCH, dim=DIM, device=device)
        self.kernels = gabor_pairs().to(self.device)
        centres, scales = [], []
        for (centre, spread, share), n in zip(GROUPS.values(), CHANNELS.values()):
            centres.append(torch.tensor(centre).repeat(n // len(centre)))
            scales.append(torch.tensor(spread).repeat(n // len(spread)).reciprocal() * math.sqrt(share / n))
        total = sum(group.share for group in GROUPS.values())
        self.centre = torch.cat(centres).view(1, -1, 1, 1).to(self.device)
        self.scale = (torch.cat(scales) * math.sqrt(DIM / total)).view(1, -1, 1, 1).to(self.device)

    def extract(self, images: Tensor) -> Tensor:
        groups = self.measure(images)
        channels = torch.cat([groups[name] for name in GROUPS], 1)
        return ((channels - self.centre) * self.scale).flatten(2).mT.contiguous()

    def measure(self, images: Tensor) -> dict[str, Tensor]:
        """Float32 images [B,3,H,W] in 0..1 -> all groups, not yet centred and scaled, each [B,C,h,w]."""
        patches = F.avg_pool2d(images, PATCH)
        surroundings = blur(patches, WIDE)
        colours = [opponent(2 * torch.log(rgb + DARK)) for rgb in (patches, blur(patches, NEAR), surroundings)]
        average = blur(colours[0], SURROUNDINGS)
        spread = (deviation(colours[0], SURROUNDINGS) ** 2 + FAINT**2).sqrt()
        light = luminance(surroundings) + 0.05
        channels = opponent(images)
        variance = F.avg_pool2d(channels * channels, PATCH) - F.avg_pool2d(channels, PATCH) ** 2
        variation = torch.log(variance.clamp_min(0).sqrt() / light + DARK)

        floor = FLOOR * ORIENTATIONS
        amplitude = self.amplitudes(luminance(images)) / light.unsqueeze(2)
        # blurred as logarithms: one strong edge must not colour all its surroundings
        strength = torch.log(amplitude.sum(2) + floor)
        near, wide = blur(strength, NEAR), blur(strength, WIDE)
        share = amplitude / (amplitude.sum((1, 2), keepdim=True) + SCALES * floor)
        return {
            "colour": torch.cat(colours, 1),
            "relative": torch.cat([(colour - average) / spread for colour in colours[:2]], 1),
            "variation": torch.cat([blur(variation, NEAR), blur(variation, WIDE)], 1),
            "contrast": torch.cat([near.mean(1, keepdim=True), wide.mean(1, keepdim=True)], 1),
            "profile": torch.cat([near - near.mean(1, keepdim=True), wide - wide.mean(1, keepdim=True)], 1),
            "directed": directedness(blur(share, WIDE)),
            "patchy": torch.cat([deviation(strength, WIDE), deviation(colours[0], WIDE)], 1),
        }

    def amplitudes(self, grey: Tensor) -> Tensor:
        """[B,1,H,W] -> mean amplitudes per patch, [B,SCALES,ORIENTATIONS,h,w], scales from fine to coarse."""
        scales = []
        for scale in range(SCALES):
            if scale > 0:
                grey = F.avg_pool2d(blur(grey, NEAR), 2)  # centred, unlike every second sample
            # GPUs drop 13 bits by default
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                pairs = F.conv2d(mirrored(grey, RADIUS), self.kernels)
            even, odd = pairs[:, :ORIENTATIONS], pairs[:, ORIENTATIONS:]
            scales.append(F.avg_pool2d(torch.sqrt(even * even + odd * odd), PATCH >> scale))
        return torch.stack(scales, 1)


def gabor_pairs() -> Tensor:
    """The even filters, then the odd ones, of unit length and zero mean, float32 [2*ORIENTATIONS,1,side,side].

    side = 2*RADIUS+1. Orientation k responds most to a grating whose brightness changes along the direction
    pi*k/ORIENTATIONS, from x towards y.
    """
    axis = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    window = torch.exp(-(x * x + y * y) / (2 * SIGMA * SIGMA))
    directions = [math.pi * k / ORIENTATIONS for k in range(ORIENTATIONS)]
    phases = torch.stack(
        [2 * math.pi / WAVELENGTH * (x * math.cos(angle) + y * math.sin(angle)) for angle in directions]
    )
    even, odd = window * torch.cos(phases), window * torch.sin(phases)
    even = even - window * (even.sum((1, 2), keepdim=True) / window.sum())
    filters = torch.cat([even, odd])
    return (filters / filters.norm(dim=(1, 2), keepdim=True)).unsqueeze(1).float()


def mirrored(x: Tensor, margin: int) -> Tensor:
    """Extends the last two axes by `margin` samples on every side, reflected at the border as often as needed."""
    for axis in (-2, -1):
        size = x.shape[axis]
        last = torch.arange(2 * size, device=x.device)[-1:]  # a tensor: ONNX has no remainder by a size
        index = torch.arange(-margin, size + margin, device=x.device) % (last + 1)
        x = x.index_select(axis, torch.minimum(index, last - index))
    return x


def blur(x: Tensor, window: tuple[float, ...]) -> Tensor:
    """Weighted mean over a square window, borders mirrored; [...,h,w] -> [...,h,w]."""
    height, width = x.shape[-2:]
    x = mirrored(x, len(window) // 2)
    weights = [tap / sum(window) for tap in window]
    zero = x.new_zeros(())
    x = sum((weight * x[..., k : k + height, :] for k, weight in enumerate(weights)), start=zero)
    return sum((weight * x[..., k : k + width] for k, weight in enumerate(weights)), start=zero)


def deviation(x: Tensor, window: tuple[float, ...]) -> Tensor:
    """Standard deviation over a square window, [...,h,w] -> [...,h,w]."""
    mean = blur(x, window)
    return (blur(x * x, window) - mean * mean).clamp_min(0).sqrt()


def luminance(rgb: Tensor) -> Tensor:
    """[B,3,H,W] -> [B,1,H,W]."""
    return 0.299 * rgb[:, 0:1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:3]


def opponent(rgb: Tensor) -> Tensor:
    """[B,3,H,W] -> lightness, red against green, yellow against blue, [B,3,H,W]."""
    red, green, blue = rgb.unbind(1)
    return torch.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], 1)


def directedness(share: Tensor) -> Tensor:
    """How much a scale favours one direction, and how much two at right angles; [B,S,O,h,w] -> [B,2S,h,w] in 0..1.

    These are the lengths of the second and fourth circular harmonic relative to the sum; rotation leaves them alone.
    """
    total = share.sum(2) + FLOOR / SCALES
    lengths = []
    for order in (2, 4):
        angles = torch.arange(ORIENTATIONS, device=share.device).view(-1, 1, 1) * (order * math.pi / ORIENTATIONS)
        x, y = (share * torch.cos(angles)).sum(2), (share * torch.sin(angles)).sum(2)
        lengths.append(torch.sqrt(x * x + y * y) / total)
    return torch.cat(lengths, 1)
